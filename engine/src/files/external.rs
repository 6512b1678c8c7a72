//! Objects whose other side is outside of the tree, and what a restore is given in their place.
//!
//! ```text
//! key               object, numbers in hexadecimal except in pipe and socket
//! pipe:[INODE]      a pipe
//! socket:[INODE]    an internet socket; a unix socket           the latter: restore only
//! tty[RDEV:DEV]     a terminal, by its device and that of its filesystem
//! file[MNT:INODE]   an open file, by mount and inode
//! /memfd:NAME       a memory file                               restore only
//! PATH              a file, without the leading slash           restore only
//! ```
//!
//! The keys are CRIU's, which knows no external internet sockets. A dump takes the first four as declared and does
//! not ask who else holds them; a terminal is then written as one of type EXT_TTY without a path, a file with its
//! key for a name. An external pipe looks as any other, and an external internet socket as a closed one, so a field
//! of ours says that it is one. What a restore is given keeps its content and its other side; pipes and files are
//! opened once more, with their own flags. Internet sockets may be of protocols that can't be saved.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use firn_images::{ImageDir, ImageKind};
use firn_proto::{
    FdTypes, FileEntry, InetSkEntry, MemfdInodeEntry, PipeEntry, RegFileEntry, TtyFileEntry,
    TtyType,
};
use firn_sys::file::{self, S_IFCHR, S_IFIFO, S_IFSOCK};
use firn_sys::{Errno, Pid, pidfd};

use super::dump::{DumpState, query};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::{OpenFile, Place};
use super::pty::Ptys;
use super::tty::TerminalInfos;
use super::{FileDumpOptions, pipe, regular, sockets, tty, tty_image};

const MEMFD: &str = "/memfd:";

/// A descriptor of the restoring process that takes the place of an object of the images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InheritedFd {
    /// The descriptor.
    pub fd: RawFd,
    /// CRIU's name of the object, such as `pipe:[4711]`.
    pub key: String,
}

/// How --external and --inherit-fd call a terminal.
pub(super) fn tty_key(rdev: u64, dev: u64) -> String {
    format!("tty[{rdev:x}:{dev:x}]")
}

fn file_key(file: &OpenFile) -> String {
    format!("file[{:x}:{:x}]", file.info.mnt_id, file.stat.ino)
}

/// The key by which a dump may be told that a file is external; None for kinds that can't be.
pub(super) fn key_of(file: &OpenFile) -> Option<String> {
    let by_path = file.link.starts_with(b"/");
    match file.stat.file_type() {
        S_IFIFO if file.link.starts_with(b"pipe:[") => {
            Some(String::from_utf8_lossy(&file.link).into_owned())
        }
        S_IFCHR if by_path && tty::sort_of(file).is_some() => {
            Some(tty_key(file.stat.rdev, file.stat.dev))
        }
        S_IFIFO | S_IFSOCK => None,
        _ => (by_path && matches!(file.place, Place::Fd(_))).then(|| file_key(file)),
    }
}

impl FileDumpOptions {
    /// Whether the object with that key was declared to be external.
    pub(super) fn is_external(&self, key: &str) -> bool {
        self.external.iter().any(|declared| declared == key)
    }

    /// Whether a pipe or terminal was declared to be external.
    pub(super) fn has_external(&self, file: &OpenFile) -> bool {
        !self.external.is_empty() && key_of(file).is_some_and(|key| self.is_external(&key))
    }

    /// Whether files by path are told apart by their mount.
    pub(super) fn names_mounts(&self) -> bool {
        self.external.iter().any(|key| key.starts_with("file["))
    }
}

/// The kind that dumps a file which was declared to be external; pipes stay what they are.
pub(super) fn kind_of(file: &OpenFile, options: &FileDumpOptions) -> Option<&'static dyn FileKind> {
    if options.external.is_empty() {
        return None;
    }
    if sockets::is_socket(file) {
        let key = socket_key(sockets::inode_of(file));
        let is_declared = options.is_external(&key) && sockets::is_internet(file);
        return is_declared.then_some(&ExternalInternetSocket);
    }
    let is_device = file.stat.file_type() == S_IFCHR && !file.is_path_only();
    if is_device && options.is_external(&tty_key(file.stat.rdev, file.stat.dev)) {
        return Some(&ExternalTty);
    }
    let is_file = !matches!(file.stat.file_type(), S_IFIFO | S_IFSOCK);
    let by_descriptor = matches!(file.place, Place::Fd(_)) && file.link.starts_with(b"/");
    (is_file && by_descriptor && options.is_external(&file_key(file))).then_some(&ExternalFile)
}

/// Terminals that a restore is given.
struct ExternalTty;

impl FileKind for ExternalTty {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Tty
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let file = dumping.file;
        let failed = |source| query(file, "the terminal", source);
        let fd = dumping.duplicate.ok_or(Errno::EBADF).map_err(failed)?;
        let terminals = &mut state.collected.terminals;
        let sort = terminals.external(file.stat.rdev, file.stat.dev);
        let tty_info_id = sort.info_id();
        terminals.describe_once(tty_info_id, || {
            tty_image::describe(file, fd, tty_info_id, sort).map_err(failed)
        })?;
        Ok(FileEntry {
            r#type: FdTypes::Tty.into(),
            id: dumping.id,
            tty: Some(TtyFileEntry {
                id: dumping.id,
                tty_info_id,
                flags: file.image_flags(),
                fown: dumping.fown,
                regf_id: None,
            }),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        tty::Tty.open(entry, opener)
    }
}

/// Files that a restore is given.
struct ExternalFile;

impl FileKind for ExternalFile {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Reg
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let name = file_key(dumping.file).into_bytes();
        let collected = &mut *state.collected;
        let mut entry = regular::entry(dumping.file, dumping.id, dumping.fown, name, collected);
        if let Some(reg) = &mut entry.reg {
            reg.ext = Some(true);
        }
        Ok(entry)
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        regular::Regular.open(entry, opener)
    }
}

/// Internet sockets that a restore is given, of any protocol.
struct ExternalInternetSocket;

impl FileKind for ExternalInternetSocket {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Inetsk
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        _: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        sockets::describe_external(dumping)
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        sockets::InetSocketKind.open(entry, opener)
    }
}

/// What the restore was given, by key.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    by_key: HashMap<Vec<u8>, OwnedFd>,
    memfds: MemfdNames,
}

/// Names of memory files by their number.
type MemfdNames = HashMap<u64, Vec<u8>>;

/// Reads the names of memory files, where one of them was given.
fn memfd_names(given: &[InheritedFd], images: &ImageDir) -> Result<MemfdNames, FileRestoreError> {
    if !given.iter().any(|given| given.key.starts_with(MEMFD)) {
        return Ok(MemfdNames::new());
    }
    let inodes: Vec<MemfdInodeEntry> = images.read_all(ImageKind::MemfdInode, 0)?;
    let named = inodes.into_iter();
    Ok(named.map(|inode| (inode.inode_id, inode.name)).collect())
}

/// The key that something may be given by in the place of an entry.
fn key_of_entry(
    entry: &FileEntry,
    terminals: &TerminalInfos,
    memfds: &MemfdNames,
) -> Option<Vec<u8>> {
    if let Some(reg) = &entry.reg {
        return Some(key_of_path(reg).to_vec());
    }
    if let Some(memfd) = &entry.memfd {
        let name = memfds.get(&memfd.inode_id.into())?;
        return Some([MEMFD.as_bytes(), name].concat());
    }
    let pipe = entry.pipe.as_ref();
    let socket = entry.usk.as_ref().map(|socket| socket.ino);
    let socket = socket.or_else(|| entry.isk.as_ref().map(|socket| socket.ino));
    let tty = entry.tty.as_ref();
    let key = pipe
        .map(|pipe| pipe_key(pipe.pipe_id))
        .or_else(|| socket.map(socket_key))
        .or_else(|| {
            let info = terminals.get(&tty?.tty_info_id)?;
            Some(tty_key(info.rdev.into(), info.dev.unwrap_or(0).into()))
        });
    key.map(String::into_bytes)
}

fn key_of_path(entry: &RegFileEntry) -> &[u8] {
    match entry.ext {
        // Its name is the key.
        Some(true) => &entry.name,
        _ => entry.name.strip_prefix(b"/").unwrap_or(&entry.name),
    }
}

fn pipe_key(pipe_id: u32) -> String {
    format!("pipe:[{pipe_id}]")
}

fn socket_key(ino: u32) -> String {
    format!("socket:[{ino}]")
}

/// Whether the dump was told that an object is external, so that there is nothing to restore it from.
fn is_external(entry: &FileEntry, terminals: &TerminalInfos) -> bool {
    let of_type_ext = |tty: &TtyFileEntry| {
        let info = terminals.get(&tty.tty_info_id);
        info.is_some_and(|info| info.r#type == i32::from(TtyType::ExtTty))
    };
    let of_socket = |socket: &InetSkEntry| socket.firn.as_ref().and_then(|firn| firn.external);
    let marked = |pipe: &PipeEntry| pipe.firn.as_ref().and_then(|firn| firn.external);
    entry.reg.as_ref().and_then(|reg| reg.ext) == Some(true)
        || entry.pipe.as_ref().and_then(marked) == Some(true)
        || entry.isk.as_deref().and_then(of_socket) == Some(true)
        || entry.tty.as_ref().is_some_and(of_type_ext)
}

/// Checks that everything external is given. Returns warnings about what is given for nothing.
pub(super) fn check<'a>(
    given: &[InheritedFd],
    entries: impl Iterator<Item = &'a FileEntry>,
    terminals: &TerminalInfos,
    images: &ImageDir,
) -> Result<Vec<String>, FileRestoreError> {
    let memfds = memfd_names(given, images)?;
    let has = |key: &[u8], of: &InheritedFd| of.key.as_bytes() == key;
    let mut unused: Vec<&InheritedFd> = given.iter().collect();
    for entry in entries {
        let Some(key) = key_of_entry(entry, terminals, &memfds) else {
            continue;
        };
        if is_external(entry, terminals) && !given.iter().any(|given| has(&key, given)) {
            let key = String::from_utf8_lossy(&key).into_owned();
            return Err(FileRestoreError::NotInherited { key });
        }
        unused.retain(|given| !has(&key, given));
    }
    let warn = |given: &InheritedFd| {
        let InheritedFd { fd, key } = given;
        format!("descriptor {fd} was not used: no open file of the images is called {key}")
    };
    Ok(unused.into_iter().map(warn).collect())
}

/// Whether something is given in the place of a file.
pub(super) fn is_given(entry: &RegFileEntry, given: &[InheritedFd]) -> bool {
    let key = key_of_path(entry);
    given.iter().any(|given| given.key.as_bytes() == key)
}

/// Takes over a descriptor of this process, whoever owns it.
pub(super) fn take_over(fd: RawFd) -> Result<OwnedFd, FileRestoreError> {
    let taken = pidfd::open(Pid::this()).and_then(|me| pidfd::getfd(me, fd));
    taken.map_err(FileRestoreError::refused(
        "take over descriptor",
        fd.to_string(),
    ))
}

impl Inherited {
    /// Takes over what was given.
    pub(super) fn take(
        given: &[InheritedFd],
        images: &ImageDir,
    ) -> Result<Inherited, FileRestoreError> {
        let mut by_key = HashMap::new();
        for InheritedFd { fd, key } in given {
            by_key.insert(key.clone().into_bytes(), take_over(*fd)?);
        }
        let memfds = memfd_names(given, images)?;
        Ok(Inherited { by_key, memfds })
    }

    fn get(&self, key: impl AsRef<[u8]>) -> Option<BorrowedFd<'_>> {
        self.by_key.get(key.as_ref()).map(AsFd::as_fd)
    }

    /// Whether the pipe was given.
    pub(super) fn has_pipe(&self, pipe_id: u32) -> bool {
        self.get(pipe_key(pipe_id)).is_some()
    }

    /// Whether the socket with that inode number was given.
    pub(super) fn has_socket(&self, ino: u32) -> bool {
        self.get(socket_key(ino)).is_some()
    }

    /// Whether nothing was given.
    pub(super) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// What was given in the place of this file; an external one gets flags and position of its own.
    pub(super) fn open_file(
        &self,
        entry: &RegFileEntry,
        flags: u32,
    ) -> Result<Option<OwnedFd>, FileRestoreError> {
        let Some(fd) = self.get(key_of_path(entry)) else {
            return Ok(None);
        };
        if entry.ext != Some(true) {
            return duplicate(fd).map(Some);
        }
        let fd = once_more(fd, flags, "an inherited file")?;
        // Only files that are stored somewhere have one.
        let _ = open::seek_to(&fd, entry.pos, entry.id);
        Ok(Some(fd))
    }

    /// What was given in the place of an open file that is no path's.
    pub(super) fn in_place_of(
        &self,
        entry: &FileEntry,
        terminals: &TerminalInfos,
        ptys: &mut Ptys,
    ) -> Result<Option<OwnedFd>, FileRestoreError> {
        if self.by_key.is_empty() || entry.reg.is_some() {
            return Ok(None);
        }
        let key = key_of_entry(entry, terminals, &self.memfds);
        let Some(fd) = key.and_then(|key| self.get(key)) else {
            return Ok(None);
        };
        if let Some(pipe) = &entry.pipe {
            return once_more(fd, pipe::flags_of(pipe), "an inherited pipe").map(Some);
        }
        let fd = duplicate(fd)?;
        if let Some(info) = entry.tty.and_then(|tty| terminals.get(&tty.tty_info_id)) {
            tty_image::apply(&fd, info, entry.id)?;
            ptys.give_session(info, &fd)?;
        }
        Ok(Some(fd))
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, FileRestoreError> {
    fd.try_clone_to_owned()
        .map_err(|error| FileRestoreError::refused("duplicate", "an inherited file")(error.into()))
}

/// An open file of its own with these flags; where there can be none, as of sockets, the given one.
fn once_more(
    fd: BorrowedFd<'_>,
    flags: u32,
    what: &'static str,
) -> Result<OwnedFd, FileRestoreError> {
    let stat = file::stat(fd).map_err(FileRestoreError::refused("look at", what))?;
    match stat.file_type() {
        S_IFSOCK => {
            let fd = duplicate(fd)?;
            open::set_flags(&fd, flags, what)?;
            Ok(fd)
        }
        _ => open::reopen(fd, flags, what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    use firn_proto::FirnPipeEntry;

    #[test]
    fn a_pipe_is_taken_over_by_its_key() {
        let (reader, writer) = firn_sys::pipe::create().expect("a pipe");
        let dir = tempfile::tempdir().expect("a directory");
        let images = ImageDir::open(dir.path()).expect("a directory");
        let given = InheritedFd {
            fd: reader.as_raw_fd(),
            key: pipe_key(77),
        };
        let inherited = Inherited::take(&[given], &images).expect("it is open");
        assert!(inherited.has_pipe(77) && !inherited.has_pipe(78));
        let fd = inherited.get("pipe:[77]").expect("given");
        let mut reader = std::fs::File::from(once_more(fd, 0, "a pipe").expect("a pipe"));
        std::fs::File::from(writer).write_all(b"x").expect("room");
        let mut byte = [0];
        reader.read_exact(&mut byte).expect("what was written");
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn what_is_external_must_be_given_and_the_rest_may() {
        let dir = tempfile::tempdir().expect("a directory");
        let images = ImageDir::open(dir.path()).expect("a directory");
        let pipe = |external| FileEntry {
            pipe: Some(PipeEntry {
                pipe_id: 5,
                firn: Some(FirnPipeEntry {
                    external,
                    ..FirnPipeEntry::default()
                }),
                ..PipeEntry::default()
            }),
            ..FileEntry::default()
        };
        let checked = |entry: &FileEntry, given: &[InheritedFd]| {
            let found = check(given, [entry].into_iter(), &TerminalInfos::new(), &images);
            found.map_err(|error| error.to_string())
        };
        let given = |key: &str| InheritedFd {
            fd: 9,
            key: key.to_owned(),
        };
        let error = checked(&pipe(Some(true)), &[]).expect_err("it is external");
        assert!(error.contains("fd[N]:pipe:[5]"), "{error}");
        assert_eq!(checked(&pipe(Some(true)), &[given("pipe:[5]")]), Ok(vec![]));
        assert_eq!(checked(&pipe(None), &[]), Ok(vec![]));
        let warned = checked(&pipe(None), &[given("pipe:[6]")]).expect("a warning only");
        assert!(warned[0].contains("pipe:[6]"), "{warned:?}");
    }
}
