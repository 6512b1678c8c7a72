//! `qemu-img` is an independent reader and writer of the format: each side reads, checks and continues
//! what the other wrote.

use std::path::Path;
use std::process::{Command, Output};

use firn_ploop::descriptor::Guid;
use firn_ploop::folder::{self, Folder, NewDisk, NewSnapshot, OpenOptions, Target};
use firn_ploop::format::expanded::Preallocation;
use firn_ploop::{Access, BitmapChange, Disk, Format};

fn has_qemu() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        eprintln!("skipped: there is no qemu-img here (package qemu-utils)");
    }
    there
}

fn call(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

fn good(program: &str, args: &[&str]) {
    let output = call(program, args);
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn rw() -> OpenOptions {
    OpenOptions::new(Access::ReadWrite)
}

/// Some bytes at odd places.
fn scribble(folder: &Folder, seed: u8) {
    let disk = folder.open_disk(&rw()).unwrap().disk;
    let size = disk.size_bytes();
    for step in 0..20u64 {
        let at = (step * 7_654_321 + u64::from(seed) * 1_234_567) % (size - 5000);
        disk.write_at(
            &[seed.wrapping_add(u8::try_from(step).unwrap()) | 1; 4999],
            at,
        )
        .unwrap();
    }
    disk.write_zeroes(size / 2, size / 8).unwrap();
    disk.discard(0, size / 16).unwrap();
    disk.close().unwrap();
}

fn contents(folder: &Folder, snapshot: Option<Guid>) -> Vec<u8> {
    let options = OpenOptions {
        snapshot,
        ..OpenOptions::new(Access::ReadOnly)
    };
    let disk = folder.open_disk(&options).unwrap().disk;
    let mut bytes = vec![0; usize::try_from(disk.size_bytes()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn new_disk(size_bytes: u64, cluster_bytes: u32, preallocation: Preallocation) -> NewDisk {
    NewDisk {
        cluster_bytes,
        preallocation,
        ..NewDisk::new(size_bytes)
    }
}

/// What qemu-img makes of a chain, base first.
fn flattened(files: &[String], raw: &Path) -> Vec<u8> {
    let mut chain = String::new();
    for file in files {
        let backing = match chain.is_empty() {
            true => String::new(),
            false => format!(",\"backing\":{chain}"),
        };
        chain = format!(
            "{{\"driver\":\"parallels\",\"file\":{{\"driver\":\"file\",\"filename\":\"{file}\"}}{backing}}}"
        );
    }
    good(
        "qemu-img",
        &["convert", "-O", "raw", &format!("json:{chain}"), text(raw)],
    );
    let bytes = std::fs::read(raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

fn files(folder: &Folder) -> Vec<String> {
    let images = folder.descriptor().images.iter();
    images
        .map(|image| text(&folder.path_of(image)).to_owned())
        .collect()
}

#[test]
fn qemu_reads_and_checks_what_is_written_here() {
    if !has_qemu() {
        return;
    }
    let cases = [
        (3 << 20, 64 << 10, Preallocation::None),
        (7 << 20, 256 << 10, Preallocation::Full),
        (20 << 20, 1 << 20, Preallocation::None),
        (128 << 20, 64 << 20, Preallocation::None),
    ];
    for (size, cluster, preallocation) in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut folder =
            folder::create(dir.path(), &new_disk(size, cluster, preallocation)).unwrap();
        scribble(&folder, 3);
        folder
            .grow(size + 5 * u64::from(cluster), None, &rw())
            .unwrap();
        let file = &files(&folder)[0];
        good("qemu-img", &["check", "-f", "parallels", file]);
        let theirs = flattened(std::slice::from_ref(file), &dir.path().join("raw"));
        assert!(theirs == contents(&folder, None), "cluster {cluster}");
        // Marked as open, they see it too.
        let disk = folder.open_disk(&rw()).unwrap().disk;
        let output = call("qemu-img", &["check", "-U", "-f", "parallels", file]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        disk.close().unwrap();
    }
}

#[test]
fn qemu_reads_chains_that_are_written_here() {
    if !has_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let new = new_disk(5 << 20, 64 << 10, Preallocation::None);
    let mut folder = folder::create(dir.path(), &new).unwrap();
    let raw = dir.path().join("raw");
    for seed in 1..4 {
        scribble(&folder, seed);
        let new = NewSnapshot {
            id: Guid::from_bytes([seed; 16]),
            running: None,
            bitmap: BitmapChange::Keep,
            temporary: None,
        };
        folder.snapshot(new, &rw()).unwrap();
    }
    scribble(&folder, 9);
    let before = contents(&folder, None);
    assert!(flattened(&files(&folder), &raw) == before);
    for seed in [2, 1, 3] {
        let id = Guid::from_bytes([seed; 16]);
        folder.delete(id, None, &rw(), &mut |_, _| true).unwrap();
        assert!(flattened(&files(&folder), &raw) == before, "without {seed}");
    }
    good(
        "qemu-img",
        &["check", "-f", "parallels", &files(&folder)[0]],
    );
}

#[test]
fn what_qemu_writes_is_a_disk_here() {
    if !has_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root.hds");
    // No whole number of clusters: the original would refuse it.
    good(
        "qemu-img",
        &["create", "-q", "-f", "parallels", text(&path), "10000384"],
    );
    let write = [
        "-f",
        "parallels",
        "-c",
        "write -P 0xab 5M 1M",
        "-c",
        "write -P 7 9999872 512",
        text(&path),
    ];
    good("qemu-io", &write);
    let folder =
        folder::restore_descriptor(dir.path(), "root.hds".as_ref(), Format::Expanded, None);
    let mut folder = folder.unwrap();
    assert_eq!(folder.descriptor().size_bytes(), 10 << 20);
    let bytes = contents(&folder, None);
    assert!(bytes[5 << 20..6 << 20].iter().all(|byte| *byte == 0xab));
    assert_eq!(
        (bytes[9_999_871], bytes[9_999_872], bytes[10_000_383]),
        (0, 7, 7)
    );
    scribble(&folder, 5);
    good("qemu-img", &["check", "-f", "parallels", text(&path)]);
    let before = contents(&folder, None);
    // And back once more through their writer.
    let theirs = dir.path().join("theirs");
    good(
        "qemu-img",
        &[
            "convert",
            "-f",
            "parallels",
            "-O",
            "parallels",
            text(&path),
            text(&theirs),
        ],
    );
    let target = Target {
        format: Format::Raw,
        preallocation: Preallocation::None,
        cluster_bytes: None,
    };
    let raw = dir.path().join("raw");
    let disk = folder.open_disk(&rw()).unwrap().disk;
    folder::export(&disk, &raw, target, &mut |_, _| true).unwrap();
    disk.close().unwrap();
    good(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "parallels",
            text(&raw),
            text(&theirs),
        ],
    );
    folder.convert(target, &rw(), &mut |_, _| true).unwrap();
    assert!(contents(&folder, None) == before);
}

#[test]
fn qcow2_goes_both_ways() {
    if !has_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let new = NewDisk {
        format: Format::Qcow2,
        ..new_disk(20 << 20, 64 << 10, Preallocation::None)
    };
    let mut folder = folder::create(dir.path(), &new).unwrap();
    scribble(&folder, 1);
    folder.grow(70 << 30, None, &rw()).unwrap();
    folder.shrink(0, &rw()).unwrap_err();
    let file = files(&folder)[0].clone();
    good("qemu-img", &["check", "-f", "qcow2", &file]);
    let options = OpenOptions::new(Access::ReadOnly);
    let read = |folder: &Folder| {
        let disk = folder.open_disk(&options).unwrap().disk;
        let mut bytes = vec![0; 20 << 20];
        disk.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    let theirs = |file: &str| {
        let raw = dir.path().join("raw");
        let dd = [
            &format!("if={file}"),
            &format!("of={}", text(&raw)),
            "bs=1M",
            "count=20",
        ];
        let args: Vec<&str> = ["dd", "-f", "qcow2", "-O", "raw"]
            .into_iter()
            .chain(dd)
            .collect();
        good("qemu-img", &args);
        let bytes = std::fs::read(&raw).unwrap();
        std::fs::remove_file(raw).unwrap();
        bytes
    };
    assert!(theirs(&file) == read(&folder));
    good(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 5 3M 2M",
            "-c",
            "discard 1M 1M",
            &file,
        ],
    );
    good("qemu-img", &["check", "-f", "qcow2", &file]);
    assert!(theirs(&file) == read(&folder));
    let new = NewSnapshot {
        id: Guid::from_bytes([1; 16]),
        running: None,
        bitmap: BitmapChange::Keep,
        temporary: None,
    };
    folder.snapshot(new, &rw()).unwrap();
    scribble(&folder, 2);
    let before = read(&folder);
    folder.merge(None, None, &rw(), &mut |_, _| true).unwrap();
    assert!(read(&folder) == before && theirs(&file) == before);
    good("qemu-img", &["check", "-f", "qcow2", &file]);
    let target = Target {
        format: Format::Expanded,
        preallocation: Preallocation::None,
        cluster_bytes: Some(1 << 20),
    };
    folder.convert(target, &rw(), &mut |_, _| true).unwrap();
    good(
        "qemu-img",
        &["check", "-f", "parallels", &files(&folder)[0]],
    );
    assert!(read(&folder) == before);
    let target = Target {
        format: Format::Qcow2,
        ..target
    };
    folder.convert(target, &rw(), &mut |_, _| true).unwrap();
    good("qemu-img", &["check", "-f", "qcow2", &files(&folder)[0]]);
    assert!(read(&folder) == before);
}
