//! Names of unix sockets: binding them again, and reaching what is bound.
//!
//! A dump leaves the socket's file behind, and a socket can only be bound to a name that is free. So the
//! stale file goes first; a name whose file was removed or taken by another is bound for a moment, and
//! what is there stands aside meanwhile. What is bound is reached through its descriptor afterwards,
//! wherever its file is.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use firn_proto::UnixSkEntry;
use firn_sys::file::{self, S_IFSOCK, Stat};
use firn_sys::{Errno, sock_diag, socket};

use crate::files::FileRestoreOptions;
use crate::files::error::FileRestoreError;
use crate::files::open;
use crate::files::sockets::lingering;

/// How others reach a socket that has a name.
#[derive(Debug)]
pub(super) enum Reach {
    Abstract(Vec<u8>),
    File(OwnedFd),
}

impl Reach {
    /// How others reach a socket that has been bound to the name of its entry.
    pub(super) fn of(fd: impl AsFd, entry: &UnixSkEntry) -> Result<Reach, FileRestoreError> {
        if entry.name.first() == Some(&0) {
            return Ok(Reach::Abstract(entry.name.clone()));
        }
        let refused = FileRestoreError::refused("find the file of", shown(entry));
        socket::unix_file(fd).map(Reach::File).map_err(refused)
    }

    /// The address to connect or send to, as long as this value lives.
    pub(super) fn address(&self) -> Vec<u8> {
        match self {
            Reach::Abstract(name) => address_of(name),
            Reach::File(file) => {
                let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
                address_of(path.as_bytes())
            }
        }
    }
}

/// The address of a name, as struct sockaddr_un.
pub(super) fn address_of(name: &[u8]) -> Vec<u8> {
    let family = u16::try_from(socket::AF_UNIX).expect("small");
    [&family.to_ne_bytes(), name].concat()
}

/// Binds sockets, knowing which files of sockets are in use here.
#[derive(Debug)]
pub(super) struct Binder<'a> {
    options: &'a FileRestoreOptions,
    in_use: HashSet<(u32, u32)>,
}

/// The files of all sockets that are bound here.
fn files_in_use() -> HashSet<(u32, u32)> {
    let known = sock_diag::unix_sockets().unwrap_or_default();
    let files = known.values().filter_map(|socket| socket.file);
    files.collect()
}

impl<'a> Binder<'a> {
    pub(super) fn new(options: &'a FileRestoreOptions) -> Binder<'a> {
        Binder {
            options,
            in_use: files_in_use(),
        }
    }

    /// Binds a socket to the name of its entry.
    pub(super) fn bind(&self, fd: impl AsFd, entry: &UnixSkEntry) -> Result<(), FileRestoreError> {
        let fd = fd.as_fd();
        if entry.name.first() == Some(&0) {
            let refused = FileRestoreError::refused("bind", shown(entry));
            let address = address_of(&entry.name);
            return lingering::outlast(|| socket::bind(fd, &address)).map_err(refused);
        }
        let path = self.path_of(entry);
        let aside = match file::lstat_path(&path) {
            Err(Errno::ENOENT) => None,
            Err(source) => return Err(FileRestoreError::refused("look at", shown(entry))(source)),
            Ok(stat) => self.make_room(&path, &stat, entry)?,
        };
        let bound = self.bind_file(fd, entry);
        if bound.is_ok() && entry.deleted == Some(true) {
            let _ = std::fs::remove_file(&path);
        }
        if let Some(aside) = aside {
            std::fs::rename(&aside, &path).map_err(|error| {
                FileRestoreError::refused("put back", shown(entry))(error.into())
            })?;
        }
        bound
    }

    /// Clears the path: a stale socket goes, anything else stands aside where the name is only wanted for
    /// a moment.
    fn make_room(
        &self,
        path: &Path,
        stat: &Stat,
        entry: &UnixSkEntry,
    ) -> Result<Option<PathBuf>, FileRestoreError> {
        if entry.deleted == Some(true) {
            let mut aside = path.as_os_str().to_owned();
            aside.push(format!(".firn-{}", firn_sys::Pid::this()));
            let moved = std::fs::rename(path, &aside);
            moved.map_err(|error| FileRestoreError::refused("move", shown(entry))(error.into()))?;
            return Ok(Some(aside.into()));
        }
        let changed = |what: &str| FileRestoreError::Changed {
            role: "socket",
            path: path.to_owned(),
            what: what.to_owned(),
        };
        if stat.file_type() != S_IFSOCK {
            return Err(changed("something else has its name"));
        }
        let place = kernel_place(stat);
        let free = || match files_in_use().contains(&place) {
            true => Err(Errno::EADDRINUSE),
            false => Ok(()),
        };
        if self.in_use.contains(&place) && lingering::outlast(free).is_err() {
            return Err(changed(
                "another process listens there; end it before the restore",
            ));
        }
        std::fs::remove_file(path)
            .map_err(|error| FileRestoreError::refused("replace", shown(entry))(error.into()))?;
        Ok(None)
    }

    fn bind_file(&self, fd: impl AsFd, entry: &UnixSkEntry) -> Result<(), FileRestoreError> {
        let fd = fd.as_fd();
        let directory = entry
            .name_dir
            .as_deref()
            .map(|dir| PathBuf::from(OsStr::from_bytes(dir)));
        let root = self.options.root.as_deref();
        let address = address_of(&entry.name);
        let bound = match (root, directory.as_deref()) {
            (None, None) => socket::bind(fd, &address),
            (root, directory) => socket::bind_in(fd, &address, root, directory),
        };
        bound.map_err(FileRestoreError::refused("bind", shown(entry)))?;
        if let Some(perms) = &entry.file_perms {
            let refused = FileRestoreError::refused("find the file of", shown(entry));
            let file = socket::unix_file(fd).map_err(refused)?;
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let own = std::os::unix::fs::chown(&path, Some(perms.uid), Some(perms.gid));
            let mode = std::os::unix::fs::PermissionsExt::from_mode(perms.mode & 0o7777);
            own.and_then(|()| std::fs::set_permissions(&path, mode))
                .map_err(|error| {
                    FileRestoreError::refused("set the owner of", shown(entry))(error.into())
                })?;
        }
        Ok(())
    }

    fn path_of(&self, entry: &UnixSkEntry) -> PathBuf {
        let name = entry
            .name
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        let full = match entry.name_dir.as_deref() {
            Some(dir) if name.first() != Some(&b'/') => [dir, b"/", name].concat(),
            _ => name.to_vec(),
        };
        open::local_path(&full, self.options)
    }
}

/// Inode number and device as unix_diag has them.
fn kernel_place(stat: &Stat) -> (u32, u32) {
    let (major, minor) = file::split_device(stat.dev);
    (
        u32::try_from(stat.ino & 0xffff_ffff).expect("masked"),
        major << 20 | minor,
    )
}

/// A socket in words.
pub(in crate::files::sockets) fn shown(entry: &UnixSkEntry) -> String {
    match entry.name.split_first() {
        None => format!("unix socket {}", entry.id),
        Some((0, name)) => format!("unix socket @{}", String::from_utf8_lossy(name)),
        Some(_) => {
            let name = entry.name.strip_suffix(b"\0").unwrap_or(&entry.name);
            format!("unix socket {}", String::from_utf8_lossy(name))
        }
    }
}
