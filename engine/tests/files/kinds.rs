//! Every kind of file comes back as it was.

use std::cmp::Ordering;
use std::io::{Read, Write};

use firn_engine::files::{FileDumpOptions, FileRestoreError};
use firn_sys::kcmp::{Resource, kcmp};
use firn_sys::{Pid, fcntl, pipe};

use crate::stage::{Holder, Shell, dump, restore, table_of, tree_of};

fn same_description(pid: Pid, fd1: i32, fd2: i32) -> bool {
    kcmp(pid, pid, Resource::File { fd1, fd2 }) == Ok(Ordering::Equal)
}

#[test]
fn files_with_paths_come_back_with_position_flags_and_sharing() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("data"), "0123456789").expect("write");
    let shell = Shell::start(
        dir.path(),
        "exec 3<data; read -n 4 x <&3; exec 4>>log; echo line >&4; exec 5<. 6<>/dev/null 7<&3 \
         8</dev/zero 9</dev/urandom 20<data 200<&4",
    );
    let images = tempfile::tempdir().expect("a directory");
    let dumped = dump(&shell.tree(), images.path(), &FileDumpOptions::default()).expect("dump");
    let before = table_of(shell.pid());
    let store = restore(&dumped.images).expect("restore");
    let holder = Holder::start(&store, dumped.files_ids[0]);
    assert_eq!(table_of(holder.pid), before);
    assert!(same_description(holder.pid, 3, 7) && same_description(holder.pid, 4, 200));
    assert!(!same_description(holder.pid, 3, 20));
    let mut rest = String::new();
    holder.file(3).read_to_string(&mut rest).expect("read");
    assert_eq!(rest, "456789");
}

#[test]
fn pipes_keep_content_ends_and_capacity() {
    let dir = tempfile::tempdir().expect("a directory");
    // A reader whose writer is gone.
    let shell = Shell::start(dir.path(), "exec 3< <(printf hello); wait $!");
    let images = tempfile::tempdir().expect("a directory");
    let dumped = dump(&shell.tree(), images.path(), &FileDumpOptions::default()).expect("dump");
    assert_eq!(dumped.stats.pipe_bytes, 5);
    let store = restore(&dumped.images).expect("restore");
    let holder = Holder::start(&store, dumped.files_ids[0]);
    assert_eq!(table_of(holder.pid), table_of(shell.pid()));
    // The store has no writing end either, or this would sleep.
    let mut content = String::new();
    holder.file(3).read_to_string(&mut content).expect("read");
    assert_eq!(content, "hello");
}

#[test]
fn both_ends_of_a_pipe_in_two_tasks_are_one_pipe() {
    let dir = tempfile::tempdir().expect("a directory");
    let (reader, writer) = pipe::create().expect("a pipe");
    pipe::set_capacity(&reader, 8192).expect("a capacity");
    fcntl::set_flags(&reader, 0o4000).expect("O_NONBLOCK");
    let from = Shell::start_with(dir.path(), "", reader.into());
    let to = Shell::start_with(dir.path(), "exec 1>&0; echo full >&0", writer.into());
    let images = tempfile::tempdir().expect("a directory");
    let tree = tree_of(&[from.pid(), to.pid()]);
    let dumped = dump(&tree, images.path(), &FileDumpOptions::default()).expect("dump");
    let (before_from, before_to) = (table_of(from.pid()), table_of(to.pid()));
    let store = restore(&dumped.images).expect("restore");
    let from = Holder::start(&store, dumped.files_ids[0]);
    let to = Holder::start(&store, dumped.files_ids[1]);
    assert_eq!(table_of(from.pid), before_from);
    assert_eq!(table_of(to.pid), before_to);
    let reader = from.file(0);
    assert_eq!(pipe::capacity(&reader), Ok(8192));
    assert_eq!(pipe::waiting(&reader), Ok(5));
    to.file(1).write_all(b"er").expect("write");
    assert_eq!(pipe::waiting(&reader), Ok(7));
}

#[test]
fn fifos_keep_their_content() {
    let dir = tempfile::tempdir().expect("a directory");
    let shell = Shell::start(
        dir.path(),
        "mkfifo f gone; exec 3<>f; exec 4<f; printf abc >&3; exec 5<>gone; printf xy >&5; rm gone",
    );
    let images = tempfile::tempdir().expect("a directory");
    let dumped = dump(&shell.tree(), images.path(), &FileDumpOptions::default()).expect("dump");
    let before = table_of(shell.pid());
    drop(shell);
    let store = restore(&dumped.images).expect("restore");
    let holder = Holder::start(&store, dumped.files_ids[0]);
    assert_eq!(table_of(holder.pid), before);
    assert_eq!(pipe::waiting(holder.file(4)), Ok(3));
    assert_eq!(pipe::waiting(holder.file(5)), Ok(2));
    assert!(!dir.path().join("gone").exists());
}

#[test]
fn a_file_owner_is_set_in_the_task() {
    let dir = tempfile::tempdir().expect("a directory");
    let shell = Shell::start(dir.path(), "exec 3< <(sleep 0); wait $!");
    let pidfd = firn_sys::pidfd::open(shell.pid()).expect("alive");
    let theirs = firn_sys::pidfd::getfd(pidfd, 3).expect("an open descriptor");
    let owner = fcntl::Owner {
        kind: 1,
        id: Pid::this().raw(),
    };
    fcntl::set_owner(&theirs, owner).expect("own pid");
    fcntl::set_signal(&theirs, 40).expect("a signal");
    drop(theirs);
    let images = tempfile::tempdir().expect("a directory");
    let dumped = dump(&shell.tree(), images.path(), &FileDumpOptions::default()).expect("dump");
    let store = restore(&dumped.images).expect("restore");
    let holder = Holder::start(&store, dumped.files_ids[0]);
    assert_eq!(fcntl::owner(holder.file(3)), Ok(owner));
    assert_eq!(fcntl::signal(holder.file(3)), Ok(40));
}

#[test]
fn what_has_changed_is_found_before_anything_is_made() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data");
    std::fs::write(&data, "1234").expect("write");
    let shell = Shell::start(dir.path(), "exec 3<data 4>>data");
    let images = tempfile::tempdir().expect("a directory");
    let dumped = dump(&shell.tree(), images.path(), &FileDumpOptions::default()).expect("dump");
    std::fs::write(&data, "12345").expect("write");
    let changed = restore(&dumped.images).err().expect("refused");
    assert!(
        changed.to_string().ends_with("it had 4 bytes and has 5"),
        "{changed}"
    );
    std::fs::remove_file(&data).expect("remove");
    let missing = restore(&dumped.images).err().expect("refused");
    assert!(
        matches!(missing, FileRestoreError::Missing { .. }),
        "{missing}"
    );
}

#[test]
fn one_description_in_many_tables_is_opened_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = std::fs::File::create(dir.path().join("shared")).expect("create");
    let start = || {
        let stdin = file.try_clone().expect("dup").into();
        Shell::start_with(dir.path(), "", stdin)
    };
    let shells: Vec<Shell> = (0..3).map(|_| start()).collect();
    let pids: Vec<Pid> = shells.iter().map(Shell::pid).collect();
    let images = tempfile::tempdir().expect("a directory");
    let dumped = dump(&tree_of(&pids), images.path(), &FileDumpOptions::default()).expect("dump");
    let store = restore(&dumped.images).expect("restore");
    let holders: Vec<Holder> = dumped
        .files_ids
        .iter()
        .map(|id| Holder::start(&store, *id))
        .collect();
    let resource = Resource::File { fd1: 0, fd2: 0 };
    assert_eq!(
        kcmp(holders[0].pid, holders[2].pid, resource),
        Ok(Ordering::Equal)
    );
    let resource = Resource::File { fd1: 1, fd2: 1 };
    assert_ne!(
        kcmp(holders[0].pid, holders[1].pid, resource),
        Ok(Ordering::Equal)
    );
}
