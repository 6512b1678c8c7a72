//! Programs of large runtimes under load: collectors at work, thread pools busy. `FIRN_TESTS_ROUNDS`
//! says how often each is dumped and restored.

use std::path::Path;

use firn_tests::{Program, Progress, Sandbox, isolated, rounds};

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");
/// Units of work between two dumps. Each adds a line to the file `progress`.
const UNITS_BETWEEN: u64 = 15;
const LINE: u64 = 10;

#[track_caller]
fn check(sandbox: &Sandbox, words: &[&str]) {
    sandbox.check_survives(&Program {
        command: words.iter().map(|word| (*word).to_owned()).collect(),
        set_up: &nothing,
        progress: Progress::File("progress", UNITS_BETWEEN * LINE),
        rounds: rounds(),
        enough: Some("enough"),
        results: &[],
    });
}

fn nothing(_: &Path) {}

/// Debian's interpreter, which has Debian's numpy; another may come first in `PATH`.
#[test]
fn python_multiplies_matrices_in_a_pool() {
    const NAME: &str = "python_multiplies_matrices_in_a_pool";
    const PYTHON: &str = "/usr/bin/python3";
    let has_numpy = std::process::Command::new(PYTHON)
        .args(["-c", "import numpy"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !has_numpy {
        return firn_tests::skip(NAME, "numpy is not installed");
    }
    isolated(NAME, &[], |sandbox| {
        check(sandbox, &[PYTHON, &format!("{PROGRAMS}/matrices.py")]);
    });
}

/// Once for each of the collectors that differ most in what they do with memory.
fn java(name: &str, collector: &str) {
    isolated(name, &["java", "javac"], |sandbox| {
        let classes = sandbox.make_dir("classes");
        let mut compile = std::process::Command::new("javac");
        compile.arg("-d").arg(&classes);
        compile.arg(format!("{PROGRAMS}/Pool.java"));
        sandbox.run(&mut compile).expect_success("javac");
        let classes = classes.to_str().expect("a plain path");
        // Its statistics are in a file named after the pid, which other sandboxes have as well.
        let quiet = "-XX:-UsePerfData";
        let command = ["java", "-Xmx96m", collector, quiet, "-cp", classes, "Pool"];
        check(sandbox, &command);
    });
}

#[test]
fn java_with_g1_fills_its_pool() {
    java("java_with_g1_fills_its_pool", "-XX:+UseG1GC");
}

#[test]
fn java_with_zgc_fills_its_pool() {
    java("java_with_zgc_fills_its_pool", "-XX:+UseZGC");
}

#[test]
fn node_runs_workers_and_timers() {
    isolated("node_runs_workers_and_timers", &["node"], |sandbox| {
        check(sandbox, &["node", &format!("{PROGRAMS}/pool.js")]);
    });
}

#[test]
fn go_runs_goroutines_and_timers() {
    isolated("go_runs_goroutines_and_timers", &["go"], |sandbox| {
        let program = sandbox.dir().join("pool");
        let mut build = std::process::Command::new("go");
        build.args(["build", "-o"]).arg(&program);
        build.arg(format!("{PROGRAMS}/pool.go"));
        build.env("GOCACHE", sandbox.make_dir("cache"));
        build.env("GO111MODULE", "off");
        sandbox.run(&mut build).expect_success("go build");
        check(sandbox, &[program.to_str().expect("a plain path")]);
    });
}
