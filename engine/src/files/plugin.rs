//! Descriptors that only their driver's maker knows how to save: files of drivers, dma-bufs.
//!
//! A program that embeds the engine gives it plugins. A dump asks them, in order, about every descriptor
//! that no kind of the engine claims; the first one that recognises it describes it in bytes of its own.
//! The images keep these bytes with the plugin's name, and the restore's plugin of that name opens the file
//! again. Without a plugin such a descriptor stands in the way of a dump.
//!
//! What a plugin for files of one device could be; /dev/kmsg remembers how far it was read:
//!
//! ```
//! use std::fs::File;
//! use std::os::fd::{BorrowedFd, OwnedFd};
//!
//! use firn_engine::files::plugin::{FilePlugin, ForeignFile, PluginError};
//!
//! struct KernelLog;
//!
//! impl FilePlugin for KernelLog {
//!     fn name(&self) -> &str {
//!         "kernel-log"
//!     }
//!
//!     fn recognises(&self, file: &ForeignFile<'_>) -> bool {
//!         file.device == Some((1, 11))
//!     }
//!
//!     fn dump(&self, file: &ForeignFile<'_>, _: BorrowedFd<'_>) -> Result<Vec<u8>, PluginError> {
//!         // A driver would be asked for its state here, with ioctls on the duplicate.
//!         Ok(file.path().ok_or("it has no path")?.as_bytes().to_vec())
//!     }
//!
//!     fn restore(&self, data: &[u8]) -> Result<OwnedFd, PluginError> {
//!         Ok(File::open(std::str::from_utf8(data)?)?.into())
//!     }
//! }
//!
//! // It opens what it has described.
//! let file = ForeignFile { pid: 4711, fd: 3, link: "/dev/null", device: Some((1, 11)) };
//! assert!(KernelLog.recognises(&file));
//! let null = File::open("/dev/null")?;
//! let data = KernelLog.dump(&file, std::os::fd::AsFd::as_fd(&null))?;
//! KernelLog.restore(&data)?;
//!
//! // Both operations are given it.
//! use firn_engine::{Dump, Pid, Restore};
//! let dump = Dump::new(Pid::from_raw(4711)).images_dir("/var/lib/checkpoints/log").plugin(KernelLog);
//! let restore = Restore::new("/var/lib/checkpoints/log").plugin(KernelLog);
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use firn_proto::{ExtFileEntry, FdTypes, FileEntry, FirnExtFileEntry};
use firn_sys::Errno;
use firn_sys::file::{O_ACCMODE, S_IFBLK, S_IFCHR};

use super::dump::{DumpState, query};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::{OpenFile, Place};

/// An error of a plugin.
pub type PluginError = Box<dyn std::error::Error + Send + Sync>;

/// Saves and opens files of a kind that the engine does not know.
pub trait FilePlugin: Send + Sync {
    /// Its name, by which a restore finds it again.
    fn name(&self) -> &str;

    /// Whether the plugin can save this file. Asked while the task runs and again when it stands still.
    fn recognises(&self, file: &ForeignFile<'_>) -> bool;

    /// Describes a file of a task that stands still, in bytes that only the plugin understands. `duplicate`
    /// leads to the same open file; what is changed through it, the task sees.
    ///
    /// # Errors
    /// Whatever keeps it from being saved: the dump fails with it and the tasks run on.
    fn dump(
        &self,
        file: &ForeignFile<'_>,
        duplicate: BorrowedFd<'_>,
    ) -> Result<Vec<u8>, PluginError>;

    /// Opens the file that was described so. Flags that fcntl can change are set by the engine.
    ///
    /// # Errors
    /// The restore fails with it, and nothing that was made is left.
    fn restore(&self, data: &[u8]) -> Result<OwnedFd, PluginError>;
}

/// A descriptor of a task that no kind of the engine claims.
#[derive(Debug, Clone, Copy)]
pub struct ForeignFile<'a> {
    /// The process.
    pub pid: i32,
    /// The number.
    pub fd: i32,
    /// Where /proc/PID/fd/N leads: a path, or a word such as `anon_inode:[io_uring]` or `/dmabuf:`.
    pub link: &'a str,
    /// Major and minor number of the device, where it is one's node.
    pub device: Option<(u32, u32)>,
}

impl<'a> ForeignFile<'a> {
    /// The path that it was opened by, if it has one.
    pub fn path(&self) -> Option<&'a str> {
        self.link.starts_with('/').then_some(self.link)
    }
}

/// The plugins of an operation.
#[derive(Clone, Default)]
pub struct Plugins(Vec<Arc<dyn FilePlugin>>);

impl Plugins {
    /// Adds one; those that were added before are asked before it.
    pub fn add(&mut self, plugin: impl FilePlugin + 'static) {
        self.0.push(Arc::new(plugin));
    }

    fn named(&self, name: &str) -> Option<&dyn FilePlugin> {
        let found = self.0.iter().find(|plugin| plugin.name() == name);
        found.map(|plugin| &**plugin)
    }

    fn for_file(&self, file: &OpenFile) -> Option<&dyn FilePlugin> {
        if self.0.is_empty() || file.is_path_only() {
            return None;
        }
        let link = file.link_text();
        let foreign = foreign(file, &link)?;
        let found = self.0.iter().find(|plugin| plugin.recognises(&foreign));
        found.map(|plugin| &**plugin)
    }
}

impl fmt::Debug for Plugins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.0.iter().map(|plugin| plugin.name());
        f.debug_list().entries(names).finish()
    }
}

impl PartialEq for Plugins {
    fn eq(&self, other: &Plugins) -> bool {
        let same = |(a, b): (&Arc<dyn FilePlugin>, &Arc<dyn FilePlugin>)| Arc::ptr_eq(a, b);
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(same)
    }
}

impl Eq for Plugins {}

fn foreign<'a>(file: &OpenFile, link: &'a str) -> Option<ForeignFile<'a>> {
    let Place::Fd(fd) = file.place else {
        return None;
    };
    let is_device = matches!(file.stat.file_type(), S_IFCHR | S_IFBLK);
    Some(ForeignFile {
        pid: file.pid.raw(),
        fd,
        link,
        device: is_device.then(|| file.stat.device()),
    })
}

/// The kind of files that a plugin claims and nobody else.
pub(super) fn kind_of(file: &OpenFile, plugins: &Plugins) -> Option<&'static dyn FileKind> {
    plugins.for_file(file).map(|_| &Foreign as &dyn FileKind)
}

/// Files that plugins save.
pub(super) struct Foreign;

impl FileKind for Foreign {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Ext
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let file = dumping.file;
        let link = file.link_text();
        let plugins = &state.collected.options.plugins;
        let asked = (
            plugins.for_file(file),
            foreign(file, &link),
            dumping.duplicate,
        );
        let (Some(plugin), Some(foreign), Some(duplicate)) = asked else {
            return Err(query(file, "the plugin", Errno::ENODATA));
        };
        let data = plugin.dump(&foreign, duplicate);
        let data = data.map_err(|source| FileDumpError::Plugin {
            plugin: plugin.name().to_owned(),
            pid: file.pid,
            object: format!("{} ({link})", file.place),
            source,
        })?;
        Ok(FileEntry {
            r#type: FdTypes::Ext.into(),
            id: dumping.id,
            ext: Some(Box::new(ExtFileEntry {
                id: dumping.id,
                fown: dumping.fown,
                firn: Some(FirnExtFileEntry {
                    plugin: Some(plugin.name().to_owned()),
                    data: Some(data),
                    flags: Some(file.image_flags()),
                }),
            })),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let firn = entry.ext.as_ref().and_then(|ext| ext.firn.as_ref());
        let named = firn.and_then(|firn| Some((firn.plugin.as_deref()?, firn)));
        // CRIU's plugins keep what they need in files of their own.
        let (name, firn) = named.ok_or(FileRestoreError::Unsupported {
            id: entry.id,
            kind: "file of a plugin of CRIU",
        })?;
        let plugin = opener.options.plugins.named(name);
        let plugin = plugin.ok_or_else(|| FileRestoreError::NoPlugin {
            id: entry.id,
            plugin: name.to_owned(),
        })?;
        let fd = plugin.restore(firn.data.as_deref().unwrap_or_default());
        let fd = fd.map_err(|source| FileRestoreError::Plugin {
            plugin: name.to_owned(),
            id: entry.id,
            source,
        })?;
        let flags = firn.flags.unwrap_or(0) & !O_ACCMODE.cast_unsigned();
        open::set_flags(&fd, flags, "the file of a plugin")?;
        Ok(fd)
    }
}
