//! Disks in a mount namespace of their own, and snapshots beside the running disk.

use std::process::Command;

use crate::place::*;

/// Whether anything of a place is mounted in this namespace.
fn is_seen(place: &Place) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.contains(place.dir.path().to_str().unwrap())
}

fn loop_devices(place: &Place) -> usize {
    let backing = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path().join("loop/backing_file");
        std::fs::read_to_string(path).unwrap_or_default()
    };
    let dir = place.dir.path().to_str().unwrap().to_owned();
    let devices = std::fs::read_dir("/sys/block").unwrap().map(backing);
    devices.filter(|file| file.contains(&dir)).count()
}

#[test]
fn a_disk_is_mounted_used_and_unmounted_in_a_namespace_of_its_own() {
    let Some(place) = Place::new() else { return };
    let inside = |script: &str| {
        let script = script.replace("firn", env!("CARGO_BIN_EXE_firn"));
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-e", "-c", &script]);
        command.current_dir(place.dir.path());
        command.env("FIRN_PLOOP_RUN", place.path("run"));
        let said = command.output().unwrap();
        assert!(said.status.success(), "{script}: {said:?}");
    };
    inside(
        "firn ploop init -s 320M -t xfs d; firn ploop mount -m mnt d
         echo hello > mnt/file; firn ploop snapshot -F d; firn ploop compact d
         firn ploop umount mnt; ! test -e mnt/file; firn ploop mount -m mnt d
         test \"$(cat mnt/file)\" = hello; firn ploop umount d",
    );
    assert_eq!(
        (place.disks(), is_seen(&place), loop_devices(&place)),
        (0, false, 0)
    );
    // The namespace outlives its shell as long as the disk is served; the disk can be found from
    // outside, and everything that has to do with its mount happens inside.
    inside("firn ploop mount -m mnt d; echo again > mnt/file");
    assert!(!is_seen(&place) && !place.path("mnt/file").exists());
    place.ploop(&["resize", "-s", "512M", "d"]).good();
    place.ploop(&["compact", "d"]).good();
    let id = place.ploop(&["snapshot", "-F", "d"]).good().out;
    place.ploop(&["umount", "d"]).good();
    assert_eq!((place.disks(), loop_devices(&place)), (0, 0));
    place.ploop(&["check", "d"]).good();
    place.ploop(&["mount", "-F", "-m", "mnt", "d"]).good();
    std::fs::write(place.path("mnt/file"), "now").unwrap();
    let options = ["-o", "nouuid,norecovery", "-m", "mnt2", "d"];
    let mount = [&["snapshot-mount", "-u", id.trim()], &options[..]].concat();
    place.ploop(&mount).good();
    let then = std::fs::read_to_string(place.path("mnt2/file")).unwrap();
    assert_eq!(then.trim(), "again");
    assert!(std::fs::write(place.path("mnt2/file"), "x").is_err());
    place.ploop(&["umount", "mnt2"]).good();
    place.ploop(&["umount", "d"]).good();
}
