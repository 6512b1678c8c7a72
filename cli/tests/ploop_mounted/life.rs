//! A mounted disk's life: the death of its server, snapshots, growth, copies, other programs.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use firn_ploop::kernel::PageBuffer;

use crate::common::Said;
use crate::place::*;

#[test]
fn a_file_system_lives_through_the_death_of_its_server() {
    let Some(place) = Place::new() else { return };
    place
        .ploop(&["init", "-s", "256M", "-t", "ext4", "d"])
        .good();
    place.ploop(&["mount", "-m", "mnt", "d"]).good();
    let mnt = place.path("mnt");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_files(&mnt, 0..20, MIB));
        for _ in 0..4 {
            place.kill_worker();
        }
        writer.join().unwrap();
    });
    // Written and not synced by anybody; read back after the next mount.
    std::fs::write(mnt.join("late"), pattern(99, 3 * MIB)).unwrap();
    place.kill_worker();
    place.ploop(&["umount", "mnt"]).good();
    assert_eq!(place.disks(), 0);
    place.ploop(&["check", "d"]).good();
    place.ploop(&["mount", "-F", "-m", "mnt", "d"]).good();
    assert!(std::fs::read(mnt.join("late")).unwrap() == pattern(99, 3 * MIB));
    check_files(&mnt, 0..20, MIB);
    let late = std::fs::File::open(mnt.join("late")).unwrap();
    let said = place.ploop(&["umount", "d"]);
    let user = format!("used by process {} (", std::process::id());
    assert!(
        said.code == Some(22) && said.err.contains(&user),
        "{said:?}"
    );
    drop(late);
    // A plain umount(8) is enough.
    assert!(Command::new("umount").arg(&mnt).status().unwrap().success());
    wait_until("the server ends with its mount", || place.disks() == 0);
    place.ploop(&["check", "d"]).good();
}

#[test]
fn a_mounted_disk_is_known_as_one_and_its_base_is_shared() {
    let Some(place) = Place::new() else { return };
    place
        .ploop(&["init", "-s", "64M", "-t", "ext4", "gold"])
        .good();
    place.ploop(&["clone", "gold", "d"]).good();
    let refused = |args: &[&str], code: u8, word: &str| {
        let said = place.ploop(args);
        assert_eq!(said.code, Some(code.into()), "{args:?}: {}", said.err);
        let lines: Vec<&str> = said.err.lines().collect();
        assert!(
            lines[0].starts_with("error: ") && lines[0].contains(word),
            "{lines:?}"
        );
        assert!(
            lines.len() == 1 || lines[1].starts_with("hint: "),
            "{lines:?}"
        );
    };
    refused(&["mount", "gold"], 38, "build on it");
    let mounted = place.json(&["mount", "-m", "mnt", "--json", "d"]);
    refused(&["mount", "d"], 37, "mounted already");
    refused(&["check", "d"], 37, "in use");
    let image = place.json(&["info", "--json", "d"])["images"][1]["file"].clone();
    refused(&["check", image.as_str().unwrap()], 37, "in use");
    let info = place.json(&["info", "--json", "d"]);
    assert_eq!(info["device"], mounted["device"]);
    assert_eq!(info["notes"].as_array().unwrap().len(), 0, "{info}");
    for name in ["1", "2"] {
        write_files(&place.path("mnt"), 1..2, MIB);
        std::fs::rename(place.path("mnt/1"), place.path("mnt").join(name)).unwrap();
        place.ploop(&["snapshot", "d"]).good();
    }
    // Frozen by whatever stops the writers, it stays so.
    let freeze = |what: &str| {
        let mut command = Command::new("fsfreeze");
        let status = command.arg(what).arg(place.path("mnt")).status().unwrap();
        assert!(status.success(), "fsfreeze {what}");
    };
    let stop = format!("fsfreeze -f '{}'", place.path("mnt").display());
    let copied = place.ploop(&["copy", "-s", "d", "-F", &stop, "-d", "copy"]);
    freeze("-u");
    copied.good();
    // Down to what others build on, and no further.
    let merged = place.json(&["snapshot-merge", "-A", "--json", "d"]);
    assert_eq!(merged["merges"], 2);
    refused(&["snapshot-merge", "d"], 38, "belongs to another disk");
    place.ploop(&["umount", "d"]).good();
    place.ploop(&["snapshot", "d"]).good();
    let merged = place.json(&["snapshot-merge", "-A", "--json", "d"]);
    assert_eq!(merged["merges"], 1);
    place.ploop(&["check", "d"]).good();
    place.ploop(&["mount", "-F", "-m", "mnt", "d"]).good();
    assert!(std::fs::read(place.path("mnt/2")).unwrap() == pattern(1, MIB));
    place.ploop(&["umount", "d"]).good();
}

#[test]
fn snapshots_and_growth_happen_under_a_mounted_file_system() {
    let Some(place) = Place::new() else { return };
    place
        .ploop(&["init", "-s", "128M", "-t", "ext4", "d"])
        .good();
    place.ploop(&["mount", "-m", "mnt", "d"]).good();
    let (mnt, mnt2) = (place.path("mnt"), place.path("mnt2"));
    write_files(&mnt, 0..5, MIB);
    let id = place.ploop(&["snapshot", "-F", "d"]).good().out;
    let id = id.trim();
    write_files(&mnt, 5..8, MIB);
    std::fs::write(mnt.join("0"), b"changed").unwrap();
    place
        .ploop(&["mount", "-u", id, "-o", "noload", "-m", "mnt2", "d"])
        .good();
    check_files(&mnt2, 0..5, MIB);
    assert!(!mnt2.join("5").exists());
    place.ploop(&["umount", "mnt2"]).good();
    let supervisor = place.json(&["list", "--json"])["disks"][0]["supervisor"].clone();
    kill(
        "-TERM",
        i32::try_from(supervisor.as_i64().unwrap()).unwrap(),
    );
    wait_until("SIGTERM unmounts", || place.disks() == 0);
    place.ploop(&["check", "d"]).good();
    place.ploop(&["resize", "-s", "256M", "d"]).good();
    place.ploop(&["mount", "-m", "mnt", "d"]).good();
    write_files(&mnt, 100..170, MIB);
    place.kill_worker();
    place.ploop(&["snapshot-delete", "-u", id, "d"]).good();
    check_files(&mnt, 100..170, MIB);
    assert_eq!(std::fs::read(mnt.join("0")).unwrap(), b"changed");
    std::fs::remove_dir_all(mnt.join("lost+found")).unwrap();
    for seed in 100..170u64 {
        std::fs::remove_file(mnt.join(seed.to_string())).unwrap();
    }
    let compact = place.json(&["compact", "--json", "d"]);
    let bytes = |key: &str| compact[key].as_u64().unwrap();
    assert!(
        bytes("after_bytes") + (50 << 20) < bytes("before_bytes"),
        "{compact}"
    );
    place.ploop(&["umount", "d"]).good();
    place.ploop(&["resize", "-s", "64M", "d"]).good();
    place.ploop(&["check", "d"]).good();
    place.ploop(&["mount", "-F", "-m", "mnt", "d"]).good();
    check_files(&mnt, 1..8, MIB);
    place.ploop(&["umount", "d"]).good();
}

#[test]
fn other_file_systems_are_made_grown_and_compacted() {
    let Some(place) = Place::new() else { return };
    let mnt = place.path("mnt");
    for (fs, size, larger) in [("xfs", "320M", "400M"), ("btrfs", "256M", "320M")] {
        let args = ["init", "-s", size, "-t", fs, "-L", "firn", "-b", "256K", fs];
        place.ploop(&args).good();
        let mounted = place.json(&["mount", "-m", "mnt", "--json", fs]);
        assert_eq!(mounted["fs_type"], fs);
        write_files(&mnt, 0..20, MIB);
        place.ploop(&["resize", "-s", larger, fs]).good();
        write_files(&mnt, 20..30, MIB);
        for seed in 0..20u64 {
            std::fs::remove_file(mnt.join(seed.to_string())).unwrap();
        }
        // XFS gives the space of removed files back in the background.
        wait_until("a compaction finds what was removed", || {
            let compact = place.json(&["compact", "--json", fs]);
            let bytes = |key: &str| compact[key].as_u64().unwrap();
            bytes("after_bytes") < bytes("before_bytes")
        });
        place.ploop(&["umount", "-m", "mnt"]).good();
        place.ploop(&["check", fs]).good();
        place.ploop(&["mount", "-F", "-m", "mnt", fs]).good();
        check_files(&mnt, 20..30, MIB);
        let device = place.json(&["list", "--json"])["disks"][0]["device"].clone();
        place
            .ploop(&["umount", "-d", device.as_str().unwrap()])
            .good();
    }
}

/// The disk that is copied.
const DISK_MIB: usize = 64;
/// Bytes of a write, and writes in a second: 200 MB/s and some more, since a late one is not made up for at the end,
/// as far as the machine goes. One request at a time of 256 KiB is too slow for it beside a copy (156 to 211 MB/s).
const BLOCK: usize = 1 << 20;
const PER_SECOND: u64 = 250_000_000 / BLOCK as u64;

/// Writes to a device, past its cache, until a file appears; gives the bytes of a second.
fn write_until(device: &Path, stop: &Path) -> u64 {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(0o40000)
        .open(device)
        .unwrap();
    let mut block = PageBuffer::new(BLOCK).unwrap();
    block.copy_from_slice(&pattern(1, BLOCK));
    let blocks = DISK_MIB as u64 * MIB as u64 / BLOCK as u64;
    let begun = Instant::now();
    let mut seed = 0u64;
    while !stop.exists() {
        block[..8].copy_from_slice(&seed.to_le_bytes());
        block[BLOCK - 8..].copy_from_slice(&seed.to_le_bytes());
        let place = seed * 7919 % blocks;
        file.write_all_at(&block, place * BLOCK as u64).unwrap();
        seed += 1;
        let due = Duration::from_secs_f64(seed as f64 / PER_SECOND as f64);
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
    }
    seed * BLOCK as u64 * 1000 / u64::try_from(begun.elapsed().as_millis()).unwrap()
}

fn read_device(device: &Path, len: usize) -> Vec<u8> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(0o40000)
        .open(device)
        .unwrap();
    let mut bytes = PageBuffer::new(len).unwrap();
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes.to_vec()
}

#[test]
fn a_copy_under_a_writer_is_the_disk_at_the_freeze() {
    let Some(place) = Place::new() else { return };
    place.ploop(&["init", "-s", "64M", "d"]).good();
    let device = PathBuf::from(place.ploop(&["mount", "d"]).good().out.trim());
    let rounds = number("FIRN_PLOOP_COPIES", 2);
    let mut rates = Vec::new();
    for round in 0..rounds {
        let stop = place.path(&format!("stop{round}"));
        let stopped = place.path(&format!("stopped{round}"));
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let rate = write_until(&device, &stop);
                std::fs::write(&stopped, "").unwrap();
                rate / 1_000_000
            });
            let has_written = || {
                let counters = &place.json(&["stat", "--json", "d"])["counters"];
                counters["writes"].as_u64().unwrap() > 200 * (round + 1)
            };
            wait_until("the writer writes", has_written);
            let wait = format!(
                "touch '{}'; while [ ! -e '{}' ]; do sleep 0.01; done",
                stop.display(),
                stopped.display()
            );
            let file = format!("copy{round}");
            let args = ["copy", "-s", "d", "-F", &wait, "-d", &file];
            let copied = place.ploop(&[&args[..], &["--format", "raw", "--json"]].concat());
            std::fs::write(&stop, "").unwrap();
            let report = copied.good().json();
            assert!(!report["rounds"].as_array().unwrap().is_empty());
            rates.push(writer.join().unwrap());
        });
        let copy = std::fs::read(place.path(&format!("copy{round}"))).unwrap();
        assert!(
            copy == read_device(&device, DISK_MIB * MIB),
            "round {round}"
        );
        std::fs::remove_file(place.path(&format!("copy{round}"))).unwrap();
    }
    eprintln!("{rounds} copies of {rounds} equal the disk; MB/s written during each: {rates:?}");
    // Where a proof asks for a rate, it has to have been there in every round.
    let least = number("FIRN_PLOOP_LEAST_MB_S", 0);
    assert!(
        rates.iter().all(|rate| *rate >= least),
        "less than {least} MB/s: {rates:?}"
    );
    pipe_copy(&place);
    place.ploop(&["umount", "d"]).good();
    assert_eq!(place.disks(), 0);
}

/// The same through a pipe, packed; the receiver's image holds what the disk does.
fn pipe_copy(place: &Place) {
    let mut sender: Child = place
        .command(&["copy", "-s", "d", "--zstd", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stream = sender.stdout.take().unwrap();
    let received = place
        .command(&["copy", "-d", "piped.hds"])
        .stdin(stream)
        .output()
        .unwrap();
    assert!(sender.wait().unwrap().success());
    Said::of(received).good();
    place
        .ploop(&["copy", "-s", "d", "-d", "whole", "--format", "raw"])
        .good();
    std::fs::create_dir(place.path("p")).unwrap();
    std::fs::rename(place.path("piped.hds"), place.path("p/root.hds")).unwrap();
    place
        .ploop(&["restore-descriptor", "-f", "expanded", "p", "root.hds"])
        .good();
    place
        .ploop(&["copy", "-s", "p", "-d", "again", "--format", "raw"])
        .good();
    let read = |name: &str| std::fs::read(place.path(name)).unwrap();
    assert!(read("whole") == read("again"));
}

#[test]
fn other_programs_read_and_write_by_nbd() {
    let Some(place) = Place::new() else { return };
    let works = Command::new("qemu-img").arg("--version").output();
    if works.is_err() {
        eprintln!("skipped: there is no qemu-img");
        return;
    }
    place.ploop(&["init", "-s", "16M", "d"]).good();
    place.ploop(&["mount", "--without-device", "d"]).good();
    let mut server = place.command(&["nbd", "-w", "-s", "nbd.sock", "d"]);
    let mut server = server.stdout(Stdio::null()).spawn().unwrap();
    wait_until("the socket is there", || place.path("nbd.sock").exists());
    std::fs::write(place.path("raw"), pattern(5, 16 * MIB)).unwrap();
    let url = format!("nbd+unix:///?socket={}", place.path("nbd.sock").display());
    let qemu = |args: &[&str]| {
        let said = Command::new("qemu-img")
            .args(args)
            .current_dir(place.dir.path())
            .output();
        Said::of(said.unwrap()).good()
    };
    qemu(&["convert", "-n", "-f", "raw", "-O", "raw", "raw", &url]);
    qemu(&["compare", "-f", "raw", "-F", "raw", "raw", &url]);
    server.kill().unwrap();
    server.wait().unwrap();
    place.ploop(&["umount", "d"]).good();
    place.ploop(&["check", "d"]).good();
    qemu(&[
        "compare",
        "-f",
        "raw",
        "-F",
        "parallels",
        "raw",
        "d/root.hds",
    ]);
}
