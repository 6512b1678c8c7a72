//! The kinds of device.

use crate::place::*;

#[test]
fn the_kind_of_device_can_be_chosen_and_is_told() {
    let Some(place) = Place::new() else { return };
    place.ploop(&["init", "-s", "16M", "d"]).good();
    let mounted = place.json(&["mount", "--json", "--device", "fuse", "d"]);
    assert_eq!(mounted["via"], "fuse+loop");
    place.ploop(&["umount", "d"]).good();
    let mounted = place.json(&["mount", "--json", "d"]);
    assert!(["nbd", "fuse+loop"].contains(&mounted["via"].as_str().unwrap()));
    place.ploop(&["umount", "d"]).good();
    let both = place.ploop(&["mount", "--without-device", "--device", "fuse", "d"]);
    assert_ne!(both.code, Some(0));
    assert_eq!(place.disks(), 0);
}

/// Whether this kernel makes devices by NBD. Where it does not, the command says so in one sentence.
fn has_nbd(place: &Place) -> bool {
    place.ploop(&["init", "-s", "16M", "probe"]).good();
    let said = place.ploop(&["mount", "--device", "nbd", "probe"]);
    if said.code == Some(0) {
        place.ploop(&["umount", "probe"]).good();
        return true;
    }
    assert_eq!(said.code, Some(2));
    assert!(
        said.err.contains("NBD: the kernel offers no client"),
        "{}",
        said.err
    );
    eprintln!("skipped: {}", said.err);
    false
}

#[test]
fn an_nbd_device_lives_through_the_death_of_its_server() {
    let Some(place) = Place::new() else { return };
    if !has_nbd(&place) {
        return;
    }
    place
        .ploop(&["init", "-s", "128M", "-t", "ext4", "d"])
        .good();
    place
        .ploop(&["mount", "--device", "nbd", "-m", "mnt", "d"])
        .good();
    let mnt = place.path("mnt");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_files(&mnt, 0..20, MIB));
        place.kill_worker();
        writer.join().unwrap();
    });
    place.ploop(&["resize", "-s", "256M", "d"]).good();
    place.ploop(&["umount", "mnt"]).good();
    assert_eq!(place.disks(), 0);
    place.ploop(&["check", "d"]).good();
    place
        .ploop(&["mount", "--device", "nbd", "-F", "-m", "mnt", "d"])
        .good();
    check_files(&mnt, 0..20, MIB);
    place.ploop(&["umount", "mnt"]).good();
}
