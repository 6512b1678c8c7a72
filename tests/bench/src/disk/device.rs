//! The contestants: the same size of disk as a plain loop device, as ours, as QEMU's.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use firn_ploop::device::loopdev::{LoopDevice, LoopOptions, is_direct};
use firn_ploop::server::RUN_DIR_VARIABLE;

/// The firn binary, with a directory of its own for sockets and records.
pub struct Firn {
    /// The binary.
    pub program: PathBuf,
    /// Sockets and records.
    pub run_dir: PathBuf,
}

impl Firn {
    /// Runs `firn ploop ...`; gives what it printed.
    pub fn ploop(&self, words: &[&str]) -> Result<String> {
        let output = self.command(words).output()?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("firn ploop {words:?}: {}", errors.trim_end());
        }
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }

    /// Runs `firn ploop ...` and tells how long it took, in ms.
    pub fn timed(&self, words: &[&str]) -> Result<f64> {
        let begun = Instant::now();
        self.ploop(words)?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }

    /// The command, not yet run.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("ploop").args(words).stdin(Stdio::null());
        command.env(RUN_DIR_VARIABLE, &self.run_dir);
        command
    }
}

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file of the host, sparse, under a loop device.
    Plain,
    /// Our own, with clusters of so many KiB.
    Ours {
        /// The cluster.
        cluster_kib: u32,
    },
    /// QEMU's FUSE export of a parallels image, under a loop device.
    Qemu,
}

impl Kind {
    /// Column name.
    pub fn name(self) -> String {
        match self {
            Kind::Plain => "plain loop".to_owned(),
            Kind::Ours { cluster_kib } => format!("firn {cluster_kib} KiB"),
            Kind::Qemu => "qemu".to_owned(),
        }
    }

    /// Makes an empty disk in a new directory and a block device of it.
    pub fn attach<'a>(self, firn: &'a Firn, dir: &Path, size_mib: u64) -> Result<Attached<'a>> {
        std::fs::create_dir(dir)?;
        let dir = TrialDir(dir.to_owned());
        let file = dir.0.join("disk");
        let name = file.to_str().context("the directory is not UTF-8")?;
        let size = format!("{size_mib}M");
        let (device, user) = match self {
            Kind::Plain => {
                let backing = File::create_new(&file)?;
                backing.set_len(size_mib << 20)?;
                drop(backing);
                let device = loop_on(&file)?;
                (device.path().to_owned(), User::Loop(device))
            }
            Kind::Ours { cluster_kib } => {
                let cluster = format!("{cluster_kib}K");
                firn.ploop(&["init", "-s", &size, "-b", &cluster, name])?;
                let device = PathBuf::from(firn.ploop(&["mount", name])?);
                (device, User::Firn(firn, file))
            }
            Kind::Qemu => {
                run(
                    "qemu-img",
                    &["create", "-q", "-f", "parallels", name, &size],
                )?;
                let (daemon, export) = qemu_export(&dir.0, name)?;
                let device = loop_on(&export)?;
                (device.path().to_owned(), User::Qemu(device, daemon))
            }
        };
        Ok(Attached {
            device,
            user: Some(user),
            _dir: dir,
        })
    }
}

/// A loop device past the page cache, as ours is.
fn loop_on(file: &Path) -> Result<LoopDevice> {
    let backing = File::options().read(true).write(true).open(file)?;
    let options = LoopOptions {
        offset: 0,
        len_bytes: 0,
        read_only: false,
        direct_io: true,
        label: "firn-bench",
    };
    let device = LoopDevice::attach(&backing, &options)?;
    ensure!(
        is_direct(device.file())?,
        "{}: the host's file system has no direct I/O to compare with",
        file.display()
    );
    Ok(device)
}

fn run(program: &str, words: &[&str]) -> Result<()> {
    let status = Command::new(program)
        .args(words)
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(status.success(), "{program} {words:?} ended with {status}");
    Ok(())
}

/// Starts the daemon and waits for the file that it exports.
fn qemu_export(dir: &Path, image: &str) -> Result<(Daemon, PathBuf)> {
    let export = dir.join("export");
    File::create_new(&export)?;
    let file = format!("driver=file,node-name=f,filename={image},cache.direct=on,aio=io_uring");
    let fuse = format!(
        "type=fuse,id=e,node-name=d,writable=on,mountpoint={}",
        export.display()
    );
    let child = Command::new(QEMU)
        .args(["--blockdev", &file])
        .args(["--blockdev", "driver=parallels,node-name=d,file=f"])
        .args(["--export", &fuse])
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {QEMU}"))?;
    let mut daemon = Daemon(child);
    let begun = Instant::now();
    while std::fs::metadata(&export)?.len() == 0 {
        if let Some(status) = daemon.0.try_wait()? {
            bail!("{QEMU} ended with {status}");
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(10),
            "{QEMU} exports nothing in 10 s"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok((daemon, export))
}

/// The peer's program.
pub const QEMU: &str = "qemu-storage-daemon";

/// Whether the peer is installed.
pub fn has_qemu() -> bool {
    let probe = |program: &str| Command::new(program).arg("--version").output().is_ok();
    probe(QEMU) && probe("qemu-img")
}

/// A daemon that ends with this value.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // SIGTERM lets it take its mount down; a daemon that is gone needs nothing.
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ = crate::kernel::kill(pid, libc::SIGTERM);
        }
        let _ = self.0.wait();
    }
}

/// Who keeps the device.
enum User<'a> {
    Loop(#[expect(dead_code, reason = "goes with it")] LoopDevice),
    Firn(&'a Firn, PathBuf),
    // In this order: the device has the daemon's file open.
    Qemu(
        #[expect(dead_code, reason = "goes with it")] LoopDevice,
        #[expect(dead_code, reason = "goes with it")] Daemon,
    ),
}

/// A device that goes, with its files, when this is dropped.
pub struct Attached<'a> {
    /// The block device.
    pub device: PathBuf,
    user: Option<User<'a>>,
    _dir: TrialDir,
}

impl Attached<'_> {
    /// The directory of a disk of ours.
    pub fn ploop(&self) -> Option<&Path> {
        match &self.user {
            Some(User::Firn(_, disk)) => Some(disk),
            _ => None,
        }
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if let Some(User::Firn(firn, disk)) = &self.user
            && let Err(error) = firn.ploop(&["umount", &disk.to_string_lossy()])
        {
            eprintln!("{error:#}");
        }
        self.user = None;
    }
}

/// A directory that is removed with all it holds.
pub struct TrialDir(pub PathBuf);

impl Drop for TrialDir {
    fn drop(&mut self) {
        // A leftover shows at once: the next trial cannot make its directory.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
