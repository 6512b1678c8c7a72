//! Files without a name come back without one, and nothing is left on disk.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use firn_engine::files::{FileDumpError, FileDumpOptions};

use firn_sys::file;

use crate::stage::{Holder, Shell, dump, restore, table_of, tree_of};

fn names(dir: &std::path::Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .expect("a directory")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("text")
        })
        .collect();
    names.sort();
    names
}

#[test]
fn deleted_files_and_directories_come_back_with_content_and_holes() {
    let dir = tempfile::tempdir().expect("a directory");
    let shell = Shell::start(
        dir.path(),
        "umask 027; truncate -s 64M big; printf tail >> big; exec 3<>big; ln big alias; exec 4<alias;\
         printf small > small; exec 5<small; mkdir d; exec 6<d; mkdir -p deep/er; echo x > deep/er/f;\
         exec 7<deep/er/f; rm -r big alias small d deep; touch small",
    );
    let images = tempfile::tempdir().expect("a directory");
    let dumped = dump(&shell.tree(), images.path(), &FileDumpOptions::default()).expect("dump");
    assert!(dumped.stats.ghost_bytes < 1 << 20, "{:?}", dumped.stats);
    let before = table_of(shell.pid());
    drop(shell);
    let store = restore(&dumped.images).expect("restore");
    assert_eq!(names(dir.path()), ["small"], "nothing is left behind");
    let holder = Holder::start(&store, dumped.files_ids[0]);
    let mut after = table_of(holder.pid);
    // Somebody else has the old name of this one.
    let other = after.insert(5, before[&5].clone()).expect("fd 5");
    assert!(other.contains(".firn-ghost-"), "{other}");
    assert_eq!(after, before);

    let big = holder.file(3).metadata().expect("stat");
    let alias = holder.file(4).metadata().expect("stat");
    assert_eq!(
        (big.ino(), big.nlink(), big.mode() & 0o7777),
        (alias.ino(), 0, 0o640)
    );
    assert_eq!(big.size(), (64 << 20) + 4);
    assert!(big.blocks() < 1024, "{} blocks", big.blocks());
    let mut tail = [0; 4];
    holder
        .file(4)
        .read_exact_at(&mut tail, 64 << 20)
        .expect("read");
    assert_eq!(&tail, b"tail");
    holder.file(5).read_exact_at(&mut tail, 1).expect("read");
    assert_eq!(&tail, b"mall");
    assert!(holder.file(6).metadata().expect("stat").is_dir());
}

#[test]
fn a_limit_refuses_larger_ghosts_only() {
    let dir = tempfile::tempdir().expect("a directory");
    let shell = Shell::start(
        dir.path(),
        "head -c 100000 /dev/zero > a; truncate -s 1G b; exec 3<a 4<b; rm a b",
    );
    let images = tempfile::tempdir().expect("a directory");
    let limited = |limit| {
        let ghost_limit = Some(limit);
        let options = FileDumpOptions {
            ghost_limit,
            ..FileDumpOptions::default()
        };
        dump(&shell.tree(), images.path(), &options)
    };
    let refused = limited(65536).err().expect("refused");
    let FileDumpError::Obstacles(obstacles) = refused else {
        panic!("{refused}");
    };
    assert_eq!(obstacles.len(), 1, "{obstacles:?}");
    assert!(
        obstacles[0].object.starts_with("fd 3 ("),
        "{}",
        obstacles[0]
    );
    assert!(
        obstacles[0]
            .hint
            .as_deref()
            .is_some_and(|hint| hint.contains("--ghost-limit"))
    );
    limited(1 << 20).expect("a sparse file takes no room");
}

#[test]
fn a_file_with_other_names_keeps_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let shell = Shell::start(
        dir.path(),
        "mkdir sub; echo one > f; ln f sub/other; exec 3<f; rm f; echo two > g; ln g h; exec 4<g; rm g",
    );
    let images = tempfile::tempdir().expect("a directory");
    let refused = dump(&shell.tree(), images.path(), &FileDumpOptions::default()).err();
    let text = refused.expect("refused").to_string();
    assert!(
        text.contains("fd 3") && text.contains("--link-remap"),
        "{text}"
    );
    assert!(
        !text.contains("fd 4"),
        "another name in the same directory is found: {text}"
    );

    let options = FileDumpOptions {
        link_remap: true,
        ..FileDumpOptions::default()
    };
    let dumped = dump(&shell.tree(), images.path(), &options).expect("dump");
    let before = table_of(shell.pid());
    let inode = std::fs::metadata(dir.path().join("sub/other"))
        .expect("stat")
        .ino();
    let twin = std::fs::metadata(dir.path().join("h")).expect("stat").ino();
    drop(shell);
    let store = restore(&dumped.images).expect("restore");
    let holder = Holder::start(&store, dumped.files_ids[0]);
    assert_eq!(table_of(holder.pid), before);
    assert_eq!(holder.file(3).metadata().expect("stat").ino(), inode);
    assert_eq!(holder.file(4).metadata().expect("stat").ino(), twin);
    assert_eq!(
        names(dir.path()).len(),
        3,
        "the image still needs the temporary name"
    );
    store.remove_link_remaps();
    assert_eq!(names(dir.path()), ["h", "sub"]);
}

#[test]
fn a_file_that_never_had_a_name_may_still_get_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let nameless = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(file::O_TMPFILE)
        .open(dir.path())
        .expect("a filesystem with nameless files");
    nameless.write_all_at(b"content", 0).expect("write");
    let again = File::open(format!("/proc/self/fd/{}", nameless.as_raw_fd())).expect("reopen");
    let shell = Shell::start_with(dir.path(), "exec 3<&0", nameless.into());
    let reader = Shell::start_with(dir.path(), "", again.into());
    let images = tempfile::tempdir().expect("a directory");
    let tree = tree_of(&[shell.pid(), reader.pid()]);
    let dumped = dump(&tree, images.path(), &FileDumpOptions::default()).expect("dump");
    let flags = |table: &str| table.rsplit(' ').next().map(str::to_owned);
    let before = flags(&table_of(shell.pid())[&3]);
    let store = restore(&dumped.images).expect("restore");
    let holder = Holder::start(&store, dumped.files_ids[0]);
    let reader = Holder::start(&store, dumped.files_ids[1]);
    assert_eq!(flags(&table_of(holder.pid)[&3]), before);
    assert_eq!(names(dir.path()), Vec::<String>::new());
    let name = dir.path().join("name");
    file::link_descriptor(holder.file(3), &name).expect("a name for it");
    assert_eq!(std::fs::read(&name).expect("read"), b"content");
    let inode = |file: File| file.metadata().expect("stat").ino();
    assert_eq!(inode(holder.file(3)), inode(reader.file(0)));
}
