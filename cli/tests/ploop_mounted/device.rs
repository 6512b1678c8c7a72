//! The kinds of device.

use crate::place::*;

#[test]
fn the_kind_of_device_can_be_chosen_and_is_told() {
    let Some(place) = Place::new() else { return };
    place.ploop(&["init", "-s", "16M", "d"]).good();
    let mounted = place.json(&["mount", "--json", "--device", "fuse", "d"]);
    assert_eq!(mounted["via"], "fuse+loop");
    let told = place.ploop(&["stat", "d"]).good().out;
    assert!(
        told.contains("\nerrors: 0\n") && told.contains("\nwrite_bytes: 0 B\n"),
        "{told}"
    );
    place.ploop(&["umount", "d"]).good();
    let mounted = place.json(&["mount", "--json", "d"]);
    assert!(["ublk", "nbd", "fuse+loop"].contains(&mounted["via"].as_str().unwrap()));
    place.ploop(&["umount", "d"]).good();
    let both = place.ploop(&["mount", "--without-device", "--device", "fuse", "d"]);
    assert_ne!(both.code, Some(0));
    assert_eq!(place.disks(), 0);
}

/// Whether this kernel makes devices of a kind. Where it does not, the command says so in one sentence.
fn has(place: &Place, kind: &str, named: &str) -> bool {
    place.ploop(&["init", "-s", "16M", "probe"]).good();
    let said = place.ploop(&["mount", "--device", kind, "probe"]);
    if said.code == Some(0) {
        place.ploop(&["umount", "probe"]).good();
        return true;
    }
    assert_eq!(said.code, Some(2));
    assert!(said.err.contains(named), "{}", said.err);
    eprintln!("skipped: {}", said.err);
    false
}

#[test]
fn an_nbd_device_lives_through_the_death_of_its_server() {
    let Some(place) = Place::new() else { return };
    if has(&place, "nbd", "NBD: the kernel offers no client") {
        lives_through_the_death_of_its_server(&place, "nbd");
    }
}

#[test]
fn a_ublk_device_lives_through_the_death_of_its_server() {
    let Some(place) = Place::new() else { return };
    if has(&place, "ublk", "there is no device: ublk: ") {
        lives_through_the_death_of_its_server(&place, "ublk");
    }
}

fn lives_through_the_death_of_its_server(place: &Place, kind: &str) {
    place
        .ploop(&["init", "-s", "128M", "-t", "ext4", "d"])
        .good();
    let mount = ["mount", "--device", kind, "-F", "-m", "mnt", "d"];
    place.ploop(&mount).good();
    let mnt = place.path("mnt");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_files(&mnt, 0..20, MIB));
        place.kill_worker();
        writer.join().unwrap();
    });
    place.ploop(&["umount", "mnt"]).good();
    assert_eq!(place.disks(), 0);
    place.ploop(&["check", "d"]).good();
    place.ploop(&mount).good();
    check_files(&mnt, 0..20, MIB);
    place.ploop(&["umount", "mnt"]).good();
}

/// The server of a disk is let go when its image is closed, before it has ended: the next one must not meet it.
#[test]
fn a_disk_is_mounted_again_at_once() {
    let Some(place) = Place::new() else { return };
    place
        .ploop(&["init", "-s", "32M", "-t", "ext4", "d"])
        .good();
    let note = place.path("mnt/note");
    for round in 0..12 {
        place.ploop(&["mount", "-m", "mnt", "d"]).good();
        let text = std::fs::read_to_string(&note).unwrap_or("0".to_owned());
        assert_eq!(text, round.to_string());
        std::fs::write(&note, (round + 1).to_string()).unwrap();
        if round % 3 == 0 {
            place.kill_worker();
        }
        place.ploop(&["umount", "d"]).good();
        assert_eq!(place.disks(), 0);
    }
    place.ploop(&["check", "d"]).good();
}
