//! Programs of large runtimes under load: collectors at work, thread pools busy. `FIRN_TESTS_ROUNDS`
//! says how often each is dumped and restored.

use std::path::Path;

use firn_tests::{Program, Progress, Sandbox, isolated, rounds};

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");
/// Units of work between two dumps, and in all for each round. A unit takes some 10 ms and adds a line to
/// the file `progress`.
const UNITS_BETWEEN: u64 = 15;
const UNITS_PER_ROUND: usize = 60;
const LINE: u64 = 10;

/// Runs a program whose last argument is the number of units.
#[track_caller]
fn check(sandbox: &Sandbox, words: &[&str], set_up: &dyn Fn(&Path)) {
    let units = (UNITS_PER_ROUND * rounds()).to_string();
    let mut command: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    command.push(units);
    sandbox.check_survives(&Program {
        command,
        set_up,
        progress: Progress::File("progress", UNITS_BETWEEN * LINE),
        rounds: rounds(),
        results: &["progress"],
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
        check(
            sandbox,
            &[PYTHON, &format!("{PROGRAMS}/matrices.py")],
            &nothing,
        );
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
        let command = ["java", "-Xmx96m", collector, "-cp", classes, "Pool"];
        check(sandbox, &command, &nothing);
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
