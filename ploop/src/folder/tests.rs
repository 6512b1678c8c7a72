//! Whole disks in directories: what is written before and after each step is there.

use std::path::Path;

use super::*;
use crate::ChainDisk;
use crate::descriptor::FILE_NAME;
use crate::disk::{BitmapChange, Disk};
use crate::format::Format;
use crate::format::expanded::{Preallocation, Repair, Severity, Unclosed};
use crate::storage::Access;

const CLUSTER: u64 = 64 << 10;

/// In memory where that can be had: these tests sync a lot.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.unwrap()
}

fn small(clusters: u64) -> NewDisk {
    NewDisk {
        cluster_bytes: 64 << 10,
        ..NewDisk::new(clusters * CLUSTER)
    }
}

fn rw() -> OpenOptions {
    OpenOptions::new(Access::ReadWrite)
}

fn at(snapshot: Guid) -> OpenOptions {
    OpenOptions {
        snapshot: Some(snapshot),
        ..OpenOptions::new(Access::ReadOnly)
    }
}

fn id(number: u8) -> Guid {
    Guid::from_bytes([number; 16])
}

fn put(folder: &Folder, cluster: u64, byte: u8) {
    let disk = folder.open_disk(&rw()).unwrap().disk;
    disk.write_at(&[byte; 3], cluster * CLUSTER + 10).unwrap();
    disk.close().unwrap();
}

fn get(disk: &ChainDisk, cluster: u64) -> u8 {
    let mut byte = [0xee];
    disk.read_at(&mut byte, cluster * CLUSTER + 12).unwrap();
    byte[0]
}

/// First bytes of clusters 0 to 4.
fn look(folder: &Folder, options: &OpenOptions) -> Vec<u8> {
    let disk = folder.open_disk(options).unwrap().disk;
    (0..5).map(|cluster| get(&disk, cluster)).collect()
}

fn now(folder: &Folder) -> Vec<u8> {
    look(folder, &OpenOptions::new(Access::ReadOnly))
}

fn snap(folder: &mut Folder, id: Guid) {
    let new = NewSnapshot {
        id,
        running: None,
        bitmap: BitmapChange::Keep,
        temporary: None,
    };
    folder.snapshot(new, &rw()).unwrap();
}

fn files(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| name.to_string_lossy().starts_with("root.hds"))
        .count()
}

fn healthy(folder: &mut Folder) {
    let checked = folder.check(None, Repair::No, &mut |_, _| true).unwrap();
    assert!(checked.worst() <= Some(Severity::Note), "{checked:?}");
    assert!(checked.strangers.is_empty(), "{checked:?}");
}

#[test]
fn snapshots_hold_what_was_and_switching_goes_back() {
    let dir = scratch();
    let mut folder = create(dir.path(), &small(100)).unwrap();
    assert!(create(dir.path(), &small(100)).is_err());
    put(&folder, 0, 1);
    snap(&mut folder, id(1));
    put(&folder, 0, 2);
    put(&folder, 1, 2);
    snap(&mut folder, id(2));
    put(&folder, 1, 3);
    assert_eq!(now(&folder), [2, 3, 0, 0, 0]);
    assert_eq!(look(&folder, &at(id(1))), [1, 0, 0, 0, 0]);
    assert_eq!(look(&folder, &at(id(2))), [2, 2, 0, 0, 0]);
    folder.switch(id(1), &rw()).unwrap();
    assert_eq!(now(&folder), [1, 0, 0, 0, 0]);
    put(&folder, 2, 4);
    folder.delete(id(2), None, &rw(), &mut |_, _| true).unwrap();
    folder.delete(id(1), None, &rw(), &mut |_, _| true).unwrap();
    assert_eq!(now(&folder), [1, 0, 4, 0, 0]);
    assert_eq!(
        (files(dir.path()), folder.descriptor().images.len()),
        (1, 1)
    );
    healthy(&mut folder);
    drop(folder);
    assert_eq!(
        now(&Folder::view(&dir.path().join(FILE_NAME)).unwrap()),
        [1, 0, 4, 0, 0]
    );
}

#[test]
fn a_running_disk_is_snapshot_and_merged_under_its_writer() {
    let dir = scratch();
    let mut folder = create(dir.path(), &small(200)).unwrap();
    let disk = folder.open_disk(&rw()).unwrap().disk;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let cluster = round * 7 % 200;
                disk.write_at(&round.to_le_bytes(), cluster * CLUSTER)
                    .unwrap();
                round += 1;
            }
            round
        });
        for number in 1..20 {
            let new = NewSnapshot {
                id: id(number),
                running: Some(&disk),
                bitmap: BitmapChange::Keep,
                temporary: None,
            };
            folder.snapshot(new, &rw()).unwrap();
        }
        for number in 1..20 {
            folder
                .delete(id(number), Some(&disk), &rw(), &mut |_, _| true)
                .unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writer.join().unwrap()
    });
    for round in written.saturating_sub(200)..written {
        let mut bytes = [0; 8];
        disk.read_at(&mut bytes, round * 7 % 200 * CLUSTER).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), round);
    }
    disk.close().unwrap();
    assert_eq!(files(dir.path()), 1);
    healthy(&mut folder);
}

#[test]
fn a_merge_can_be_cut_off_and_is_finished_later() {
    for steps in [0, 1, 5, 99] {
        let dir = scratch();
        let mut folder = create(dir.path(), &small(100)).unwrap();
        put(&folder, 0, 1);
        snap(&mut folder, id(1));
        put(&folder, 1, 2);
        snap(&mut folder, id(2));
        put(&folder, 0, 3);
        put(&folder, 2, 3);
        for (victim, last) in [(id(1), 0), (id(2), 4)] {
            let mut left = steps;
            let cut = folder.delete(victim, None, &rw(), &mut |_, _| {
                left -= 1;
                left >= 0
            });
            assert!(cut.is_err());
            assert!(folder.open_disk(&at(victim)).is_err(), "it is half merged");
            assert_eq!(now(&folder), [3, 2, 3, last, 0]);
            if victim == id(1) {
                assert_eq!(look(&folder, &at(id(2))), [1, 2, 0, 0, 0]);
            }
            put(&folder, 3, 4);
            // Whatever comes next finishes it.
            snap(&mut folder, id(9));
            assert_eq!(now(&folder), [3, 2, 3, 4, 0]);
            folder.delete(id(9), None, &rw(), &mut |_, _| true).unwrap();
        }
        assert_eq!(now(&folder), [3, 2, 3, 4, 0]);
        assert_eq!(files(dir.path()), 1);
        healthy(&mut folder);
    }
}

/// What a kill at this moment leaves of a disk.
fn killed(dir: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(dir).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
    }
}

#[test]
fn a_merge_that_is_killed_is_finished_by_whatever_comes_next() {
    let dir = scratch();
    let (disk, path) = (dir.path().join("disk"), |name: String| {
        dir.path().join(name)
    });
    let mut folder = create(&disk, &small(20)).unwrap();
    put(&folder, 0, 1);
    snap(&mut folder, id(1));
    put(&folder, 1, 2);
    let mut moments = 0;
    let mut look_on = |_, _| {
        killed(&disk, &path(format!("{moments}")));
        moments += 1;
        true
    };
    folder.delete(id(1), None, &rw(), &mut look_on).unwrap();
    // Behind the rename and before the rest.
    killed(&disk, &path("late".to_owned()));
    let late = path("late".to_owned());
    let top = late.join("root.hds");
    let mut header = std::fs::read(&top).unwrap();
    header[44..48].copy_from_slice(&0x746F_6E59u32.to_le_bytes());
    std::fs::write(&top, header).unwrap();
    let merge = format!("{}\nroot.hds.gone\nwas closed\n", id(1));
    std::fs::write(late.join("DiskDescriptor.xml.merge"), merge).unwrap();
    let names = (0..moments).map(|moment| format!("{moment}"));
    for (round, name) in names.chain(["late".to_owned()]).enumerate() {
        let mut folder = Folder::open(&path(name.clone())).unwrap();
        match round % 3 {
            0 => put(&folder, 2, 3),
            1 => snap(&mut folder, id(9)),
            _ => folder.delete(id(1), None, &rw(), &mut |_, _| true).unwrap(),
        }
        let third = if round % 3 == 0 { 3 } else { 0 };
        assert_eq!(now(&folder), [1, 2, third, 0, 0], "{name}");
        let left = folder.delete(
            id(if round % 3 == 1 { 9 } else { 1 }),
            None,
            &rw(),
            &mut |_, _| true,
        );
        assert!(
            left.is_ok() || left.unwrap_err().missing_snapshot().is_some(),
            "{name}"
        );
        assert_eq!(now(&folder), [1, 2, third, 0, 0], "{name}");
        assert_eq!(files(&path(name)), 1);
        healthy(&mut folder);
    }
}

#[test]
fn many_disks_share_one_base() {
    let dir = scratch();
    let golden = dir.path().join("golden");
    let folder = create(&golden, &small(100)).unwrap();
    put(&folder, 0, 1);
    drop(folder);
    let mut clones: Vec<Folder> = ["a", "b", "c"]
        .iter()
        .map(|name| clone_disk(&golden, None, &dir.path().join(name)).unwrap())
        .collect();
    for (number, clone) in (5..).zip(&clones) {
        put(clone, 1, number);
    }
    for (number, clone) in (5..).zip(&mut clones) {
        assert_eq!(now(clone), [1, number, 0, 0, 0]);
        snap(clone, id(1));
        let shared = clone.descriptor().base().unwrap().guid;
        assert!(clone.delete(shared, None, &rw(), &mut |_, _| true).is_err());
        healthy(clone);
    }
    let mut sealed = Folder::open(&golden).unwrap();
    assert!(sealed.open_disk(&rw()).is_err());
    assert!(sealed.grow(1 << 30, None, &rw()).is_err());
    assert_eq!(now(&sealed), [1, 0, 0, 0, 0]);
}

#[test]
fn sizes_change_and_snapshots_keep_theirs() {
    let dir = scratch();
    let mut folder = create(dir.path(), &small(100)).unwrap();
    put(&folder, 4, 1);
    snap(&mut folder, id(1));
    let grown = folder.grow(20_000 * CLUSTER - 1, None, &rw()).unwrap();
    assert_eq!(grown, 20_000 * CLUSTER);
    put(&folder, 19_999, 7);
    assert!(
        folder.shrink(50 * CLUSTER, &rw()).is_err(),
        "it has a snapshot"
    );
    folder.delete(id(1), None, &rw(), &mut |_, _| true).unwrap();
    let disk = folder
        .open_disk(&OpenOptions::new(Access::ReadOnly))
        .unwrap()
        .disk;
    assert_eq!((get(&disk, 4), get(&disk, 19_999)), (1, 7));
    drop(disk);
    folder.shrink(50 * CLUSTER, &rw()).unwrap();
    assert_eq!(now(&folder), [0, 0, 0, 0, 1]);
    folder.grow(60 * CLUSTER, None, &rw()).unwrap();
    healthy(&mut folder);
}

#[test]
fn conversions_keep_every_snapshot() {
    let dir = scratch();
    let mut folder = create(dir.path(), &small(100)).unwrap();
    put(&folder, 0, 1);
    put(&folder, 3, 1);
    snap(&mut folder, id(1));
    put(&folder, 1, 2);
    let disk = folder.open_disk(&rw()).unwrap().disk;
    disk.write_zeroes(3 * CLUSTER, CLUSTER).unwrap();
    disk.close().unwrap();
    let target = |format, cluster, preallocation| Target {
        format,
        preallocation,
        cluster_bytes: Some(cluster),
    };
    let steps = [
        target(Format::Expanded, 256 << 10, Preallocation::None),
        target(Format::Expanded, 64 << 10, Preallocation::Full),
    ];
    for step in steps {
        folder.convert(step, &rw(), &mut |_, _| true).unwrap();
        assert_eq!(now(&folder), [1, 2, 0, 0, 0], "{step:?}");
        assert_eq!(look(&folder, &at(id(1))), [1, 0, 0, 1, 0], "{step:?}");
        healthy(&mut folder);
    }
    // A name has room for 255 bytes, and each conversion makes a new one.
    for step in steps.iter().cycle().take(10) {
        folder.convert(*step, &rw(), &mut |_, _| true).unwrap();
    }
    assert_eq!(now(&folder), [1, 2, 0, 0, 0]);
    let base = folder.descriptor().base().unwrap();
    let (stem, guid) = base.file.to_str().unwrap().rsplit_once('.').unwrap();
    assert!(stem == "root.hds" && guid.len() == 38, "{base:?}");
    let raw = target(Format::Raw, 64 << 10, Preallocation::None);
    assert!(folder.convert(raw, &rw(), &mut |_, _| true).is_err());
    folder.merge(None, None, &rw(), &mut |_, _| true).unwrap();
    let cut = folder.convert(raw, &rw(), &mut |done, _| done < 3);
    assert!(cut.is_err() && files(dir.path()) == 1);
    folder.convert(raw, &rw(), &mut |_, _| true).unwrap();
    assert_eq!(now(&folder), [1, 2, 0, 0, 0]);
    snap(&mut folder, id(1));
    put(&folder, 0, 9);
    folder.delete(id(1), None, &rw(), &mut |_, _| true).unwrap();
    assert_eq!(now(&folder), [9, 2, 0, 0, 0]);
}

#[test]
fn a_merge_into_a_new_file_leaves_the_old_ones_until_the_end() {
    let dir = scratch();
    let mut folder = create(dir.path(), &small(100)).unwrap();
    put(&folder, 0, 1);
    put(&folder, 1, 1);
    for number in 1..4 {
        snap(&mut folder, id(number));
        put(&folder, 1, number + 1);
    }
    folder
        .merge_into_new(Some(id(3)), "middle".into(), &rw(), &mut |_, _| true)
        .unwrap();
    assert_eq!(look(&folder, &at(id(3))), [1, 3, 0, 0, 0]);
    folder
        .merge_into_new(None, "top".into(), &rw(), &mut |_, _| true)
        .unwrap();
    assert_eq!(
        (now(&folder), look(&folder, &at(id(1)))),
        (vec![1, 4, 0, 0, 0], vec![1, 1, 0, 0, 0])
    );
    healthy(&mut folder);
}

#[test]
fn backups_are_a_chain_that_is_the_disk() {
    let dir = scratch();
    let mut folder = create(&dir.path().join("disk"), &small(100)).unwrap();
    let backup = |folder: &mut Folder, kind| {
        let mut out = Vec::new();
        let done = folder.backup(kind, None, &rw(), &mut out, &mut |_, _| true);
        done.map(|report| (report, out))
    };
    assert!(backup(&mut folder, Backup::Incremental).is_err());
    put(&folder, 0, 1);
    put(&folder, 1, 1);
    let (first, full) = backup(&mut folder, Backup::Full).unwrap();
    assert_eq!((first.clusters, first.bytes), (2, full.len() as u64));
    put(&folder, 1, 2);
    snap(&mut folder, id(1));
    put(&folder, 2, 2);
    let (second, delta) = backup(&mut folder, Backup::Incremental).unwrap();
    assert_eq!((second.clusters, second.since), (2, Some(first.next)));
    let (third, _) = backup(&mut folder, Backup::Incremental).unwrap();
    assert_eq!(third.clusters, 0);
    let back = dir.path().join("back");
    std::fs::create_dir(&back).unwrap();
    std::fs::write(back.join("root.hds"), full).unwrap();
    std::fs::write(back.join("delta"), delta).unwrap();
    let mut restored =
        restore_descriptor(&back, Path::new("root.hds"), Format::Expanded, None).unwrap();
    assert_eq!(now(&restored), [1, 1, 0, 0, 0]);
    let mut next = restored.descriptor().clone();
    next.add_snapshot(id(1), Path::new("delta")).unwrap();
    restored.store(next).unwrap();
    assert_eq!(now(&restored), [1, 2, 2, 0, 0]);
    healthy(&mut restored);
}

#[test]
fn a_backup_of_a_running_disk_is_one_moment() {
    let dir = scratch();
    let mut folder = create(&dir.path().join("disk"), &small(100)).unwrap();
    let disk = folder.open_disk(&rw()).unwrap().disk;
    disk.write_at(&[1; 3], 10).unwrap();
    let mut full = Vec::new();
    folder
        .backup(Backup::Full, Some(&disk), &rw(), &mut full, &mut |_, _| {
            disk.write_at(&[2; 3], 10).unwrap();
            true
        })
        .unwrap();
    assert_eq!(get(&disk, 0), 2);
    disk.write_at(&[3; 3], 4 * CLUSTER + 10).unwrap();
    let failed = folder.backup(
        Backup::Incremental,
        Some(&disk),
        &rw(),
        &mut Vec::new(),
        &mut |_, _| false,
    );
    assert!(failed.is_err());
    let mut delta = Vec::new();
    let report = folder
        .backup(
            Backup::Incremental,
            Some(&disk),
            &rw(),
            &mut delta,
            &mut |_, _| true,
        )
        .unwrap();
    assert_eq!(
        report.clusters, 2,
        "what was written during the first one, and after"
    );
    disk.close().unwrap();
    assert_eq!(files(&dir.path().join("disk")), 1);
    let back = dir.path().join("back");
    std::fs::create_dir(&back).unwrap();
    std::fs::write(back.join("root.hds"), full).unwrap();
    let restored =
        restore_descriptor(&back, Path::new("root.hds"), Format::Expanded, None).unwrap();
    assert_eq!(now(&restored), [1, 0, 0, 0, 0]);
    healthy(&mut folder);
}

#[test]
fn only_one_writer_gets_in() {
    let dir = scratch();
    let folder = create(dir.path(), &small(10)).unwrap();
    let disk = folder.open_disk(&rw()).unwrap().disk;
    let second = folder.open_disk(&rw());
    assert!(second.is_err_and(|error| error.exit_code() == 37));
    assert!(
        folder
            .open_disk(&OpenOptions::new(Access::ReadOnly))
            .is_ok()
    );
    drop(disk);
    let unclosed = folder.open_disk(&rw());
    assert!(unclosed.is_err_and(|error| error.exit_code() == 37));
    let options = OpenOptions {
        unclosed: Unclosed::Recover,
        ..rw()
    };
    let opened = folder.open_disk(&options).unwrap();
    assert_eq!(opened.notes.len(), 1);
    opened.disk.close().unwrap();
}
