//! The runner against engines that do nothing, fail and hang, and the workloads by themselves.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Runs the runner with its scratch directories below `scratch`.
fn runner(scratch: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_firn-zdtm"));
    command.arg("run").args(arguments).env("TMPDIR", scratch);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!(
        "{}\n{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    )
}

/// The last line of the counts.
fn counts(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    out.lines()
        .rfind(|line| line.ends_with(" skipped"))
        .unwrap_or_default()
        .to_owned()
}

/// Writes an engine that is a shell script.
fn engine(scratch: &Path, script: &str) -> PathBuf {
    let path = scratch.join("engine");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("writing the engine");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    path
}

/// Namespaces need root; without it these tests say so and pass over.
fn is_root(name: &str) -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|data| {
        use std::os::unix::fs::MetadataExt;
        data.uid() == 0
    });
    if !root {
        eprintln!("skipping {name}: pid namespaces need root");
    }
    root
}

/// Tells whether any process has `needle` in its command line.
fn is_running(needle: &str) -> bool {
    let needle = needle.replace(' ', "\0");
    let processes = fs::read_dir("/proc")
        .expect("proc is readable")
        .filter_map(Result::ok);
    processes
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .any(|line| String::from_utf8_lossy(&line).contains(&needle))
}

/// A command that hangs, found by its duration, which no other run of these tests has.
fn long_sleep(nth: u32) -> String {
    format!("sleep 54321.{}{nth}", std::process::id())
}

#[test]
fn every_workload_passes_when_nothing_happens_to_it() {
    if !is_root("every_workload_passes_when_nothing_happens_to_it") {
        return;
    }
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let arguments = ["--no-checkpoint", "--keep-going", "--parallel", "2"];
    let output = runner(scratch.path(), &arguments)
        .output()
        .expect("starting the runner");
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        counts(&output).contains(" passed, 0 failed, "),
        "{}",
        text(&output)
    );
    let left = fs::read_dir(scratch.path()).expect("reading").count();
    assert_eq!(left, 0, "scratch directories are left");
}

#[test]
fn an_engine_that_fails_is_reported_with_its_last_words() {
    if !is_root("an_engine_that_fails_is_reported_with_its_last_words") {
        return;
    }
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let engine = engine(scratch.path(), "echo 'Error: no dumping today'; exit 7");
    let engine = engine.to_string_lossy();
    let arguments = [
        "--engine",
        &engine,
        "--test",
        "tree/single",
        "--test",
        "refusals/memfd-secret",
    ];
    let output = runner(
        scratch.path(),
        &[&arguments[..], &["--keep-going"]].concat(),
    )
    .output()
    .expect("starting the runner");
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert_eq!(counts(&output), "0 passed, 2 failed, 0 skipped", "{said}");
    assert!(said.contains("dump: exit code 7"), "{said}");
    assert!(said.contains("Error: no dumping today"), "{said}");
    assert!(said.contains("the refusal does not say `secret`"), "{said}");
    assert!(said.contains("kept: "), "{said}");
}

#[test]
fn an_engine_that_does_nothing_is_found_out() {
    if !is_root("an_engine_that_does_nothing_is_found_out") {
        return;
    }
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let engine = engine(scratch.path(), "exit 0");
    let engine = engine.to_string_lossy();
    let arguments = ["--engine", &engine, "--test", "tree/single"];
    let output = runner(scratch.path(), &arguments)
        .output()
        .expect("starting the runner");
    let said = text(&output);
    assert_eq!(counts(&output), "0 passed, 1 failed, 0 skipped", "{said}");
    assert!(said.contains("are still there after the kill"), "{said}");
}

#[test]
fn an_engine_that_hangs_is_ended_and_nothing_of_it_is_left() {
    if !is_root("an_engine_that_hangs_is_ended_and_nothing_of_it_is_left") {
        return;
    }
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let engine = engine(scratch.path(), &format!("{}; exit 0", long_sleep(1)));
    let engine = engine.to_string_lossy();
    let arguments = [
        "--engine",
        &engine,
        "--test",
        "tree/single",
        "--step-timeout",
        "1",
    ];
    let output = runner(scratch.path(), &arguments)
        .output()
        .expect("starting the runner");
    let said = text(&output);
    assert!(
        said.contains("the engine was still busy after 1 s"),
        "{said}"
    );
    assert!(!is_running(&long_sleep(1)), "the hanging engine is left");
    assert!(
        !is_running(&scratch.path().to_string_lossy()),
        "a workload is left"
    );
}

/// Waits until a workload below the scratch directory runs.
fn wait_for_start(child: &mut Child, scratch: &Path) {
    let start = Instant::now();
    let needle = scratch.to_string_lossy().into_owned();
    while !is_running(&long_sleep(2)) || !is_running(&needle) {
        assert!(
            child.try_wait().expect("waiting").is_none(),
            "the runner ended early"
        );
        assert!(start.elapsed() < Duration::from_secs(60), "nothing starts");
        sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_interrupted_runner_takes_everything_along() {
    if !is_root("an_interrupted_runner_takes_everything_along") {
        return;
    }
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let inner = scratch.path().join("runs");
    fs::create_dir(&inner).expect("making a directory");
    let engine = engine(scratch.path(), &format!("{}; exit 0", long_sleep(2)));
    let engine = engine.to_string_lossy();
    let arguments = [
        "--engine",
        &engine,
        "--test",
        "tree/fan-out",
        "--iterations",
        "3",
    ];
    let mut child = runner(&inner, &arguments)
        .spawn()
        .expect("starting the runner");
    wait_for_start(&mut child, &inner);
    let pid = i32::try_from(child.id()).expect("pids are small");
    zdtm::sys::kill(pid, libc::SIGINT).expect("our own child");
    let output = child.wait_with_output().expect("waiting");
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("interrupted"), "{said}");
    assert!(!is_running(&long_sleep(2)), "the engine is left");
    assert!(!is_running(&inner.to_string_lossy()), "a workload is left");
    assert_eq!(
        fs::read_dir(&inner).expect("reading").count(),
        0,
        "a directory is left"
    );
}

#[test]
fn a_missing_engine_is_said_with_the_command_that_makes_it() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let arguments = ["--engine", "/does/not/exist", "--test", "tree/single"];
    let output = runner(scratch.path(), &arguments)
        .output()
        .expect("starting the runner");
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("cargo build -p firn"), "{said}");
}

#[test]
fn the_list_names_workloads_of_every_area() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let output = runner(scratch.path(), &["--list"])
        .output()
        .expect("starting the runner");
    let said = text(&output);
    let areas = [
        "tree/",
        "registers/",
        "syscalls/",
        "signals/",
        "timers/",
        "task/",
        "memory/",
        "files/",
        "odd/",
        "scripts/",
        "refusals/",
    ];
    for area in areas {
        assert!(
            said.lines().any(|line| line.starts_with(area)),
            "no {area} in:\n{said}"
        );
    }
}
