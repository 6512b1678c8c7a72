//! A loop device on a file: the block device that file systems are mounted from.
//!
//! Direct I/O, so that only the file system on the disk caches; and auto-clear, so that the device
//! is free again with its last user, however that user ended.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use crate::kernel;

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Other programs take free devices too; somebody gets one after this many tries.
const TRIES: u32 = 64;

/// State of a loop device, as the kernel lays it out.
///
/// Source: linux include/uapi/linux/loop.h, struct loop_info64
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// Everything that makes a loop device, in one call.
///
/// Source: linux include/uapi/linux/loop.h, struct loop_config (linux 5.8)
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo>() == 232);
const _: () = assert!(size_of::<LoopConfig>() == 304);

impl LoopInfo {
    const EMPTY: LoopInfo = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// How a loop device is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopOptions<'a> {
    /// First byte of the file that the device shows.
    pub offset: u64,
    /// Bytes that it shows; 0 is all that follow.
    pub len_bytes: u64,
    /// No writes.
    pub read_only: bool,
    /// Past the page cache of the file.
    pub direct_io: bool,
    /// What `losetup` prints as the file.
    pub label: &'a str,
}

/// An attached loop device, held open.
#[derive(Debug)]
pub struct LoopDevice {
    file: File,
    path: PathBuf,
}

impl LoopDevice {
    /// Attaches a free device to a file. The device is cleared with its last user, who is at first
    /// the value returned.
    ///
    /// # Errors
    /// There is no free device and none can be added, or the kernel refused the file.
    pub fn attach(backing: &File, options: &LoopOptions<'_>) -> io::Result<LoopDevice> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")?;
        for _ in 0..TRIES {
            let number = kernel::ioctl_number(control.as_fd(), LOOP_CTL_GET_FREE, 0)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            match configure(&file, backing, options) {
                Ok(()) => return Ok(LoopDevice { file, path }),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(error),
            }
        }
        let message = format!("{TRIES} free loop devices were taken by others");
        Err(io::Error::new(io::ErrorKind::ResourceBusy, message))
    }

    /// The device node.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open device, without its name.
    pub fn into_file(self) -> File {
        self.file
    }

    /// The open device.
    pub fn file(&self) -> &File {
        &self.file
    }
}

fn configure(device: &File, backing: &File, options: &LoopOptions<'_>) -> io::Result<()> {
    let fd = u32::try_from(backing.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut info = LoopInfo {
        offset: options.offset,
        size_limit: options.len_bytes,
        flags: LO_FLAGS_AUTOCLEAR,
        ..LoopInfo::EMPTY
    };
    if options.read_only {
        info.flags |= LO_FLAGS_READ_ONLY;
    }
    if options.direct_io {
        info.flags |= LO_FLAGS_DIRECT_IO;
    }
    let label = options.label.as_bytes();
    let label = &label[label.len().saturating_sub(63)..];
    info.file_name[..label.len()].copy_from_slice(label);
    let mut config = LoopConfig {
        fd,
        block_size: 512,
        info,
        reserved: [0; 8],
    };
    set(device, &mut config)
}

#[allow(unsafe_code)]
fn set(device: &File, config: &mut LoopConfig) -> io::Result<()> {
    // SAFETY: LOOP_CONFIGURE reads a struct loop_config, whose size is asserted above.
    unsafe { kernel::ioctl_struct(device.as_fd(), LOOP_CONFIGURE, config) }
}

/// Lets a loop device take over its file's new size.
///
/// # Errors
/// The file is no attached loop device.
pub fn refresh_size(device: &File) -> io::Result<()> {
    kernel::ioctl_number(device.as_fd(), LOOP_SET_CAPACITY, 0).map(drop)
}

/// Clears a loop device now, or with its last user where others have it open.
///
/// # Errors
/// The file is no attached loop device.
pub fn clear(device: &File) -> io::Result<()> {
    kernel::ioctl_number(device.as_fd(), LOOP_CLR_FD, 0).map(drop)
}

/// Whether the kernel serves this loop device past the page cache of its file.
///
/// # Errors
/// The file is no attached loop device.
#[allow(unsafe_code)]
pub fn is_direct(device: &File) -> io::Result<bool> {
    let mut info = LoopInfo::EMPTY;
    // SAFETY: LOOP_GET_STATUS64 writes a struct loop_info64, whose size is asserted above.
    unsafe { kernel::ioctl_struct(device.as_fd(), LOOP_GET_STATUS64, &mut info) }?;
    Ok(info.flags & LO_FLAGS_DIRECT_IO != 0)
}
