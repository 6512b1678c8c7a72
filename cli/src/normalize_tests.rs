//! Tables of command lines and their canonical form.

use std::ffi::OsString;

use super::{Normalized, normalize};
use crate::output::Failure;

fn run(line: &str) -> Result<Normalized, Failure> {
    run_with(line, None)
}

fn run_with(line: &str, config: Option<&str>) -> Result<Normalized, Failure> {
    let argv = std::iter::once("firn").chain(line.split_whitespace());
    let argv = argv.map(OsString::from).collect();
    normalize(argv, |name| match name {
        "CRIU_CONFIG_FILE" => config.map(OsString::from),
        _ => None,
    })
}

fn words(line: &str) -> String {
    joined(&run(line).unwrap())
}

fn joined(made: &Normalized) -> String {
    let words: Vec<_> = made.words[1..]
        .iter()
        .map(|word| word.to_string_lossy())
        .collect();
    words.join(" ")
}

fn error(line: &str) -> String {
    run(line).unwrap_err().message
}

#[test]
fn canonical_forms() {
    let table = [
        (
            "dump -t 1 -D d --no-default-config",
            "dump --tree=1 --images-dir=d --no-default-config",
        ),
        (
            "-D d dump -t1 -R",
            "dump --images-dir=d --tree=1 --leave-running",
        ),
        ("dump --tree 7 -s", "dump --tree=7 --leave-stopped"),
        (
            "restore -dSj --pidfile=p",
            "restore --restore-detached --restore-sibling --shell-job --pidfile=p",
        ),
        (
            "restore --no-restore-detached",
            "restore --no-restore-detached",
        ),
        (
            "restore --exec-cmd -- sh -c true",
            "restore --exec-cmd -- sh -c true",
        ),
        ("dump -v", "dump --verbosity=3"),
        ("dump -vv", "dump --verbosity=4"),
        ("dump -v -v", "dump --verbosity=4"),
        ("dump -v4", "dump --verbosity=4"),
        ("dump --verbosity=0", "dump --verbosity=0"),
        ("dump -Rv4", "dump --leave-running --verbosity=4"),
        ("check --feature timens", "check --feature=timens"),
        ("dump --no-evasive-devices", "dump"),
        ("dump -x5,7", "dump --ext-unix-sk=5,7"),
        ("dump --wrong", "dump --wrong"),
        ("image show -D x", "image show -D x"),
        ("demo", "demo"),
        ("--version", "--version"),
    ];
    for (line, wanted) in table {
        assert_eq!(words(line), wanted, "{line}");
    }
}

#[test]
fn options_of_other_commands_are_remarked_and_left_out() {
    let made = run("restore -t 1 --ghost-limit 2M --daemon").unwrap();
    assert_eq!(joined(&made), "restore");
    assert_eq!(made.warnings[0], "option -t has no effect on restore");
    assert_eq!(made.warnings.len(), 3);
}

#[test]
fn what_is_not_there_yet_is_said() {
    let said = error("dump -t 1 --evasive-devices");
    assert!(
        said.starts_with("option --evasive-devices is not in this version of firn"),
        "{said}"
    );
    assert!(error("dump -L x").starts_with("option -L (--libdir) is not in this version"));
    assert!(error("check --ms").contains("no longer exists"));
    assert_eq!(
        error("pre-dump -t 1"),
        "this version has no command 'pre-dump'"
    );
}

#[test]
fn values_are_where_they_belong() {
    assert_eq!(error("dump -t"), "option -t needs a value");
    assert_eq!(error("dump --tree"), "option --tree needs a value");
    assert_eq!(
        error("dump --leave-running=yes"),
        "option --leave-running takes no value"
    );
    assert_eq!(error("dump -vx"), "verbosity 'x' is not a number");
}

#[test]
fn the_command_line_comes_after_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let env = dir.path().join("env.conf");
    let own = dir.path().join("own.conf");
    std::fs::write(
        &env,
        "timeout 1\nroot /x # of restore: no word about it\naction-script a\n",
    )
    .unwrap();
    std::fs::write(&own, "timeout 2\nverbosity 1\naction-script b\n").unwrap();
    let line = format!(
        "dump -v --timeout 3 --action-script c --config {}",
        own.display()
    );
    let made = run_with(&line, Some(env.to_str().unwrap())).unwrap();
    let text = joined(&made);
    let wanted = "dump --timeout=1 --action-script=a --timeout=2 --action-script=b --timeout=3 \
                  --action-script=c --config=";
    assert!(text.starts_with(wanted), "{text}");
    assert!(text.ends_with("--verbosity=2"), "{text}");
    assert!(made.warnings.is_empty());
}

#[test]
fn files_with_errors_name_the_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.conf");
    let said = |text: &str| {
        std::fs::write(&file, text).unwrap();
        run_with("dump -t 1", Some(file.to_str().unwrap()))
            .unwrap_err()
            .message
    };
    assert!(said("\nnonsense").ends_with("c.conf:2: there is no option 'nonsense'"));
    assert!(said("dump").ends_with("c.conf:1: there is no option 'dump'"));
    assert!(said("timeout").ends_with("option 'timeout' needs a value"));
    assert!(said("track-mem yes").ends_with("option 'track-mem' takes no value"));
    assert!(said("ghost-fiemap").contains("c.conf:1) is not in this version"));
}
