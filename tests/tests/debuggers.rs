//! A program that gdb holds: a dump names gdb, and both go on as if nothing had been.

use std::path::Path;

use rustix::process::Signal;

use firn_tests::{Sandbox, Task, isolated};

const COUNTER: &str = env!("CARGO_BIN_EXE_counter");

fn count(dir: &Path) -> u64 {
    let text = std::fs::read_to_string(dir.join("count")).unwrap_or_default();
    text.parse().unwrap_or(0)
}

#[track_caller]
fn assert_counting(sandbox: &Sandbox, dir: &Path) {
    let before = count(dir);
    sandbox.wait_until(120, "the program does not count", || count(dir) > before);
}

/// The process that traces another one, 0 for none.
fn tracer(pid: i32) -> i32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"));
    line.and_then(|pid| pid.trim().parse().ok()).unwrap_or(0)
}

/// gdb with these commands, one after another.
fn gdb<'a>(sandbox: &'a Sandbox, dir: &Path, commands: &[&str], program: &[&str]) -> Task<'a> {
    // Nothing of the user's, nothing that asks or fetches, and no debug information, which takes its time.
    let quiet = [
        "-nx",
        "-batch",
        "--readnever",
        "-iex",
        "set debuginfod enabled off",
    ];
    let commands = commands.iter().flat_map(|command| ["-ex", command]);
    let arguments = quiet.into_iter().chain(commands);
    Task::spawn(
        sandbox,
        dir,
        "gdb",
        arguments.chain(program.iter().copied()),
    )
}

#[test]
fn gdb_that_has_attached_from_outside() {
    isolated("gdb_that_has_attached_from_outside", &["gdb"], |sandbox| {
        let dir = sandbox.make_dir("work");
        let task = Task::spawn(sandbox, &dir, COUNTER, ["count"]);
        assert_counting(sandbox, &dir);
        let attach = format!("attach {}", task.pid());
        // A signal of the terminal, which gdb keeps to itself, ends the second command.
        let commands = [attach.as_str(), "continue", "detach"];
        let debugger = gdb(sandbox, &sandbox.make_dir("gdb"), &commands, &[]);
        sandbox.wait_until(120, "gdb does not attach", || tracer(task.pid()) != 0);
        assert_eq!(tracer(task.pid()), debugger.pid());
        assert_counting(sandbox, &dir);

        let images = sandbox.make_dir("images");
        let refused = task.dump(&images, &[]);
        let named = format!("traced by process {} (gdb)", debugger.pid());
        refused.expect_refusal(&[&named, "detach"]);
        assert_eq!(tracer(task.pid()), debugger.pid());
        assert_counting(sandbox, &dir);

        task.signal(Signal::INT);
        sandbox.wait_until(120, "gdb does not detach", || debugger.has_ended());
        assert_counting(sandbox, &dir);
        task.dump(&images, &[]).expect_success("dump");
        task.restore(&images);
        assert_counting(sandbox, &dir);
        task.kill();
    });
}

#[test]
fn gdb_with_its_program_in_the_tree() {
    isolated("gdb_with_its_program_in_the_tree", &["gdb"], |sandbox| {
        let dir = sandbox.make_dir("work");
        let task = gdb(sandbox, &dir, &["run"], &["--args", COUNTER, "count"]);
        assert_counting(sandbox, &dir);
        let is_traced = |pid: &i32| tracer(*pid) == task.pid();
        let program = task.tree().into_iter().find(is_traced);
        let program = program.expect("gdb traces what it runs");

        let images = sandbox.make_dir("images");
        let refused = task.dump(&images, &[]);
        let (traced, by) = (
            format!("task {program}"),
            format!("process {} (gdb)", task.pid()),
        );
        refused.expect_refusal(&[&traced, &by]);
        assert_eq!(tracer(program), task.pid());
        assert!(task.is_alive());
        assert_counting(sandbox, &dir);
        task.kill();
        // It is not of gdb's session, and gdb has let it go with itself.
        sandbox.wait_until(120, "the program outlives gdb", || {
            sandbox.pids().is_empty()
        });
    });
}
