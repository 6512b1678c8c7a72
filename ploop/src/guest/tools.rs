//! The host's tools for file systems.

use std::path::Path;
use std::process::{Command, ExitStatus};

use super::{FsType, GuestError};

/// Lines of a tool's output that go into an error.
const LINES: usize = 4;

/// How a file system is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FormatOptions {
    /// Its label.
    pub label: Option<String>,
    /// Bytes of a block; None leaves it to the tool.
    pub block_bytes: Option<u32>,
    /// Write all tables at once instead of when they are needed.
    pub full: bool,
}

/// Makes a file system.
///
/// # Errors
/// There is no tool for it, or it failed.
pub fn format(device: &Path, fs: FsType, options: &FormatOptions) -> Result<(), GuestError> {
    let mut command = Command::new(format!("mkfs.{}", fs.name()));
    match fs {
        FsType::Ext4 => {
            command.args(["-q", "-F"]);
            let lazy = u8::from(!options.full);
            command.args([
                "-E",
                &format!("lazy_itable_init={lazy},lazy_journal_init={lazy}"),
            ]);
            command.args(options.block_bytes.map(|bytes| format!("-b{bytes}")));
        }
        FsType::Xfs => {
            command.args(["-q", "-f"]);
            command.args(options.block_bytes.map(|bytes| format!("-bsize={bytes}")));
        }
        FsType::Btrfs => {
            command.args(["-q", "-f"]);
            command.args(options.block_bytes.map(|bytes| format!("-s{bytes}")));
        }
    }
    if let Some(label) = &options.label {
        command.args(["-L", label]);
    }
    run(command.arg(device), package(fs.name()), 24, |status| {
        status.success()
    })
}

/// Checks a file system that is not mounted, and mends what can be mended without loss.
///
/// # Errors
/// There is no tool for it, or there is damage left.
pub fn check(device: &Path, fs_type: &str) -> Result<(), GuestError> {
    let mut command = match fs_type {
        "ext2" | "ext3" | "ext4" => {
            let mut command = Command::new("e2fsck");
            command.arg("-p");
            command
        }
        // XFS replays its log at mount; its repair tool refuses before that. Looking is all.
        "xfs" => {
            let mut command = Command::new("xfs_repair");
            command.arg("-n");
            command
        }
        "btrfs" => {
            let mut command = Command::new("btrfs");
            command.args(["check", "--readonly", "--force"]);
            command
        }
        other => {
            let mut command = Command::new("fsck");
            command.args(["-t", other, "-a"]);
            command
        }
    };
    let is_ext = fs_type.starts_with("ext");
    run(command.arg(device), package(fs_type), 41, |status| {
        // 1 of e2fsck: damage was mended.
        status.success() || is_ext && status.code() == Some(1)
    })
}

/// Lets a mounted file system fill its device, or so many bytes of it.
///
/// # Errors
/// There is no tool for it, or it failed.
pub fn grow_fs(
    device: &Path,
    mountpoint: &Path,
    fs_type: &str,
    len_bytes: Option<u64>,
) -> Result<(), GuestError> {
    let mut command = match fs_type {
        "ext2" | "ext3" | "ext4" => {
            let mut command = Command::new("resize2fs");
            command.arg(device);
            command.args(len_bytes.map(|len| format!("{}K", len / 1024)));
            command
        }
        "xfs" => {
            let mut command = Command::new("xfs_growfs");
            if let Some(len) = len_bytes {
                let block = rustix::fs::statvfs(mountpoint).map_or(4096, |stat| stat.f_bsize);
                command.args(["-D", &(len / block.max(512)).to_string()]);
            }
            command.arg(mountpoint);
            command
        }
        "btrfs" => {
            let mut command = Command::new("btrfs");
            let size = len_bytes.map_or("max".to_owned(), |len| len.to_string());
            command
                .args(["filesystem", "resize", &size])
                .arg(mountpoint);
            command
        }
        other => {
            return Err(GuestError::Refused {
                fs: other.to_owned(),
                what: "can't be grown: only ext4, xfs and btrfs can",
            });
        }
    };
    run(&mut command, package(fs_type), 26, |status| {
        status.success()
    })
}

/// Lets an ext file system that is not mounted fill its device.
///
/// # Errors
/// It is damaged, or the tool failed.
pub fn grow_unmounted_fs(device: &Path) -> Result<(), GuestError> {
    let mut fsck = Command::new("e2fsck");
    fsck.args(["-f", "-p"]).arg(device);
    run(&mut fsck, "e2fsprogs", 41, |status| {
        matches!(status.code(), Some(0 | 1))
    })?;
    let mut resize = Command::new("resize2fs");
    run(resize.arg(device), "e2fsprogs", 26, |status| {
        status.success()
    })
}

/// Makes a file system that is not mounted smaller.
///
/// # Errors
/// It is no ext file system, it holds more than that, or the tool failed.
pub fn shrink_fs(device: &Path, fs_type: &str, size_bytes: u64) -> Result<(), GuestError> {
    if !fs_type.starts_with("ext") {
        return Err(GuestError::Refused {
            fs: fs_type.to_owned(),
            what: "can't be made smaller: only ext4 can",
        });
    }
    let mut fsck = Command::new("e2fsck");
    fsck.args(["-f", "-p"]).arg(device);
    run(&mut fsck, "e2fsprogs", 41, |status| {
        matches!(status.code(), Some(0 | 1))
    })?;
    let mut resize = Command::new("resize2fs");
    resize.arg(device).arg(format!("{}K", size_bytes / 1024));
    run(&mut resize, "e2fsprogs", 26, |status| status.success())
}

fn package(fs_type: &str) -> &'static str {
    match fs_type {
        "xfs" => "xfsprogs",
        "btrfs" => "btrfs-progs",
        _ => "e2fsprogs",
    }
}

fn run(
    command: &mut Command,
    package: &'static str,
    code: u8,
    is_good: impl FnOnce(ExitStatus) -> bool,
) -> Result<(), GuestError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.env("LC_ALL", "C").output();
    let output = output.map_err(|source| GuestError::NoTool {
        program: program.clone(),
        package,
        source,
    })?;
    if is_good(output.status) {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<&str> = said
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let last = &lines[lines.len().saturating_sub(LINES)..];
    Err(GuestError::Tool {
        program,
        status: output.status.to_string(),
        message: last.join("; "),
        code,
    })
}
