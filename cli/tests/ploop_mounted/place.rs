//! A directory for one disk and everything around it, and what the tests do in it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{Said, firn};

/// So long something that has to happen is waited for.
pub const LIMIT: Duration = Duration::from_secs(60);
/// A mebibyte.
pub const MIB: usize = 1 << 20;

/// A directory for one disk and everything around it.
pub struct Place {
    pub dir: tempfile::TempDir,
}

impl Place {
    /// None where the machine can't mount disks.
    pub fn new() -> Option<Place> {
        let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
        let has = |path: &str| OpenOptions::new().read(true).write(true).open(path).is_ok();
        if !is_root || !has("/dev/fuse") || !has("/dev/loop-control") {
            eprintln!("skipped: mounting a disk needs root, /dev/fuse and /dev/loop-control");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["mnt", "mnt2"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        Some(Place { dir })
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command of `firn ploop`, in the directory.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = firn(&["ploop"]);
        command.args(args).current_dir(self.dir.path());
        command.env("FIRN_PLOOP_RUN", self.path("run"));
        command
    }

    /// Runs one.
    pub fn ploop(&self, args: &[&str]) -> Said {
        Said::of(self.command(args).output().unwrap())
    }

    /// Runs one that succeeds and answers in JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        self.ploop(args).good().json()
    }

    /// The process that serves a disk.
    pub fn worker_of(&self, disk: &str) -> i32 {
        let pid = self.json(&["stat", "--json", disk])["worker"].clone();
        i32::try_from(pid.as_i64().unwrap()).unwrap()
    }

    /// Kills the worker of the disk `d` and returns when another one answers.
    pub fn kill_worker(&self) {
        self.kill_worker_of("d");
    }

    /// Kills the worker of a disk and returns when another one answers.
    pub fn kill_worker_of(&self, disk: &str) {
        let old = self.worker_of(disk);
        kill("-KILL", old);
        wait_until("another worker answers", || {
            let said = self.ploop(&["stat", "--json", disk]);
            said.code == Some(0) && said.json()["worker"] != old
        });
    }

    /// How many disks are served.
    pub fn disks(&self) -> usize {
        let list = self.json(&["list", "--json"]);
        list["disks"].as_array().unwrap().len()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // After a failure: nothing may stay mounted.
        for name in ["mnt2", "mnt"] {
            let quiet = |command: &mut Command| {
                command.stdout(Stdio::null()).stderr(Stdio::null()).status()
            };
            let _ = quiet(Command::new("umount").arg(self.path(name)));
        }
        let list = self.ploop(&["list", "--json"]);
        let list: Value = serde_json::from_str(&list.out).unwrap_or_default();
        for disk in list["disks"].as_array().into_iter().flatten() {
            let named = disk["device"].as_str().or(disk["disk"].as_str());
            let _ = self.ploop(&["umount", named.unwrap_or_default()]);
        }
    }
}

/// How much of something a test does: a small number unless the environment names another.
pub fn number(variable: &str, few: u64) -> u64 {
    let asked = std::env::var(variable).ok();
    asked.map_or(few, |text| text.parse().unwrap())
}

/// Sends a signal.
pub fn kill(signal: &str, pid: i32) {
    let status = Command::new("kill")
        .args([signal, &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// Returns when something is so.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LIMIT, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes that look like chance, the same for the same seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len.div_ceil(8))
        .flat_map(|_| next().to_le_bytes())
        .take(len)
        .collect()
}

/// Writes a file of a pattern for each seed, synced.
pub fn write_files(dir: &Path, seeds: std::ops::Range<u64>, len: usize) {
    for seed in seeds {
        let mut file = File::create(dir.join(seed.to_string())).unwrap();
        file.write_all(&pattern(seed, len)).unwrap();
        file.sync_all().unwrap();
    }
}

/// Holds such files against their patterns.
pub fn check_files(dir: &Path, seeds: std::ops::Range<u64>, len: usize) {
    for seed in seeds {
        let bytes = std::fs::read(dir.join(seed.to_string())).unwrap();
        assert!(
            bytes == pattern(seed, len),
            "file {seed} is not what was written"
        );
    }
}
