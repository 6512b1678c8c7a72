//! The runner's side of an object that has one end in the tree.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::sys;
use crate::workload::{OUTSIDE_WORDS, Outside};

/// What a tree reads of [`Outside::File`] before it is dumped.
pub const BEFORE_DUMP: &[u8] = b"0123456789";
/// The same part of the file that takes its place.
const REPLACED: &[u8] = b"9876543210";

/// Both sides of an object.
#[derive(Debug)]
pub struct OutsideObject {
    kind: Outside,
    /// What the tree has.
    inside: OwnedFd,
    /// What it does not have.
    ours: Option<OwnedFd>,
    path: PathBuf,
}

impl OutsideObject {
    /// Makes the object; files go to `dir`.
    pub fn make(kind: Outside, dir: &Path) -> Result<OutsideObject> {
        let path = dir.join("outside");
        let (inside, ours) = match kind {
            Outside::Pipe => {
                let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
                (reader, Some(writer))
            }
            Outside::Terminal => {
                let (master, number) = sys::terminal_pair()?;
                let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
                let slave = sys::open(format!("/dev/pts/{number}"), flags)?;
                (slave, Some(master))
            }
            Outside::File => (write_file(&path, BEFORE_DUMP)?, None),
            Outside::Socket => {
                let (inside, ours) = sys::socket_pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC)?;
                (inside, Some(ours))
            }
            Outside::Connection => connection()?,
        };
        Ok(OutsideObject {
            kind,
            inside,
            ours,
            path,
        })
    }

    /// What the tree gets as its standard input.
    pub fn inside(&self) -> Result<OwnedFd> {
        self.inside.try_clone().context("duplicating the object")
    }

    /// CRIU's name of what a dump is told to be external.
    pub fn declared_key(&self) -> Result<String> {
        match (self.kind, &self.ours) {
            (Outside::Socket, Some(peer)) => {
                let link = format!("/proc/self/fd/{}", peer.as_raw_fd());
                Ok(format!("unix[{}]", fs::metadata(link)?.ino()))
            }
            _ => self.key(),
        }
    }

    /// CRIU's name of what a restore is given.
    pub fn key(&self) -> Result<String> {
        let number = self.inside.as_raw_fd();
        let link = format!("/proc/self/fd/{number}");
        let stat = fs::metadata(&link).context("looking at the object")?;
        Ok(match self.kind {
            Outside::Pipe | Outside::Socket | Outside::Connection => {
                fs::read_link(&link)?.to_string_lossy().into_owned()
            }
            Outside::Terminal => format!("tty[{:x}:{:x}]", stat.rdev(), stat.dev()),
            Outside::File => {
                let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
                let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
                let mount: u32 = mount.context("no mnt_id")?.trim().parse()?;
                format!("file[{mount:x}:{:x}]", stat.ino())
            }
        })
    }

    /// Makes what a restore is given.
    pub fn replace(&mut self) -> Result<()> {
        match self.kind {
            Outside::File => {
                fs::remove_file(&self.path).context("removing the file")?;
                self.inside = write_file(&self.path, REPLACED)?;
            }
            Outside::Connection => (self.inside, self.ours) = connection()?,
            Outside::Pipe | Outside::Terminal | Outside::Socket => {}
        }
        Ok(())
    }

    /// Lets the tree read the words that it waits for.
    pub fn speak(&self) -> Result<()> {
        match &self.ours {
            Some(ours) => sys::write(ours, OUTSIDE_WORDS)
                .map(drop)
                .context("writing to the tree"),
            None => Ok(()),
        }
    }
}

fn connection() -> Result<(OwnedFd, Option<OwnedFd>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening")?;
    let inside = TcpStream::connect(listener.local_addr()?).context("connecting")?;
    let (ours, _) = listener.accept().context("accepting")?;
    Ok((inside.into(), Some(ours.into())))
}

fn write_file(path: &Path, start: &[u8]) -> Result<OwnedFd> {
    let whole = [start, OUTSIDE_WORDS].concat();
    fs::write(path, whole).context("writing the file")?;
    Ok(File::open(path).context("opening the file")?.into())
}
