//! Snapshots of a running disk, mounted beside it.

use std::process::Command;

use crate::place::*;

/// A snapshot that nobody froze the file system for is what a loss of power leaves: its journal has to be
/// played back before it can be read, and neither the snapshot nor the disk may change by that.
fn is_read_beside_the_disk(fs_type: &str, size: &str) {
    let Some(place) = Place::new() else { return };
    let made = place.ploop(&["init", "-s", size, "-t", fs_type, "d"]);
    if made.err.contains("install") {
        eprintln!("skipped: {}", made.err);
        return;
    }
    made.good();
    place.ploop(&["mount", "-m", "mnt", "d"]).good();
    let (mnt, beside) = (place.path("mnt"), place.path("mnt2"));
    // Synced, so that it has to be there; where it is stands in the journal only.
    write_files(&mnt, 0..5, MIB);
    let id = place.ploop(&["snapshot", "d"]).good().out;
    write_files(&mnt, 5..8, MIB);
    let top = place.json(&["snapshot-list", "--json", "d"])["snapshots"][0]["fname"].clone();
    let image = || std::fs::read(top.as_str().unwrap()).unwrap();
    let before = image();
    let mount = ["snapshot-mount", "-u", id.trim(), "-m", "mnt2", "d"];
    let mounted = place
        .ploop(&[&mount[..], &["--json"]].concat())
        .good()
        .json();
    check_files(&beside, 0..5, MIB);
    assert!(!beside.join("5").exists());
    assert!(std::fs::write(beside.join("6"), "x").is_err());
    let device = mounted["device"].as_str().unwrap();
    // What was played back outlives the server.
    place.kill_worker_of(device);
    drop_caches_of(&beside);
    check_files(&beside, 0..5, MIB);
    assert!(image() == before);
    place.ploop(&["umount", "mnt2"]).good();
    check_files(&mnt, 0..8, MIB);
    place.ploop(&["umount", "d"]).good();
    place.ploop(&["check", "d"]).good();
    // The same way: a disk that was never unmounted, as a backup of a running one is.
    place.ploop(&["mount", "-r", "-m", "mnt", "d"]).good();
    check_files(&mnt, 0..8, MIB);
    place.ploop(&["umount", "mnt"]).good();
}

/// Has a file's pages read from the device again.
fn drop_caches_of(dir: &std::path::Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let mut dd = Command::new("dd");
            dd.arg(format!("if={}", path.display()));
            dd.args(["of=/dev/null", "iflag=nocache", "count=0", "status=none"]);
            assert!(dd.status().unwrap().success());
        }
    }
}

#[test]
fn a_snapshot_of_a_running_ext4_is_read_beside_it() {
    is_read_beside_the_disk("ext4", "128M");
}

#[test]
fn a_snapshot_of_a_running_xfs_is_read_beside_it() {
    is_read_beside_the_disk("xfs", "320M");
}

#[test]
fn a_snapshot_of_a_running_btrfs_is_read_beside_it() {
    is_read_beside_the_disk("btrfs", "256M");
}
