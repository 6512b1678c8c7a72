//! Backups of a mounted disk, and the way back.

use crate::place::*;

/// The contents of a disk that is not mounted.
fn contents(place: &Place, disk: &str) -> Vec<u8> {
    place
        .ploop(&["copy", "-s", disk, "-d", "contents", "--format", "raw"])
        .good();
    let bytes = std::fs::read(place.path("contents")).unwrap();
    std::fs::remove_file(place.path("contents")).unwrap();
    bytes
}

#[test]
fn a_full_backup_and_three_incremental_ones_are_the_disk_again() {
    let Some(place) = Place::new() else { return };
    place
        .ploop(&["init", "-s", "96M", "-t", "ext4", "d"])
        .good();
    place.ploop(&["mount", "-m", "mnt", "d"]).good();
    let mnt = place.path("mnt");
    write_files(&mnt, 0..8, MIB);
    let full = place.json(&["backup", "-o", "full", "--json", "d"]);
    let mut last = full["next"].clone();
    for round in 1..4u64 {
        write_files(&mnt, 10 * round..10 * round + 3, MIB);
        std::fs::write(mnt.join("0"), round.to_string()).unwrap();
        if round == 2 {
            place.ploop(&["snapshot", "d"]).good();
        }
        if round == 3 {
            // The last one is of the closed disk, and so comparable.
            place.ploop(&["umount", "d"]).good();
        }
        let name = format!("delta{round}");
        let made = place.json(&["backup", "-i", "-o", &name, "--json", "d"]);
        assert_eq!(made["since"], last, "{made}");
        assert!(made["clusters"].as_u64().unwrap() < full["clusters"].as_u64().unwrap());
        last = made["next"].clone();
    }
    let whole = ["full", "delta1", "delta2", "delta3"];
    place
        .ploop(&[&["restore-backup"], &whole[..], &["back"]].concat())
        .good();
    assert!(contents(&place, "back") == contents(&place, "d"));
    place.ploop(&["check", "back"]).good();
    place.ploop(&["mount", "-F", "-m", "mnt", "back"]).good();
    check_files(&mnt, 30..33, MIB);
    assert_eq!(std::fs::read(mnt.join("0")).unwrap(), b"3");
    // What is changed on the restored disk follows the last backup.
    std::fs::write(mnt.join("0"), "4").unwrap();
    let more = place.json(&["backup", "-i", "-o", "delta4", "--json", "back"]);
    assert_eq!(more["since"], last, "{more}");
    place.ploop(&["umount", "back"]).good();
    for wrong in [
        &["delta1", "full", "x"][..],
        &["full", "delta2", "x"],
        &["full", "delta1", "delta1", "x"],
        &["full", "d/root.hds", "x"],
    ] {
        let said = place.ploop(&[&["restore-backup"], wrong].concat());
        assert_eq!(said.code, Some(38), "{wrong:?}: {}", said.err);
        assert!(!place.path("x").exists());
    }
}

#[test]
fn a_backup_that_is_killed_leaves_no_snapshot_for_long() {
    let Some(place) = Place::new() else { return };
    place.ploop(&["init", "-s", "64M", "d"]).good();
    let device = place.ploop(&["mount", "d"]).good().out;
    std::fs::write(device.trim(), pattern(1, 40 * MIB)).unwrap();
    // Nobody reads: the server has sent what the pipe holds and waits.
    let mut backup = place.command(&["backup", "-o", "-", "d"]);
    let mut backup = backup.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let images = || {
        let list = place.json(&["snapshot-list", "--json", "d"]);
        list["snapshots"].as_array().unwrap().len()
    };
    wait_until("the backup has its moment", || images() == 2);
    place.kill_worker();
    backup.kill().unwrap();
    backup.wait().unwrap();
    let kept = place.ploop(&["snapshot", "d"]).good().out;
    assert_eq!(images(), 2, "the moment is gone, the snapshot is there");
    place
        .ploop(&["snapshot-delete", "-u", kept.trim(), "d"])
        .good();
    place.ploop(&["umount", "d"]).good();
    place.ploop(&["check", "d"]).good();
}

#[test]
fn a_backup_goes_over_what_a_killed_one_left_and_over_nothing_else() {
    let Some(place) = Place::new() else { return };
    place.ploop(&["init", "-s", "64M", "d"]).good();
    let device = place.ploop(&["mount", "d"]).good().out;
    std::fs::write(device.trim(), pattern(1, 48 * MIB)).unwrap();
    let written = std::fs::File::open(device.trim()).unwrap().sync_all();
    written.unwrap();
    let partial = place.path("b.partial");
    // One that was done before it could be killed left nothing: another try.
    wait_until("a backup is killed in the middle", || {
        let _ = std::fs::remove_file(place.path("b"));
        let mut killed = place.command(&["backup", "-o", "b", "d"]).spawn().unwrap();
        while !partial.exists() && killed.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        let _ = killed.kill();
        killed.wait().unwrap();
        partial.exists()
    });
    place.ploop(&["backup", "-o", "b", "d"]).good();
    assert!(!partial.exists());
    let said = place.ploop(&["backup", "-o", "b", "d"]);
    assert_eq!(said.code, Some(38));
    assert!(said.err.contains("is not overwritten"), "{}", said.err);
    std::fs::write(place.path("c.partial"), "a letter").unwrap();
    let said = place.ploop(&["backup", "-o", "c", "d"]);
    assert_eq!(said.code, Some(38));
    assert!(said.err.contains("it is in the way"), "{}", said.err);
    place.ploop(&["umount", "d"]).good();
    place.ploop(&["restore-backup", "b", "back"]).good();
    assert!(contents(&place, "back") == contents(&place, "d"));
}
