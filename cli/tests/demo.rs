//! `firn demo`, the first thing a user runs.

mod common;

use common::{can_run, firn, run};

#[test]
fn the_demo_works_and_cleans_up() {
    if !can_run() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let said = common::Said::of(firn(&["demo"]).env("TMPDIR", tmp.path()).output().unwrap()).good();
    assert!(said.err.is_empty(), "{said:?}");
    assert!(!said.out.contains('\x1b'), "no colours into a pipe");
    for words in [
        "firn dump -t",
        "no longer exist",
        "firn restore",
        "frozen for",
        "  ok  same pids",
    ] {
        assert!(
            said.out.contains(words),
            "'{words}' is not in\n{}",
            said.out
        );
    }
    assert_eq!(
        std::fs::read_dir(tmp.path()).unwrap().count(),
        0,
        "something stayed behind"
    );
}

#[test]
fn an_unusable_directory_for_temporary_files_is_named() {
    if !can_run() {
        return;
    }
    let output = firn(&["demo"])
        .env("TMPDIR", "/nonexistent")
        .output()
        .unwrap();
    let said = common::Said::of(output);
    assert_eq!(said.code, Some(1));
    assert!(said.err.contains("/nonexistent/firn-demo-"), "{said:?}");
}

#[test]
fn the_worlds_program_is_not_offered() {
    assert!(!run(&["--help"]).good().out.contains("demo-world"));
}
