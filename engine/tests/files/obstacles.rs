//! What can't be dumped is named, all of it, and before anything happens.

use std::process::Stdio;

use firn_engine::files::{Depth, FileDumpError, FileDumpOptions, survey};
use firn_sys::Pid;

use crate::stage::{Shell, dump};

#[test]
fn a_survey_names_every_object() {
    let dir = tempfile::tempdir().expect("a directory");
    let shell = Shell::start(
        dir.path(),
        "exec 6>lock; flock 6; exec 7</dev/kmsg; exec 8<lock",
    );
    let found = survey(
        &[shell.pid()],
        &FileDumpOptions::default(),
        Depth::Full,
        None,
    )
    .obstacles;
    let objects: Vec<&str> = found
        .iter()
        .map(|obstacle| obstacle.object.as_str())
        .collect();
    assert_eq!(objects.len(), 2, "{objects:?}");
    assert!(objects[0].starts_with("fd 6 (") && found[0].reason.contains("FLOCK"));
    assert!(objects[1].starts_with("fd 7 (/dev/kmsg"));
    assert!(found.iter().all(|obstacle| obstacle.hint.is_some()));

    let images = tempfile::tempdir().expect("a directory");
    let refused = dump(&shell.tree(), images.path(), &FileDumpOptions::default());
    match refused.err() {
        Some(FileDumpError::Obstacles(again)) => assert_eq!(again, found),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pipe_to_the_outside_names_who_holds_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let shell = Shell::start_with(dir.path(), "", Stdio::piped());
    let found = survey(
        &[shell.pid()],
        &FileDumpOptions::default(),
        Depth::Full,
        None,
    )
    .obstacles;
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].object.starts_with("fd 0 (pipe:["), "{}", found[0]);
    let holder = format!("process {} (fd ", Pid::this());
    assert!(found[0].reason.starts_with(&holder), "{}", found[0]);
    let images = tempfile::tempdir().expect("a directory");
    let refused = dump(&shell.tree(), images.path(), &FileDumpOptions::default());
    assert!(matches!(refused.err(), Some(FileDumpError::Obstacles(_))));
}

#[test]
fn a_task_that_is_gone_has_no_obstacles() {
    assert!(
        survey(
            &[Pid::from_raw(i32::MAX)],
            &FileDumpOptions::default(),
            Depth::Full,
            None,
        )
        .obstacles
        .is_empty()
    );
}
