//! A host that runs out of space in the middle of things: one clear sentence, and nothing is lost.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use crate::place::*;

/// Room of the host's file system in which the disk lies.
const ROOM: &str = "size=72m";
/// What is left while it is full: enough to begin with something.
const LEFT: usize = 5 * MIB;

/// A place whose disk lies on a small file system of its own.
struct Small {
    place: Place,
}

impl Small {
    fn new() -> Option<Small> {
        let small = Small {
            place: Place::new()?,
        };
        std::fs::create_dir(small.dir()).unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", ROOM, "none"])
            .arg(small.dir());
        assert!(mount.status().unwrap().success());
        Some(small)
    }

    fn dir(&self) -> PathBuf {
        self.place.path("small")
    }

    fn fill(&self) {
        let free = free_bytes(&self.dir());
        let filler = vec![7; usize::try_from(free).unwrap() - LEFT];
        std::fs::write(self.dir().join("filler"), filler).unwrap();
    }

    fn make_room(&self) {
        std::fs::remove_file(self.dir().join("filler")).unwrap();
    }

    fn files(&self) -> BTreeSet<PathBuf> {
        let list = |dir: PathBuf| {
            std::fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().path())
        };
        list(self.dir()).chain(list(self.dir().join("d"))).collect()
    }

    /// Runs a command that finds no room, which says so in one sentence and leaves no file.
    fn finds_no_room(&self, args: &[&str]) {
        let before = self.files();
        let said = self.place.ploop(args);
        assert_ne!(said.code, Some(0), "{args:?} found room");
        let lines: Vec<&str> = said.err.lines().collect();
        let is_clear = lines.first().is_some_and(|line| {
            line.starts_with("error: ") && line.contains("No space left on device")
        });
        assert!(is_clear && lines.len() <= 2, "{args:?}: {}", said.err);
        let kept = |path: &&PathBuf| !path.to_string_lossy().contains(".partial");
        let after: BTreeSet<PathBuf> = self.files();
        assert!(
            after.iter().filter(kept).eq(before.iter().filter(kept)),
            "{args:?}: {after:?}"
        );
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = self.place.ploop(&["umount", "small/d"]);
        let _ = Command::new("umount").arg(self.dir()).status();
    }
}

fn free_bytes(dir: &std::path::Path) -> u64 {
    let said = Command::new("stat")
        .args(["-f", "-c", "%a %S"])
        .arg(dir)
        .output()
        .unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    let (blocks, size) = said.trim().split_once(' ').unwrap();
    blocks.parse::<u64>().unwrap() * size.parse::<u64>().unwrap()
}

/// Writes through the device; false where that failed for want of space.
fn write(device: &str, seed: u64, at_mib: usize, len_mib: usize) -> bool {
    use std::io::Write;
    let (seek, bs) = (format!("seek={at_mib}"), "bs=1M");
    let mut dd = Command::new("dd");
    dd.args([
        &format!("of={device}"),
        &seek,
        bs,
        "oflag=direct",
        "conv=notrunc,fsync",
    ]);
    dd.args(["iflag=fullblock", "status=none"]);
    let mut dd = dd
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // It leaves early where it fails.
    let _ = dd
        .stdin
        .take()
        .unwrap()
        .write_all(&pattern(seed, len_mib * MIB));
    let said = dd.wait_with_output().unwrap();
    let text = String::from_utf8(said.stderr).unwrap();
    assert!(
        said.status.success() || text.contains("No space left on device"),
        "{text}"
    );
    said.status.success()
}

#[test]
fn a_full_host_loses_nothing_and_is_told_in_one_sentence() {
    let Some(small) = Small::new() else { return };
    let place = &small.place;
    place
        .ploop(&["init", "-s", "64M", "-b", "256K", "small/d"])
        .good();
    let device = place.ploop(&["mount", "small/d"]).good().out;
    let device = device.trim().to_owned();
    assert!(write(&device, 1, 0, 16));
    let id = place
        .ploop(&["snapshot", "small/d"])
        .good()
        .out
        .trim()
        .to_owned();
    assert!(write(&device, 2, 8, 16));
    let contents = |name: &str| {
        place
            .ploop(&["copy", "-s", "small/d", "-d", name, "--format", "raw"])
            .good();
        std::fs::read(place.path(name)).unwrap()
    };
    let before = contents("before");
    small.fill();
    // The disk is mounted: its server writes, merges, backs up.
    assert!(!write(&device, 3, 30, 16), "there was room");
    small.finds_no_room(&["snapshot-delete", "-u", &id, "small/d"]);
    small.finds_no_room(&["backup", "-o", "small/backup", "small/d"]);
    small.finds_no_room(&["copy", "-s", "small/d", "-d", "small/copy"]);
    let _ = std::fs::remove_file(small.dir().join("copy.partial"));
    let _ = std::fs::remove_file(small.dir().join("copy.partial.map"));
    let during = contents("during");
    assert!(during[..30 * MIB] == before[..30 * MIB]);
    // What was refused may have been written in part, and what was written is the new.
    let new = pattern(3, 16 * MIB);
    let mut pages = during[30 * MIB..46 * MIB]
        .chunks(4096)
        .zip(new.chunks(4096));
    assert!(pages.all(|(is, new)| is == new || is.iter().all(|byte| *byte == 0)));
    place.kill_worker_of("small/d");
    place.ploop(&["umount", "small/d"]).good();
    place.ploop(&["check", "small/d"]).good();
    // And closed.
    small.finds_no_room(&["snapshot-delete", "-u", &id, "small/d"]);
    small.finds_no_room(&["convert", "-b", "64K", "small/d"]);
    small.finds_no_room(&["init", "-s", "64M", "-f", "preallocated", "small/e"]);
    std::fs::write(
        small.dir().join("filler2"),
        vec![1; usize::try_from(free_bytes(&small.dir())).unwrap()],
    )
    .unwrap();
    small.finds_no_room(&["snapshot", "small/d"]);
    std::fs::remove_file(small.dir().join("filler2")).unwrap();
    assert!(contents("closed") == during);
    small.make_room();
    place
        .ploop(&["snapshot-delete", "-u", &id, "small/d"])
        .good();
    place.ploop(&["check", "small/d"]).good();
    assert!(contents("after") == during);
    let device = place.ploop(&["mount", "small/d"]).good().out;
    assert!(write(device.trim(), 4, 40, 8));
    place.ploop(&["umount", "small/d"]).good();
    place.ploop(&["check", "small/d"]).good();
}
