//! Files by name and by descriptor: what std has no call for, or only by full path.
//!
//! Source: man 2 open, fstatat, readlinkat, getdents, lseek, mknod, statfs.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, StatxFlags};

use crate::{Errno, Result};

pub use libc::{
    O_ACCMODE, O_APPEND, O_ASYNC, O_CLOEXEC, O_CREAT, O_DIRECT, O_DIRECTORY, O_EXCL, O_NOCTTY,
    O_NOFOLLOW, O_NONBLOCK, O_PATH, O_RDONLY, O_RDWR, O_TMPFILE, O_TRUNC, O_WRONLY,
};
pub use libc::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK};

/// What stat tells about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stat {
    /// Device of the filesystem, as user space encodes it.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Number of names.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device that a device node stands for, as user space encodes it.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Allocated 512-byte blocks.
    pub blocks: u64,
    /// Last access: seconds and nanoseconds.
    pub atime: (i64, u32),
    /// Last change of content: seconds and nanoseconds.
    pub mtime: (i64, u32),
}

impl Stat {
    /// The `S_IF*` bits.
    pub fn file_type(&self) -> u32 {
        self.mode & S_IFMT
    }

    /// True if both tell about the same file.
    pub fn same_file(&self, other: &Stat) -> bool {
        (self.dev, self.ino) == (other.dev, other.ino)
    }

    /// Major and minor number of a device node.
    pub fn device(&self) -> (u32, u32) {
        (libc::major(self.rdev), libc::minor(self.rdev))
    }

    fn of(raw: &rustix::fs::Stat) -> Stat {
        Stat {
            dev: raw.st_dev,
            ino: raw.st_ino,
            mode: raw.st_mode,
            nlink: raw.st_nlink,
            uid: raw.st_uid,
            gid: raw.st_gid,
            rdev: raw.st_rdev,
            size: u64::try_from(raw.st_size).unwrap_or(0),
            blocks: u64::try_from(raw.st_blocks).unwrap_or(0),
            atime: (raw.st_atime, nanos(raw.st_atime_nsec)),
            mtime: (raw.st_mtime, nanos(raw.st_mtime_nsec)),
        }
    }
}

/// Major and minor number of a device as user space encodes it.
pub fn split_device(dev: u64) -> (u32, u32) {
    (libc::major(dev), libc::minor(dev))
}

fn nanos(raw: u64) -> u32 {
    u32::try_from(raw).unwrap_or(0)
}

/// Opens `path`; `flags` are `O_*`, close-on-exec is added.
///
/// # Errors
/// As man 2 open.
pub fn open(path: &Path, flags: u32) -> Result<OwnedFd> {
    Ok(rustix::fs::open(path, with_cloexec(flags), Mode::empty())?)
}

/// Opens a name in a directory; `flags` are `O_*`, close-on-exec is added.
///
/// # Errors
/// As man 2 openat.
pub fn open_at(dir: impl AsFd, name: &CStr, flags: u32) -> Result<OwnedFd> {
    let flags = with_cloexec(flags);
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

fn with_cloexec(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags) | OFlags::CLOEXEC
}

/// Creates a regular file that must not exist and opens it for reading and writing.
///
/// # Errors
/// EEXIST; as man 2 open.
pub fn create(path: &Path, mode: u32) -> Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path, flags, Mode::from_raw_mode(mode))?)
}

/// Makes a file without a name in a directory and opens it; `flags` are `O_*` with the access mode, which
/// must let it be written. It may be given a name later.
///
/// # Errors
/// EOPNOTSUPP where the filesystem has no such files. Source: man 2 open, O_TMPFILE (Linux 3.11).
pub fn create_nameless(dir: &Path, flags: u32, mode: u32) -> Result<OwnedFd> {
    let flags = with_cloexec(flags) | OFlags::TMPFILE;
    Ok(rustix::fs::open(dir, flags, Mode::from_raw_mode(mode))?)
}

/// Makes a fifo, a device node or a socket node; `mode` holds the type, `device` the number in the encoding of
/// [`Stat::rdev`].
///
/// # Errors
/// EEXIST, EPERM.
pub fn make_node(path: &Path, mode: u32, device: u64) -> Result<()> {
    let kind = FileType::from_raw_mode(mode);
    let mode = Mode::from_raw_mode(mode);
    Ok(rustix::fs::mknodat(
        rustix::fs::CWD,
        path,
        kind,
        mode,
        device,
    )?)
}

/// Gives an open file one more name.
///
/// # Errors
/// EEXIST; ENOENT for a file without any name that was not opened with O_TMPFILE; EXDEV.
/// Source: man 2 linkat, AT_EMPTY_PATH.
pub fn link_descriptor(fd: impl AsFd, path: &Path) -> Result<()> {
    Ok(rustix::fs::linkat(
        fd,
        c"",
        rustix::fs::CWD,
        path,
        AtFlags::EMPTY_PATH,
    )?)
}

/// Tells about the file behind a descriptor.
///
/// # Errors
/// EBADF.
pub fn stat(fd: impl AsFd) -> Result<Stat> {
    Ok(Stat::of(&rustix::fs::fstat(fd)?))
}

/// Tells about the file with that name, following links.
///
/// # Errors
/// As man 2 fstatat.
pub fn stat_at(dir: impl AsFd, name: &CStr) -> Result<Stat> {
    Ok(Stat::of(&rustix::fs::statat(dir, name, AtFlags::empty())?))
}

/// Tells about the file with that path, following links.
///
/// # Errors
/// As man 2 stat.
pub fn stat_path(path: &Path) -> Result<Stat> {
    Ok(Stat::of(&rustix::fs::stat(path)?))
}

/// Tells about the file with that path, itself where it is a link.
///
/// # Errors
/// As man 2 lstat.
pub fn lstat_path(path: &Path) -> Result<Stat> {
    Ok(Stat::of(&rustix::fs::lstat(path)?))
}

/// Tells about the file behind a descriptor, and the mount that it was opened through, as fdinfo has it (None before
/// Linux 5.8).
///
/// # Errors
/// EBADF. Source: man 2 statx, STATX_MNT_ID.
pub fn stat_with_mount(fd: impl AsFd) -> Result<(Stat, Option<u32>)> {
    statx(fd, c"", AtFlags::EMPTY_PATH)
}

/// The same of the file with that path, itself where it is a link.
///
/// # Errors
/// As man 2 lstat.
pub fn lstat_with_mount(path: &CStr) -> Result<(Stat, Option<u32>)> {
    statx(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW)
}

fn statx(dir: impl AsFd, name: &CStr, how: AtFlags) -> Result<(Stat, Option<u32>)> {
    let raw = rustix::fs::statx(dir, name, how, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)?;
    let told = StatxFlags::from_bits_retain(raw.stx_mask);
    let mount = told.contains(StatxFlags::MNT_ID).then_some(raw.stx_mnt_id);
    let stat = Stat {
        dev: libc::makedev(raw.stx_dev_major, raw.stx_dev_minor),
        ino: raw.stx_ino,
        mode: u32::from(raw.stx_mode),
        nlink: u64::from(raw.stx_nlink),
        uid: raw.stx_uid,
        gid: raw.stx_gid,
        rdev: libc::makedev(raw.stx_rdev_major, raw.stx_rdev_minor),
        size: raw.stx_size,
        blocks: raw.stx_blocks,
        atime: (raw.stx_atime.tv_sec, raw.stx_atime.tv_nsec),
        mtime: (raw.stx_mtime.tv_sec, raw.stx_mtime.tv_nsec),
    };
    Ok((stat, mount.and_then(|mount| u32::try_from(mount).ok())))
}

/// [`filesystem_type`] of an overlay.
pub const OVERLAYFS: u64 = 0x794c_7630;

/// [`filesystem_type`] of POSIX message queues.
pub const MQUEUE: u64 = 0x1980_0202;

/// The type of the filesystem that a path is on (`f_type` of statfs).
///
/// # Errors
/// As man 2 statfs.
pub fn filesystem_type(path: &Path) -> Result<u64> {
    Ok(rustix::fs::statfs(path)?.f_type.cast_unsigned())
}

/// [`filesystem_type`] of ext2, ext3 and ext4.
pub const EXT4: u64 = 0xef53;
/// [`filesystem_type`] of XFS.
pub const XFS: u64 = 0x5846_5342;
/// [`filesystem_type`] of btrfs.
pub const BTRFS: u64 = 0x9123_683e;
/// [`filesystem_type`] of a tmpfs.
pub const TMPFS: u64 = 0x0102_1994;

/// The type of the filesystem that an open file is on.
///
/// # Errors
/// As man 2 fstatfs.
pub fn filesystem_type_of(fd: impl AsFd) -> Result<u64> {
    Ok(rustix::fs::fstatfs(fd)?.f_type.cast_unsigned())
}

/// Reads where a link in a directory leads.
///
/// # Errors
/// ENOENT, EINVAL for something that is no link.
pub fn read_link_at(dir: impl AsFd, name: &CStr) -> Result<Vec<u8>> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
    let (text, _) = rustix::fs::readlinkat_raw(dir, name, &mut buffer)?;
    Ok(text.to_vec())
}

/// Lists the names of a directory that are numbers, such as the descriptors in /proc/PID/fd, ascending.
///
/// # Errors
/// ENOENT or ESRCH when the task is gone.
pub fn list_numbers(dir: impl AsFd) -> Result<Vec<i32>> {
    let mut buffer = vec![MaybeUninit::<u8>::uninit(); 32 << 10];
    let mut numbers = Vec::new();
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_bytes().to_owned();
        if let Some(number) = std::str::from_utf8(&name).ok().and_then(|n| n.parse().ok()) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads a small file of a directory, such as /proc/PID/fdinfo/N, into `buffer`, replacing what it held.
/// The file must give all it has to a read that has room for it, as files of one record do.
///
/// # Errors
/// As man 2 openat, read.
pub fn read_at(dir: impl AsFd, name: &CStr, buffer: &mut Vec<u8>) -> Result<()> {
    let fd = open_at(dir, name, 0)?;
    buffer.clear();
    loop {
        let old = buffer.len();
        buffer.resize(old + 1024, 0);
        let got = match rustix::io::read(&fd, &mut buffer[old..]) {
            Err(rustix::io::Errno::INTR) => {
                buffer.truncate(old);
                continue;
            }
            got => got?,
        };
        buffer.truncate(old + got);
        if got < 1024 {
            return Ok(());
        }
    }
}

/// The position in bytes from the beginning.
///
/// # Errors
/// ESPIPE, EBADF.
pub fn position(fd: impl AsFd) -> Result<u64> {
    Ok(rustix::fs::tell(fd)?)
}

/// Moves the position to `offset` bytes from the beginning.
///
/// # Errors
/// ESPIPE, EINVAL.
pub fn seek(fd: impl AsFd, offset: u64) -> Result<()> {
    rustix::fs::seek(fd, SeekFrom::Start(offset))?;
    Ok(())
}

/// Sets owner and group of a path itself.
///
/// # Errors
/// EPERM.
pub fn chown(path: &Path, uid: u32, gid: u32) -> Result<()> {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).map_err(Errno::from)
}

/// Sets the times of a path itself: seconds and nanoseconds.
///
/// # Errors
/// EPERM. Source: man 2 utimensat.
pub fn set_times(path: &Path, atime: (i64, u32), mtime: (i64, u32)) -> Result<()> {
    let spec = |(tv_sec, nanos): (i64, u32)| rustix::fs::Timespec {
        tv_sec,
        tv_nsec: i64::from(nanos),
    };
    let times = rustix::fs::Timestamps {
        last_access: spec(atime),
        last_modification: spec(mtime),
    };
    Ok(rustix::fs::utimensat(
        rustix::fs::CWD,
        path,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Reads an extended attribute of a path, following links.
///
/// # Errors
/// ENODATA, EOPNOTSUPP; ERANGE for values above 255 bytes.
pub fn xattr(path: &Path, name: &CStr) -> Result<Vec<u8>> {
    let mut value = vec![0u8; 255];
    let len = rustix::fs::getxattr(path, name, &mut value)?;
    value.truncate(len);
    Ok(value)
}

/// A device number in the kernel's encoding, major << 20 | minor, as images store devices of
/// filesystems.
pub fn kernel_device(dev: u64) -> u32 {
    (libc::major(dev) << 20) | libc::minor(dev)
}
