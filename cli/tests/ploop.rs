//! `firn ploop` as its users call it: forms, JSON, exit statuses.

mod common;

use common::{Said, firn, run};
use serde_json::Value;

struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new(args: &[&str]) -> Disk {
        let disk = Disk {
            dir: tempfile::tempdir().unwrap(),
        };
        let path = disk.path("disk");
        run(&[&["ploop", "init"], args, &[&path]].concat()).good();
        disk
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// A command on the descriptor.
    fn call(&self, args: &[&str]) -> Said {
        let xml = self.path("disk/DiskDescriptor.xml");
        run(&[&["ploop"], args, &[&xml]].concat())
    }

    fn json(&self, args: &[&str]) -> Value {
        self.call(&[args, &["--json"]].concat()).good().json()
    }
}

#[test]
fn snapshots_are_made_listed_and_deleted() {
    let disk = Disk::new(&["-s", "100M"]);
    let id = disk.call(&["snapshot"]).good().out.trim().to_owned();
    assert_eq!((id.len(), &id[..1]), (38, "{"));
    let list = disk
        .call(&["snapshot-list", "-H", "-o", "uuid", "-s"])
        .good();
    assert_eq!(list.out.trim(), id);
    let list = disk.json(&["snapshot-list"]);
    assert_eq!(list["snapshots"].as_array().unwrap().len(), 2);
    assert_eq!(list["snapshots"][1]["parent_uuid"], id);
    disk.call(&["snapshot-switch", "-u", &id]).good();
    let second = disk.json(&["snapshot"])["uuid"]
        .as_str()
        .unwrap()
        .to_owned();
    disk.call(&["snapshot-delete", "-u", &id]).good();
    disk.call(&["snapshot-merge"]).good();
    assert_eq!(disk.json(&["info"])["snapshots"], 0);
    let gone = disk.call(&["snapshot-delete", "-u", &second, "--json"]);
    assert_eq!(
        (gone.code, gone.json()["error"]["class"].as_str()),
        (Some(43), Some("usage"))
    );
    assert_eq!(disk.call(&["snapshot", "-u", "nonsense"]).code, Some(2));
}

#[test]
fn disks_are_resized_converted_and_cloned() {
    let disk = Disk::new(&["-s", "20M", "-b", "64K", "-f", "preallocated"]);
    assert_eq!(disk.json(&["resize", "-s", "30M"])["new_bytes"], 30 << 20);
    assert_eq!(disk.call(&["resize", "-s", "10M"]).code, Some(2));
    disk.call(&["resize", "-s", "25M", "--image-only"]).good();
    for format in ["raw", "qcow2", "expanded"] {
        let done = disk.json(&["convert", "-f", format]);
        assert_eq!(done["format"], format);
    }
    let spec = disk.call(&["info", "-s"]).good().out;
    assert!(spec.contains("51200") && spec.contains("128"), "{spec}");
    let clone = disk.path("clone");
    run(&["ploop", "clone", &disk.path("disk"), &clone]).good();
    run(&["ploop", "snapshot", &clone]).good();
    assert_eq!(disk.call(&["snapshot"]).code, Some(38), "it is sealed");
}

#[test]
fn checks_and_backups_tell_what_they_found_and_made() {
    let disk = Disk::new(&["-s", "20M"]);
    assert_eq!(disk.json(&["check"])["whole"], true);
    let file = disk.path("disk/root.hds");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[64] = 9;
    bytes.extend([0; 1000]);
    std::fs::write(&file, bytes).unwrap();
    let found = disk.call(&["check", "--json"]);
    assert_eq!(
        (found.code, &found.json()["whole"]),
        (Some(1), &Value::Bool(false))
    );
    assert_eq!(disk.call(&["snapshot"]).code, Some(11));
    assert_eq!(
        disk.json(&["check", "--repair"])["images"][0]["lost_clusters"][0],
        0
    );
    let full = disk.path("full");
    disk.call(&["backup", "-o", &full]).good();
    assert_eq!(
        disk.call(&["backup", "-o", &full]).code,
        Some(38),
        "it is there already"
    );
    let made = disk.json(&["backup", "-i", "-o", &disk.path("next")]);
    assert_eq!(made["clusters"], 0);
    run(&["ploop", "check", &full]).good();
    let xml = disk.path("disk");
    let piped = firn(&["ploop", "backup", "-o", "-", &xml])
        .output()
        .unwrap();
    assert!(piped.status.success() && piped.stdout.starts_with(b"WithouFreSpacExt"));
}

#[test]
fn what_is_asked_wrongly_is_told_with_its_exit_status() {
    let disk = Disk::new(&["-s", "20M"]);
    let told = |args: &[&str], code: u8, word: &str| {
        let said = run(&[&["ploop"], args].concat());
        assert_eq!(said.code, Some(code.into()), "{args:?}: {}", said.err);
        assert!(
            said.err.starts_with("error: ") && said.err.contains(word),
            "{}",
            said.err
        );
    };
    let (xml, image) = (disk.path("disk"), disk.path("disk/root.hds"));
    told(&["init", "-s", "0", &disk.path("new")], 38, "without size");
    assert!(!std::path::Path::new(&disk.path("new")).exists());
    told(&["resize", "-s", "1G", &image], 39, "DiskDescriptor.xml");
    let notes = disk.path("notes");
    std::fs::write(&notes, "not a disk").unwrap();
    told(&["mount", &notes], 2, "-f raw");
    told(&["mount", "-f", "raw", &image], 2, "expanded, not raw");
    told(&["mount", &disk.path("gone")], 4, "gone");
    let id = disk.call(&["snapshot"]).good().out;
    told(&["snapshot", "-u", id.trim(), &xml], 38, "already");
    // A name without a directory is one in the current directory.
    let mut export = firn(&["ploop", "convert", "-f", "raw", "-o", "flat", &xml]);
    let export = export.current_dir(disk.dir.path()).output().unwrap();
    assert!(export.status.success(), "{export:?}");
    assert_eq!(
        std::fs::metadata(disk.path("flat")).unwrap().len(),
        20 << 20
    );
}

#[test]
fn a_disk_of_version_1_says_so_and_is_converted() {
    let disk = Disk::new(&["-s", "20M", "-b", "64K", "-f", "preallocated"]);
    let file = disk.path("disk/root.hds");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[..16].copy_from_slice(b"WithoutFreeSpace");
    for entry in bytes[64..64 + 320 * 4].as_chunks_mut::<4>().0 {
        *entry = (u32::from_le_bytes(*entry) * 128).to_le_bytes();
    }
    bytes[(64 << 10) + 5] = 9;
    std::fs::write(&file, bytes).unwrap();
    assert_eq!(disk.json(&["info"])["fmt_version"], 1);
    assert!(
        disk.call(&["info", "-s"])
            .good()
            .out
            .contains("fmt_version:\t1")
    );
    disk.call(&["check"]).good();
    assert_eq!(
        disk.call(&["snapshot"]).code,
        Some(38),
        "version 1 is only read"
    );
    // An image that came alone gets a descriptor first, or it could not be converted.
    let xml = disk.path("disk/DiskDescriptor.xml");
    std::fs::remove_file(&xml).unwrap();
    let dir = disk.path("disk");
    run(&[
        "ploop",
        "restore-descriptor",
        "-f",
        "expanded",
        &dir,
        "root.hds",
    ])
    .good();
    disk.call(&["convert", "-v", "2"]).good();
    assert_eq!(disk.json(&["info"])["fmt_version"], 2);
    disk.call(&["snapshot"]).good();
    disk.call(&["convert", "-f", "raw", "-o", &disk.path("flat")])
        .good();
    assert_eq!(std::fs::read(disk.path("flat")).unwrap()[5], 9);
}

#[test]
fn an_image_that_is_a_pipe_is_not_waited_for() {
    let disk = Disk::new(&["-s", "16M"]);
    let image = disk.path("disk/root.hds");
    std::fs::remove_file(&image).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&image).status();
    assert!(made.unwrap().success());
    let refuses = |said: Said| {
        assert_ne!(said.code, Some(0));
        let what = "neither a file nor a block device";
        assert!(said.err.contains(what), "{}", said.err);
    };
    for command in ["info", "check", "snapshot"] {
        refuses(disk.call(&[command]));
    }
    std::fs::rename(&image, disk.path("disk/DiskDescriptor.xml")).unwrap();
    refuses(disk.call(&["snapshot-list"]));
}

/// A user without rights, with the program where he can reach it.
struct Nobody {
    dir: tempfile::TempDir,
}

impl Nobody {
    const ID: u32 = 65534;

    /// None where this user can't become another one.
    fn new() -> Option<Nobody> {
        if firn_sys::task::effective_uid() != 0 {
            eprintln!("skipped: only root can become a user without rights");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_firn"), dir.path().join("firn")).unwrap();
        for name in ["own", "own/run", "run", "mnt"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        for name in ["own", "own/run"] {
            std::os::unix::fs::chown(dir.path().join(name), Some(Self::ID), Some(Self::ID))
                .unwrap();
        }
        let closed = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(dir.path().join("run"), closed).unwrap();
        Some(Nobody { dir })
    }

    /// A command in the directory, with a registry.
    fn call(&self, run_dir: &str, args: &str) -> Said {
        let mut command = std::process::Command::new("setpriv");
        let id = Self::ID;
        command.args([&format!("--reuid={id}"), &format!("--regid={id}")]);
        command.args(["--clear-groups", "./firn", "ploop"]);
        command.args(args.split(' ')).current_dir(self.dir.path());
        command
            .env("FIRN_PLOOP_RUN", run_dir)
            .stdin(std::process::Stdio::null());
        Said::of(command.output().unwrap())
    }

    fn refused(&self, run_dir: &str, args: &str, hint: &str) {
        let said = self.call(run_dir, args);
        assert!(!matches!(said.code, Some(0) | None), "{args}: {said:?}");
        let lines: Vec<&str> = said.err.lines().collect();
        assert_eq!(lines.len(), 2, "{args}: {lines:?}");
        assert!(lines[0].starts_with("error: "), "{args}: {lines:?}");
        assert!(lines[1].starts_with("hint: ") && lines[1].contains("sudo"));
        assert!(lines[1].contains(hint), "{args}: {lines:?}");
    }
}

#[test]
fn users_are_told_which_rights_they_lack() {
    let Some(nobody) = Nobody::new() else { return };
    let disk = nobody.dir.path().join("d");
    run(&["ploop", "init", "-s", "16M", disk.to_str().unwrap()]).good();
    let id = run(&["ploop", "snapshot", disk.to_str().unwrap()]).good();
    let id = id.out.trim();
    for args in [
        "mount d",
        "mount -m mnt d",
        "mount --without-device d",
        &format!("snapshot-mount -u {id} d"),
        "compact d",
    ] {
        nobody.refused("run", args, "--without-device");
    }
    for args in ["umount d", "umount mnt", "stat d", "list", "nbd -s s d"] {
        nobody.refused("run", args, "only root sees");
    }
    for args in ["mount d", "mount -m mnt d", "compact d"] {
        nobody.refused("own/run", args, "CAP_SYS_ADMIN");
    }
    for args in [
        "init -s 1M new",
        "snapshot d",
        &format!("snapshot-switch -u {id} d"),
        &format!("snapshot-delete -u {id} d"),
        "resize -s 32M d",
        "merge d",
        "check d",
        "convert -f raw d",
        "clone d new",
        "backup -o own/backup d",
        "copy -s d -d copied",
        "restore-descriptor -f expanded mnt ../d/root.hds",
        "ping run",
        "mount --without-device d",
    ] {
        nobody.refused("own/run", args, "owner");
    }
    // What takes no rights is his.
    nobody.call("own/run", "init -s 16M own/d").good();
    let mounted = nobody.call("own/run", "mount --without-device own/d");
    let copied = nobody.call("own/run", "copy -s own/d -d own/copied");
    let unmounted = nobody.call("own/run", "umount own/d");
    mounted.good();
    copied.good();
    unmounted.good();
}
