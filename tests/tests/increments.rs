//! Dumps that build upon earlier ones: `--track-mem` and `--prev-images-dir`.

use std::path::Path;

use firn_tests::{Finished, Sandbox, Task, isolated};

const CHANGES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs/changes.py");
/// Dumps that leave the tasks running.
const ROUNDS: i32 = 5;

fn start(sandbox: &Sandbox) -> Task<'_> {
    let dir = sandbox.make_dir("work");
    let task = Task::spawn(sandbox, &dir, "python3", [CHANGES]);
    tell(sandbox, &dir, 0);
    task
}

/// Takes a step and returns the hash of all memory after it.
fn tell(sandbox: &Sandbox, dir: &Path, step: i32) -> String {
    if step != 0 {
        std::fs::write(dir.join("step.new"), step.to_string()).expect("room");
        std::fs::rename(dir.join("step.new"), dir.join("step")).expect("the same directory");
    }
    let mut hash = String::new();
    sandbox.wait_until(60, "the step was not taken", || {
        let done = std::fs::read_to_string(dir.join("done")).unwrap_or_default();
        let told = done.trim().split_once(' ');
        let told = told.filter(|(at, _)| *at == step.to_string());
        told.is_some_and(|(_, found)| {
            hash = found.to_owned();
            true
        })
    });
    hash
}

/// Pages written, and pages left to the parent.
fn pages(dumped: Finished) -> (u64, u64) {
    let dumped = dumped.expect_success("dump");
    let report: serde_json::Value = serde_json::from_str(&dumped.stdout).expect("a report");
    let number = |key: &str| report[key].as_u64().expect("a number");
    (number("pages"), number("pages_in_parent"))
}

fn holders(sandbox: &Sandbox) -> Vec<i32> {
    let is_holder = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0)
            .any(|word| word == b"hold-tracker")
    };
    sandbox.pids().into_iter().filter(is_holder).collect()
}

#[test]
fn only_what_was_written_to_is_saved_again() {
    isolated(
        "only_what_was_written_to_is_saved_again",
        &["python3"],
        |sandbox| {
            let task = start(sandbox);
            let dir = sandbox.dir().join("work");
            let mut hash = String::new();
            for nth in 1..=ROUNDS {
                hash = tell(sandbox, &dir, nth);
                let images = sandbox.make_dir(&format!("images-{nth}"));
                let parent = format!("../images-{}", nth - 1);
                let mut options = vec!["-R", "--track-mem", "--json"];
                if nth > 1 {
                    options.extend(["--prev-images-dir", &parent]);
                }
                let (written, in_parent) = pages(task.dump(&images, &options));
                match nth {
                    1 => assert!(in_parent == 0 && written > 6000, "{written} {in_parent}"),
                    _ => assert!(
                        in_parent > 6000 && written < in_parent,
                        "{written} {in_parent}"
                    ),
                }
                assert_eq!(holders(sandbox).len(), 1, "round {nth}");
            }
            // The last one of the chain kills them.
            let last = tell(sandbox, &dir, ROUNDS + 1);
            assert_ne!(last, hash);
            let images = sandbox.make_dir("images-last");
            let parent = format!("../images-{ROUNDS}");
            let (_, in_parent) =
                pages(task.dump(&images, &["--json", "--prev-images-dir", &parent]));
            assert!(in_parent > 6000, "{in_parent}");
            sandbox.wait_until(30, "the tracker has outlived its tasks", || {
                holders(sandbox).is_empty()
            });
            for place in ["images-last", "images-3"] {
                let place = sandbox.dir().join(place);
                let checked = sandbox.firn(["image", "check", place.to_str().expect("plain")]);
                checked.expect_success("check");
            }
            task.restore(&images);
            assert_eq!(tell(sandbox, &dir, -1), last);
            // What is restored is not tracked, and goes on.
            let again = sandbox.make_dir("again");
            let (_, in_parent) = pages(task.dump(&again, &["--json"]));
            assert_eq!(in_parent, 0);
            task.restore(&again);
            assert_eq!(tell(sandbox, &dir, -2), last);
            task.kill();
        },
    );
}

#[test]
fn without_a_tracker_everything_is_saved() {
    isolated(
        "without_a_tracker_everything_is_saved",
        &["python3"],
        |sandbox| {
            let task = start(sandbox);
            let dir = sandbox.dir().join("work");
            let dump = |name: &str, options: &[&str]| {
                let images = sandbox.make_dir(name);
                pages(task.dump(&images, &[&["--json"], options].concat()))
            };
            dump("first", &["-R", "--track-mem"]);
            // Tracked since the first, not since the second.
            dump("second", &["-R"]);
            let (written, in_parent) = dump("other", &["-R", "--prev-images-dir", "../second"]);
            assert!(in_parent == 0 && written > 6000, "{written} {in_parent}");
            let (written, in_parent) = dump("right", &["-R", "--prev-images-dir", "../first"]);
            assert!(
                in_parent > 6000 && written < in_parent,
                "{written} {in_parent}"
            );
            // With its holder the tracker is gone.
            let holder = holders(sandbox);
            let [holder] = holder[..] else {
                panic!("{holder:?}");
            };
            let killed = std::process::Command::new("kill")
                .args(["-9", &holder.to_string()])
                .status();
            assert!(killed.expect("kill").success());
            sandbox.wait_until(30, "the holder is still there", || {
                holders(sandbox).is_empty()
            });
            let hash = tell(sandbox, &dir, 1);
            let (written, in_parent) = dump("late", &["--prev-images-dir", "../first"]);
            assert!(in_parent == 0 && written > 6000, "{written} {in_parent}");
            task.restore(&sandbox.dir().join("late"));
            assert_eq!(tell(sandbox, &dir, -1), hash);
            task.kill();
        },
    );
}
