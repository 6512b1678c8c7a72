//! What the command line says when it is used wrongly, and with which status.

mod common;

use std::process::Stdio;

use common::{Said, firn, run};

#[test]
fn help_and_version_go_to_stdout() {
    let said = run(&["--version"]).good();
    assert_eq!(said.out, format!("firn {}\n", env!("CARGO_PKG_VERSION")));
    let said = run(&["dump", "--help"]).good();
    assert!(said.out.contains("--leave-running") && said.err.is_empty());
    assert!(
        !said.out.contains("--evasive-devices"),
        "options to come are not offered"
    );
}

#[test]
fn wrong_command_lines_end_with_2() {
    let table: [(&[&str], &str); 11] = [
        (&["dump"], "--tree <PID>"),
        (&["dump", "-t", "0"], "0 is not in 1.."),
        (&["dump", "-t", "me"], "invalid digit"),
        (&["dump", "-t"], "option -t needs a value"),
        (&["dump", "-t", "1", "--leave-runing"], "--leave-running"),
        (&["dump", "-t", "1", "--ghost-limit", "1T"], "K, M or G"),
        (
            &["dump", "-t", "1", "--evasive-devices"],
            "not in this version of firn",
        ),
        (
            &["restore", "-S"],
            "--restore-sibling needs --restore-detached",
        ),
        (
            &["restore", "-d", "--exec-cmd", "--", "true"],
            "exclude each other",
        ),
        (&["pre-dump", "-t", "1"], "no command 'pre-dump'"),
        (&["frobnicate"], "unrecognized subcommand 'frobnicate'"),
    ];
    for (args, wanted) in table {
        let said = run(args);
        assert_eq!(said.code, Some(2), "{args:?}: {said:?}");
        assert!(
            said.err.starts_with("error: ") && said.err.contains(wanted),
            "{args:?}: {said:?}"
        );
        assert!(said.out.is_empty(), "{args:?}: {said:?}");
    }
}

#[test]
fn programs_get_their_errors_as_json() {
    let said = run(&["dump", "--json"]);
    let json = said.json();
    assert_eq!(
        (json["ok"].as_bool(), json["exit_code"].as_i64()),
        (Some(false), Some(2))
    );
    assert_eq!(json["error"]["class"], "usage");
    assert!(
        json["error"]["message"]
            .as_str()
            .unwrap()
            .contains("--tree")
    );
    assert!(said.err.starts_with("error: "), "people are told too");
}

#[test]
fn configuration_files_count() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("firn.conf");
    std::fs::write(&config, "tree 1\nghost-fiemap\n").unwrap();
    let said = run(&["dump", "--config", config.to_str().unwrap()]);
    assert_eq!(said.code, Some(2));
    assert!(
        said.err.contains("firn.conf:2) is not in this version"),
        "{said:?}"
    );

    std::fs::create_dir(dir.path().join(".criu")).unwrap();
    std::fs::write(dir.path().join(".criu/default.conf"), "nonsense\n").unwrap();
    let at_home = |args: &[&str]| Said::of(firn(args).env("HOME", dir.path()).output().unwrap());
    assert!(
        at_home(&["dump"])
            .err
            .contains("default.conf:1: there is no option 'nonsense'")
    );
    assert!(
        at_home(&["dump", "--no-default-config"])
            .err
            .contains("--tree <PID>")
    );
    assert!(
        at_home(&["dump", "--help"]).code == Some(0),
        "help needs no configuration"
    );
}

#[test]
fn a_log_file_that_cannot_be_made_is_named() {
    let said = run(&["dump", "-t", "1", "-D", "/nonexistent", "-o", "x.log"]);
    assert_eq!(said.code, Some(1));
    assert!(
        said.err
            .contains("log file /nonexistent/x.log can't be opened"),
        "{said:?}"
    );
    assert!(said.err.contains("hint: "), "{said:?}");
}

#[test]
fn options_without_effect_are_remarked() {
    let said = run(&["check", "-t", "1", "--feature", "kcmp"]);
    assert!(
        said.err
            .contains("warning: option -t has no effect on check"),
        "{said:?}"
    );
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = firn(&["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let said = Said::of(child.wait_with_output().unwrap());
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
}
