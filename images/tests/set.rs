//! Writing sets: what is in the directory after each way to end.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use firn_images::{ImageDir, ImageKind, ImageSetWriter, ImageWriteError, write_single};
use firn_proto::{FsEntry, InventoryEntry, PipeDataEntry, PstreeEntry, SeccompEntry};
use rustix::fs::{FlockOperation, flock};

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).expect("directory");
    entries
        .map(|e| e.expect("entry").file_name().into_string().expect("UTF-8"))
        .collect()
}

fn set_of(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn inventory() -> InventoryEntry {
    InventoryEntry {
        img_version: 2,
        ..Default::default()
    }
}

fn task(pid: u32) -> PstreeEntry {
    PstreeEntry {
        pid,
        ppid: 0,
        pgid: pid,
        sid: pid,
        threads: vec![pid],
    }
}

fn write_small_set(dir: &Path) -> ImageSetWriter {
    let set = ImageSetWriter::create(dir).expect("set");
    set.write_all(ImageKind::Pstree, 0, &[task(7), task(8)])
        .expect("pstree");
    set.write_one(ImageKind::Seccomp, 0, &SeccompEntry::default())
        .expect("seccomp");
    set
}

#[test]
fn a_sealed_set_reads_back() {
    let dir = tempfile::tempdir().expect("scratch");
    write_small_set(dir.path())
        .seal(&inventory())
        .expect("seal");
    assert_eq!(
        names(dir.path()),
        set_of(&["inventory.img", "pstree.img", "seccomp.img"])
    );
    let images = ImageDir::open(dir.path()).expect("open");
    assert!(images.is_complete());
    assert_eq!(images.inventory().expect("inventory"), inventory());
    let tree: Vec<PstreeEntry> = images.read_all(ImageKind::Pstree, 0).expect("pstree");
    assert_eq!(tree, [task(7), task(8)]);
    let missing: Vec<FsEntry> = images
        .read_all(ImageKind::Fs, 3)
        .expect("a missing file is empty");
    assert!(missing.is_empty());
    // Both magics and the length of an empty message.
    assert_eq!(
        fs::metadata(dir.path().join("seccomp.img"))
            .expect("file")
            .len(),
        12
    );
}

#[test]
fn payload_and_large_images_survive() {
    let dir = tempfile::tempdir().expect("scratch");
    let set = ImageSetWriter::create(dir.path()).expect("set");
    let mut writer = set.writer(ImageKind::PipesData, 0);
    let big = vec![0x5a; 3 << 20];
    for (pipe_id, data) in [(1, &b"abc"[..]), (2, &big), (3, b"")] {
        let bytes = u32::try_from(data.len()).expect("small");
        writer
            .entry(&PipeDataEntry {
                pipe_id,
                bytes,
                size: Some(65536),
                firn: None,
            })
            .expect("entry");
        match pipe_id {
            2 => writer.payload_from(data, bytes.into()).expect("payload"),
            _ => writer.payload(data).expect("payload"),
        }
    }
    writer.finish().expect("finish");
    set.seal(&inventory()).expect("seal");
    let images = ImageDir::open(dir.path()).expect("open");
    let mut reader = images.reader(ImageKind::PipesData, 0).expect("reader");
    let mut found = Vec::new();
    while let Some(entry) = reader.next_entry::<PipeDataEntry>().expect("entry") {
        found.push(reader.payload(entry.bytes.into()).expect("payload"));
    }
    assert_eq!(found, [b"abc".to_vec(), big, Vec::new()]);
}

#[test]
fn dropping_takes_back_what_was_written() {
    let dir = tempfile::tempdir().expect("scratch");
    fs::write(dir.path().join("notes.txt"), "mine").expect("file of the caller");
    fs::write(dir.path().join("core-1.img"), "mine too").expect("file of the caller");
    drop(write_small_set(dir.path()));
    assert_eq!(names(dir.path()), set_of(&["notes.txt", "core-1.img"]));
}

#[test]
fn an_unfinished_image_cannot_be_sealed() {
    let dir = tempfile::tempdir().expect("scratch");
    let set = write_small_set(dir.path());
    let mut writer = set.writer(ImageKind::Fdinfo, 2);
    writer
        .entry(&firn_proto::FdinfoEntry::default())
        .expect("entry");
    drop(writer);
    let error = set.seal(&inventory()).expect_err("half an image");
    assert!(
        matches!(error, ImageWriteError::Unfinished { .. }),
        "{error}"
    );
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_new_set_replaces_the_old_one_whole() {
    let dir = tempfile::tempdir().expect("scratch");
    let parent = tempfile::tempdir().expect("scratch");
    let set = write_small_set(dir.path());
    set.write_one(ImageKind::Cgroup, 0, &firn_proto::CgroupEntry::default())
        .expect("cgroup");
    set.set_parent(parent.path()).expect("parent");
    set.seal(&inventory()).expect("seal");
    fs::write(dir.path().join("notes.txt"), "mine").expect("file of the caller");
    fs::write(dir.path().join("stats-dump"), "mine").expect("file of the work directory");
    write_small_set(dir.path())
        .seal(&inventory())
        .expect("seal again");
    let expected = [
        "inventory.img",
        "pstree.img",
        "seccomp.img",
        "notes.txt",
        "stats-dump",
    ];
    assert_eq!(names(dir.path()), set_of(&expected));
}

#[test]
fn a_failing_seal_leaves_no_inventory_and_no_new_files() {
    let dir = tempfile::tempdir().expect("scratch");
    write_small_set(dir.path())
        .seal(&inventory())
        .expect("seal");
    fs::remove_file(dir.path().join("seccomp.img")).expect("remove");
    // A file cannot be moved over a directory.
    fs::create_dir(dir.path().join("seccomp.img")).expect("directory of the caller");
    let error = write_small_set(dir.path())
        .seal(&inventory())
        .expect_err("in the way");
    assert!(error.to_string().contains("seccomp.img"), "{error}");
    assert_eq!(names(dir.path()), set_of(&["seccomp.img"]));
}

#[test]
fn leavings_of_a_dead_writer_are_swept_and_others_stay() {
    let dir = tempfile::tempdir().expect("scratch");
    let dead = dir.path().join(".firn-1-0");
    fs::create_dir(&dead).expect("directory");
    fs::write(dead.join("core-1.img"), "half").expect("file");
    fs::create_dir(dir.path().join(".firn-notes")).expect("directory of the caller");
    write_small_set(dir.path())
        .seal(&inventory())
        .expect("seal");
    let expected = ["inventory.img", "pstree.img", "seccomp.img", ".firn-notes"];
    assert_eq!(names(dir.path()), set_of(&expected));
}

#[test]
fn a_living_writer_keeps_the_directory() {
    let dir = tempfile::tempdir().expect("scratch");
    let other = dir.path().join(".firn-1-0");
    fs::create_dir(&other).expect("directory");
    let held = fs::File::open(&other).expect("open");
    flock(&held, FlockOperation::NonBlockingLockExclusive).expect("lock");
    let error = ImageSetWriter::create(dir.path()).expect_err("busy");
    assert!(matches!(error, ImageWriteError::Busy { .. }), "{error}");
    assert_eq!(names(dir.path()), set_of(&[".firn-1-0"]));
}

#[test]
fn threads_write_images_of_one_set() {
    let dir = tempfile::tempdir().expect("scratch");
    let set = ImageSetWriter::create(dir.path()).expect("set");
    std::thread::scope(|scope| {
        for first in [0, 100] {
            let set = &set;
            scope.spawn(move || {
                for pid in first..first + 100 {
                    let fs = FsEntry {
                        cwd_id: 1,
                        root_id: 2,
                        umask: None,
                    };
                    set.write_one(ImageKind::Fs, pid, &fs).expect("write");
                }
            });
        }
    });
    set.seal(&inventory()).expect("seal");
    assert_eq!(
        ImageDir::open(dir.path())
            .expect("open")
            .files()
            .expect("files")
            .len(),
        201
    );
}

#[test]
fn an_image_is_written_once() {
    let dir = tempfile::tempdir().expect("scratch");
    let set = write_small_set(dir.path());
    let error = set
        .write_one(ImageKind::Seccomp, 0, &SeccompEntry::default())
        .expect_err("twice");
    assert!(error.to_string().contains("cannot create"), "{error}");
}

#[test]
fn files_have_the_bytes_criu_writes() {
    let dir = tempfile::tempdir().expect("scratch");
    let set = ImageSetWriter::create(dir.path()).expect("set");
    set.write_all(ImageKind::Pstree, 0, &[task(1807)])
        .expect("pstree");
    set.seal(&inventory()).expect("seal");
    let read = |name: &str| fs::read(dir.path().join(name)).expect("file");
    // The tree of one sleeping process, as CRIU 4.2 wrote it.
    let pstree = [
        0x19, 0x43, 0x56, 0x54, 0x30, 0x30, 0x27, 0x50, 0x0e, 0, 0, 0, 0x08, 0x8f, 0x0e, 0x10, 0,
        0x18, 0x8f, 0x0e, 0x20, 0x8f, 0x0e, 0x28, 0x8f, 0x0e,
    ];
    assert_eq!(read("pstree.img"), pstree);
    assert_eq!(
        read("inventory.img"),
        [0x16, 0x31, 0x31, 0x58, 2, 0, 0, 0, 0x08, 2]
    );
}

#[test]
fn statistics_are_replaced_at_once() {
    let dir = tempfile::tempdir().expect("scratch");
    let stats = |frozen_time| firn_proto::StatsEntry {
        dump: Some(firn_proto::DumpStatsEntry {
            frozen_time,
            ..Default::default()
        }),
        restore: None,
    };
    for frozen in [5, 6] {
        write_single(dir.path(), ImageKind::StatsDump, &stats(frozen)).expect("written");
    }
    assert_eq!(names(dir.path()), set_of(&["stats-dump"]));
    let images = ImageDir::open(dir.path()).expect("open");
    let found: firn_proto::StatsEntry = images.read_one(ImageKind::StatsDump, 0).expect("read");
    assert_eq!(found, stats(6));
    let error = write_single(&dir.path().join("none"), ImageKind::StatsDump, &stats(1));
    assert!(
        error
            .expect_err("no directory")
            .to_string()
            .contains("none/stats-dump")
    );
}

/// A writer killed in the middle, and the next one in the same directory.
#[test]
fn a_killed_writer_is_cleaned_up_after() {
    const VARIABLE: &str = "FIRN_TEST_WRITER_DIR";
    if let Some(dir) = std::env::var_os(VARIABLE) {
        let _set = write_small_set(Path::new(&dir));
        println!("ready");
        std::thread::sleep(std::time::Duration::from_secs(60));
        return;
    }
    let dir = tempfile::tempdir().expect("scratch");
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args([
            "--exact",
            "a_killed_writer_is_cleaned_up_after",
            "--nocapture",
        ])
        .env(VARIABLE, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("child");
    let output = BufReader::new(child.stdout.take().expect("piped"));
    assert!(
        output
            .lines()
            .any(|line| line.expect("line").contains("ready"))
    );
    let busy = ImageSetWriter::create(dir.path()).expect_err("the child lives");
    assert!(matches!(busy, ImageWriteError::Busy { .. }), "{busy}");
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert_eq!(names(dir.path()).len(), 1, "what the child left");
    write_small_set(dir.path())
        .seal(&inventory())
        .expect("seal");
    assert_eq!(
        names(dir.path()),
        set_of(&["inventory.img", "pstree.img", "seccomp.img"])
    );
}
