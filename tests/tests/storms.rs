//! Trees that change while they are frozen: each attempt ends in a dump that can be relied on or in a clean
//! refusal, and the tree goes on either way. `FIRN_TESTS_TRIES` says how many attempts there are.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use firn_tests::{Finished, Sandbox, Task, isolated, tries};

const STORM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs/storm.py");
/// Not what a shim in `PATH` starts: an exec must be of the program itself.
const PYTHON: &str = "/usr/bin/python3";
/// The name of a task that lives in a namespace of its own: a dump must not have it.
const ELSEWHERE: &[u8] = b"elsewhere";
/// Every third attempt kills the tree and restores it.
const KILLED: usize = 3;

fn storm(name: &str, kind: &str) {
    if !Path::new(PYTHON).exists() {
        return firn_tests::skip(name, "python3 is not installed");
    }
    isolated(name, &[], |sandbox| weather(sandbox, kind));
}

fn weather(sandbox: &Sandbox, kind: &str) {
    let dir = sandbox.make_dir("work");
    let task = Task::spawn(sandbox, &dir, PYTHON, ["-S", "-E", STORM, kind]);
    let done = || {
        let progress = dir.join("progress");
        progress.metadata().map_or(0, |file| file.len())
    };
    let mut refusals = Vec::new();
    for nth in 1..=tries() {
        let before = done();
        sandbox.wait_until(60, "the storm has died down", || {
            assert!(!task.has_ended(), "ended: {}", read(&dir.join("stderr")));
            done() > before
        });
        let images = sandbox.make_dir(&format!("images-{nth}"));
        let is_killed = nth % KILLED == 0;
        let options: &[&str] = if is_killed { &[] } else { &["-R"] };
        let dumped = task.dump(&images, options);
        if !dumped.status.success() {
            refusals.push(clean_refusal(&dumped, &images));
            continue;
        }
        let images_dir = images.to_str().expect("a plain path");
        let checked = sandbox.firn(["image", "check", images_dir]);
        checked.expect_success("check of the images");
        assert!(!is_elsewhere(&images), "a namespace was lost");
        if is_killed {
            task.restore(&images);
        }
    }
    std::fs::write(dir.join("enough"), "").expect("room for a file");
    let status = task.wait(60);
    assert_eq!(
        status.exit_status(),
        Some(0),
        "{}",
        read(&dir.join("stderr"))
    );
    assert_eq!(read(&dir.join("stdout")), "all as it should be\n");
    let (refused, all) = (refusals.len(), tries());
    assert!(refused * 2 <= all, "{refused} of {all}: {refusals:#?}");
    println!(
        "{kind}: {} dumps, {refused} refusals: {refusals:#?}",
        all - refused
    );
}

/// Whether the images have a task that lives in a namespace of its own.
fn is_elsewhere(images: &Path) -> bool {
    let has_name = |core: &[u8]| core.windows(ELSEWHERE.len()).any(|part| part == ELSEWHERE);
    let files = firn_tests::image_files(images);
    files.iter().any(|path| {
        let is_core = path
            .file_name()
            .is_some_and(|name| name.as_bytes().starts_with(b"core-"));
        is_core && has_name(&std::fs::read(path).expect("an image"))
    })
}

/// A refusal in words, with nothing left behind.
fn clean_refusal(dumped: &Finished, images: &Path) -> String {
    let said = &dumped.stderr;
    assert!(dumped.status.code().is_some(), "killed: {dumped:?}");
    assert!(said.starts_with("error: "), "no words: {dumped:?}");
    assert!(!said.contains("panicked"), "{said}");
    let left = firn_tests::image_files(images);
    assert!(left.is_empty(), "left behind: {left:?}");
    said.clone()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn forks_that_never_end() {
    storm("forks_that_never_end", "forks");
}

#[test]
fn vforks_that_never_end() {
    storm("vforks_that_never_end", "vforks");
}

#[test]
fn threads_that_come_and_go() {
    storm("threads_that_come_and_go", "threads");
}

#[test]
fn a_thread_executes_the_program_again() {
    storm("a_thread_executes_the_program_again", "execs");
}

#[test]
fn children_in_namespaces_of_their_own() {
    storm("children_in_namespaces_of_their_own", "namespaces");
}
