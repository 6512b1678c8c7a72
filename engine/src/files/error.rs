//! What can go wrong with open files.

use std::path::PathBuf;

use firn_images::{ImageReadError, ImageWriteError};
use firn_proto::FileEntry;
use firn_sys::{Errno, Pid};

use super::open_file::ProcReadError;
use super::plugin::PluginError;
use super::shelf::ShelfError;
use crate::inject::InjectError;
use crate::network_lock::NetworkLockError;
use crate::obstacle::Obstacle;

/// An error of whoever keeps the contents of memory files.
pub type MemfdSourceError = Box<dyn std::error::Error + Send + Sync>;

/// Why open files could not be dumped.
#[derive(Debug, thiserror::Error)]
pub enum FileDumpError {
    /// The tasks could not be asked about their files.
    #[error(transparent)]
    Ask(#[from] InjectError),
    /// Something can't be dumped; nothing has been changed.
    #[error("{}", list(.0))]
    Obstacles(Vec<Obstacle>),
    /// /proc did not tell.
    #[error(transparent)]
    Read(#[from] ProcReadError),
    /// kcmp failed.
    #[error("cannot compare the open files of tasks {pid} and {other}")]
    Compare {
        /// One task.
        pid: Pid,
        /// The other one.
        other: Pid,
        /// What the kernel said.
        source: Errno,
    },
    /// The open file could not be asked.
    #[error("cannot read {what} of {object} of task {pid}")]
    Query {
        /// The task.
        pid: Pid,
        /// The descriptor.
        object: String,
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The content of a deleted file could not be read.
    #[error("cannot read the deleted file {}", path.display())]
    Ghost {
        /// Its last name.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// A second name could not be made.
    #[error("cannot give the deleted file {} another name", path.display())]
    LinkRemap {
        /// The name that was tried.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// What waits in a pair of terminals could not be read or put back.
    #[error("cannot read what waits in /dev/pts/{index}")]
    Terminal {
        /// Number of the pair.
        index: u32,
        /// What the kernel said.
        source: Errno,
    },
    /// The content of a memory file could not be taken.
    #[error("cannot save {object} of task {pid}")]
    Memfd {
        /// The task.
        pid: Pid,
        /// The descriptor.
        object: String,
        /// What went wrong.
        source: MemfdSourceError,
    },
    /// A plugin could not describe a file.
    #[error("plugin {plugin} cannot save {object} of task {pid}")]
    Plugin {
        /// Its name.
        plugin: String,
        /// The task.
        pid: Pid,
        /// The descriptor.
        object: String,
        /// What the plugin says.
        source: PluginError,
    },
    /// Packets of the connections could not be held off.
    #[error(transparent)]
    NetworkLock(#[from] NetworkLockError),
    /// There are more of them than one process may have, and they could not be kept.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// An image could not be written.
    #[error(transparent)]
    Image(#[from] ImageWriteError),
}

fn list(obstacles: &[Obstacle]) -> String {
    let lines: Vec<String> = obstacles.iter().map(Obstacle::to_string).collect();
    lines.join("\n")
}

fn who(pid: Option<Pid>) -> String {
    pid.map_or_else(|| "a task".to_owned(), |pid| format!("task {pid}"))
}

/// Why open files could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum FileRestoreError {
    /// The restored tasks could not be made to do the last things.
    #[error(transparent)]
    Ask(#[from] InjectError),
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] ImageReadError),
    /// The images contradict themselves.
    #[error("image of open file {id}: {what}")]
    Corrupt {
        /// Number of the file in files.img.
        id: u32,
        /// What is wrong with it.
        what: String,
    },
    /// The image holds files of a kind that is not restored.
    #[error("open file {id} is of kind {kind}, which is not restored")]
    Unsupported {
        /// Number of the file in files.img.
        id: u32,
        /// Name of the kind.
        kind: &'static str,
    },
    /// Nothing has the path any more.
    #[error("{role} {} does not exist here; put it back before the restore", path.display())]
    Missing {
        /// What it is to the tasks.
        role: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The file is another one than at the dump.
    #[error("{role} {} has changed since the dump: {what}", path.display())]
    Changed {
        /// What it is to the tasks.
        role: &'static str,
        /// The path.
        path: PathBuf,
        /// The difference.
        what: String,
    },
    /// A task has more descriptors than processes may have here.
    #[error(
        "{} has descriptor {number}, and the limit of this restore is {limit}; raise its hard limit to {enough} \
         (ulimit -n)", who(*pid)
    )]
    TooManyDescriptors {
        /// The task, where one is known.
        pid: Option<Pid>,
        /// Its highest descriptor.
        number: u32,
        /// RLIMIT_NOFILE.
        limit: u64,
        /// A limit that would do.
        enough: u64,
    },
    /// There are more of them than one process may have, and they could not be kept.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// The kernel refused to open, make or set something.
    #[error("cannot {action} {object}")]
    Refused {
        /// What was attempted.
        action: &'static str,
        /// On what.
        object: String,
        /// What the kernel said.
        source: Errno,
    },
    /// The tasks have a terminal and there is none here, or it may not be used.
    #[error("{what}")]
    Terminal {
        /// What is missing.
        what: String,
    },
    /// The images name a plugin that the restore does not have.
    #[error("open file {id} was saved by plugin {plugin}, which this restore was not given")]
    NoPlugin {
        /// Number of the file in files.img.
        id: u32,
        /// Name of the plugin.
        plugin: String,
    },
    /// A plugin could not open a file.
    #[error("plugin {plugin} cannot open file {id}")]
    Plugin {
        /// Its name.
        plugin: String,
        /// Number of the file in files.img.
        id: u32,
        /// What the plugin says.
        source: PluginError,
    },
    /// The dump was told that an object is external, and the restore is not given anything for it.
    #[error("{key} was external to the tree; give it back with --inherit-fd fd[N]:{key}")]
    NotInherited {
        /// CRIU's name of the object.
        key: String,
    },
    /// A connection that the user has not asked for.
    #[error("{object} is connected; add --tcp-established to keep the connection, or --tcp-close")]
    TcpEstablished {
        /// The socket.
        object: String,
    },
    /// Packets of the connections could not be held off.
    #[error(transparent)]
    NetworkLock(#[from] NetworkLockError),
    /// The content of a memory file is not there.
    #[error("cannot restore memory file {inode_id}")]
    Memfd {
        /// Its number in memfd.img.
        inode_id: u32,
        /// What went wrong.
        source: MemfdSourceError,
    },
}

impl FileRestoreError {
    /// An error maker for a refused call.
    pub(super) fn refused(
        action: &'static str,
        object: impl Into<String>,
    ) -> impl FnOnce(Errno) -> Self {
        let object = object.into();
        move |source| Self::Refused {
            action,
            object,
            source,
        }
    }

    /// The message of an entry's kind, which has to be there.
    pub(super) fn expect_member<'a, T>(
        entry: &FileEntry,
        member: Option<&'a T>,
        kind: &str,
    ) -> Result<&'a T, Self> {
        member.ok_or_else(|| Self::corrupt(entry.id, format!("it has no member for {kind}")))
    }

    /// An image that contradicts itself.
    pub(super) fn corrupt(id: u32, what: impl Into<String>) -> Self {
        Self::Corrupt {
            id,
            what: what.into(),
        }
    }
}
