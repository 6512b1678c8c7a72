//! The connection to the kernel: a FUSE mount that is attached nowhere.
//!
//! The mount has no place in any mount table: it lives as long as a descriptor of it or its file is
//! open. So it works in every mount namespace and leaves nothing behind when its processes are gone.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::abi::{self, InHeader, InitIn, InitOut, Opcode, flag};

/// Bytes of a request's data at most.
pub const MAX_DATA: u32 = 1 << 20;

/// Requests that the kernel keeps in flight at most.
const MAX_BACKGROUND: u16 = 256;

/// What both sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreement {
    /// A new server gets the requests that the last one had not answered.
    pub resends: bool,
    /// The kernel's minor version of the protocol.
    pub minor: u32,
}

/// A mounted FUSE file system of one file.
#[derive(Debug)]
pub struct Connection {
    /// The channel of requests; as long as somebody holds it, requests wait for their answers.
    pub channel: OwnedFd,
    /// The mount.
    pub mount: OwnedFd,
    /// What was agreed on.
    pub agreement: Agreement,
}

impl Connection {
    /// Mounts, and answers the kernel's greeting.
    ///
    /// # Errors
    /// There is no /dev/fuse, no permission to mount, or a kernel before 5.2.
    pub fn establish() -> io::Result<Connection> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let channel = rustix::fs::open("/dev/fuse", flags, Mode::empty())?;
        let context = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let options = [
            ("source", "firn-ploop".to_owned()),
            ("fd", channel.as_raw_fd().to_string()),
            ("rootmode", "40700".to_owned()),
            ("user_id", rustix::process::geteuid().as_raw().to_string()),
            ("group_id", rustix::process::getegid().as_raw().to_string()),
        ];
        for (key, value) in options {
            rustix::mount::fsconfig_set_string(context.as_fd(), key, value)?;
        }
        rustix::mount::fsconfig_create(context.as_fd())?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let mount =
            rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let agreement = greet(channel.as_fd())?;
        Ok(Connection {
            channel,
            mount,
            agreement,
        })
    }

    /// Opens the file. A server must be there to answer.
    ///
    /// # Errors
    /// The server refused, or ended for good.
    pub fn open_file(mount: impl AsFd, writable: bool) -> io::Result<File> {
        let access = if writable {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let flags = access | OFlags::CLOEXEC;
        let file = rustix::fs::openat(mount, abi::FILE_NAME, flags, Mode::empty())?;
        Ok(file.into())
    }
}

/// Answers the first request, which the mount has queued.
fn greet(channel: impl AsFd) -> io::Result<Agreement> {
    // The kernel refuses to read into less than its least buffer and the largest write.
    let mut buffer = vec![0; 64 << 10];
    let len = rustix::io::read(&channel, &mut buffer[..])?;
    let request = &buffer[..len];
    let header = InHeader::parse(request).filter(|header| header.opcode == Opcode::Init as u32);
    let init = request.get(abi::IN_HEADER..).and_then(InitIn::parse);
    let (Some(header), Some(init)) = (header, init) else {
        return Err(io::Error::other(
            "the kernel's first request is no greeting",
        ));
    };
    let wanted = flag::ASYNC_READ
        | flag::BIG_WRITES
        | flag::ASYNC_DIO
        | flag::MAX_PAGES
        | flag::INIT_EXT
        | flag::HAS_RESEND;
    let out = InitOut {
        minor: init.minor.min(abi::MINOR),
        flags: init.flags & wanted,
        max_background: MAX_BACKGROUND,
        max_write: MAX_DATA,
        max_pages: u16::try_from(MAX_DATA / 4096).unwrap_or(u16::MAX),
    };
    if init.major != abi::MAJOR {
        return Err(io::Error::other("the kernel speaks another FUSE protocol"));
    }
    let args = out.encode();
    let head = abi::out_header(header.unique, 0, args.len());
    let parts = [io::IoSlice::new(&head), io::IoSlice::new(&args)];
    rustix::io::writev(&channel, &parts)?;
    Ok(Agreement {
        resends: out.flags & flag::HAS_RESEND != 0,
        minor: out.minor,
    })
}
