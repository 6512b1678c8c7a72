//! The kinds of open files, and what is told about those that are none of them.

use std::os::fd::{BorrowedFd, OwnedFd};

use firn_proto::{FdTypes, FileEntry, FownEntry};

use super::bpf::BpfMap;
use super::chardev::CharDevice;
use super::dump::DumpState;
use super::epoll::Epoll;
use super::error::{FileDumpError, FileRestoreError};
use super::eventfd::Eventfd;
use super::fanotify::Fanotify;
use super::fifo::Fifo;
use super::inotify::Inotify;
use super::io_uring::IoUring;
use super::locks::Line;
use super::memfd::Memfd;
use super::namespace::Namespace;
use super::open::Opener;
use super::open_file::{OpenFile, Trouble};
use super::pidfd::Pidfd;
use super::pipe::Pipe;
use super::plugin::Foreign;
use super::regular::Regular;
use super::signalfd::Signalfd;
use super::sockets::{InetSocketKind, NetlinkSocketKind, PacketSocketKind, UnixSocketKind};
use super::timerfd::Timerfd;
use super::tty::Tty;
use super::{FileDumpOptions, external, plugin, unsupported};
use crate::obstacle::Obstacle;

/// All kinds. The first one that recognises a file has it; the first one of an image's type opens it.
pub(super) static KINDS: &[&dyn FileKind] = &[
    &Regular,
    &Pipe,
    &Fifo,
    &CharDevice,
    &Tty,
    &Memfd,
    &UnixSocketKind,
    &Eventfd,
    &Epoll,
    &Signalfd,
    &Timerfd,
    &Inotify,
    &Fanotify,
    &Pidfd,
    &IoUring,
    &InetSocketKind,
    &NetlinkSocketKind,
    &PacketSocketKind,
    &Namespace,
    &BpfMap,
    &Foreign,
];

/// One open file being dumped.
pub(super) struct Dumping<'a> {
    /// What /proc says about it.
    pub(super) file: &'a OpenFile,
    /// A duplicate of the descriptor; None for files that are held without one and for O_PATH.
    pub(super) duplicate: Option<BorrowedFd<'a>>,
    /// Its number in files.img.
    pub(super) id: u32,
    /// Its signal owner.
    pub(super) fown: FownEntry,
}

/// One kind of open file: dump, restore and image side by side in its module.
pub(super) trait FileKind: Sync {
    /// Type of its entries.
    fn fd_type(&self) -> FdTypes;

    /// Whether an open file is of this kind; kinds that only options tell recognise nothing by themselves.
    fn recognises(&self, _: &OpenFile) -> bool {
        false
    }

    /// What keeps a file of this kind from being dumped, if anything does.
    fn trouble(&self, _: &OpenFile, _: &FileDumpOptions) -> Option<Trouble> {
        None
    }

    /// Makes the image entry.
    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError>;

    /// Opens the file again, with flags and position.
    fn open(&self, entry: &FileEntry, opener: &mut Opener<'_>)
    -> Result<OwnedFd, FileRestoreError>;
}

/// The kind of an open file.
pub(super) fn of_file(file: &OpenFile, options: &FileDumpOptions) -> Option<&'static dyn FileKind> {
    external::kind_of(file, options)
        .or_else(|| KINDS.iter().copied().find(|kind| kind.recognises(file)))
        .or_else(|| plugin::kind_of(file, &options.plugins))
}

/// The kind that opens entries of a type.
pub(super) fn of_type(fd_type: FdTypes) -> Option<&'static dyn FileKind> {
    KINDS.iter().copied().find(|kind| kind.fd_type() == fd_type)
}

/// What keeps the file from being dumped: its kind, or locks held through it.
pub(super) fn obstacles(file: &OpenFile, options: &FileDumpOptions) -> Vec<Obstacle> {
    let trouble = match of_file(file, options) {
        Some(kind) => kind.trouble(file, options),
        None => Some(unsupported::trouble(file)),
    };
    let mut found: Vec<Obstacle> = trouble
        .into_iter()
        .map(|trouble| file.obstacle(trouble))
        .collect();
    found.extend(lock_obstacles(file, options));
    found
}

/// Locks that the task holds through this descriptor and that are not saved. Another task may hold others
/// through the same open file.
pub(super) fn lock_obstacles(
    file: &OpenFile,
    options: &FileDumpOptions,
) -> impl Iterator<Item = Obstacle> {
    let save = options.file_locks;
    let lines = file.info.lines.iter().filter(|l| l.starts_with("lock:"));
    let lost = lines.filter(move |line| !save || Line::parse(line).is_none());
    lost.map(move |line| {
        let words: Vec<&str> = line.split_whitespace().skip(2).take(3).collect();
        let lock = words.join(" ");
        let hint = match save {
            false => "add --file-locks to save it, or dump when it has been released",
            true => "dump when it has been released",
        };
        let reason = format!("the task holds a lock ({lock}), which would be lost");
        file.obstacle(Trouble::new(reason, hint))
    })
}
