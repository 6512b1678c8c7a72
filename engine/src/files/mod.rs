//! Open files: descriptors, their tables, and the files that tasks hold in other ways.
//!
//! Everything is read from outside: the link, status and fdinfo in /proc, a duplicate by pidfd_getfd for
//! what only the open file itself can tell, kcmp for which of them are the same. One module per kind of
//! file (`kind.rs` lists them) holds its dump, its restore and its image.
//!
//! At dump [`FileTable`] collects, frozen, and writes. At restore [`FileStore`] reads and checks
//! everything before anything is made; then the coordinator opens each file once, every task inherits
//! all of them through fork, and a few records turn the inherited table into the dumped one. Files that are
//! too many for one process are kept by others (`shelf`), and the tasks fetch them (`fetch`).

mod anonymous;
mod autofs;
mod bpf;
mod bpf_pin;
mod build_id;
mod chardev;
mod describe;
mod dump;
mod entries;
mod epoll;
mod error;
mod eventfd;
mod external;
mod fanotify;
mod fdinfo;
mod fetch;
mod fifo;
mod finish;
mod ghost;
mod ghost_restore;
mod ids;
mod inotify;
mod io_uring;
mod kind;
mod late;
mod link_remap;
mod locate;
mod lock_watch;
mod locks;
mod memfd;
mod message_queue;
mod mounts;
mod moves;
mod namespace;
mod open;
mod open_file;
mod outside;
mod owner;
mod pattern;
mod pidfd;
mod pipe;
mod pipe_data;
mod plan;
pub mod plugin;
mod policy;
mod pty;
mod pty_data;
mod regular;
mod remap;
mod room;
mod sharing;
mod shelf;
mod signalfd;
mod sockets;
mod store;
mod survey;
mod tables;
mod task_files;
mod timerfd;
mod told;
mod tty;
mod tty_image;
mod unsupported;
mod validate;
mod watched;

pub use dump::{FileStats, FileTable};
pub use error::{FileDumpError, FileRestoreError};
pub use external::InheritedFd;
pub(crate) use lock_watch::LockWatch;
pub use memfd::{MemfdRestore, MemfdSource};
pub use open_file::{ProcLink, ProcReadError};
pub use policy::FilePolicy;
pub use pty::MasterReceiver;
pub use sockets::{NetworkLock, OutsidePeer, SocketDumpOptions, SocketRestoreOptions};
pub(crate) use sockets::{held_off, let_connections_go_on};
pub use store::FileStore;
pub use survey::{Depth, FileSurvey, survey};
pub(crate) use told::{FlagQuestions, Told, ask_flags, watch_locks};

use std::path::PathBuf;

/// What a dump is to do with files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileDumpOptions {
    /// Refuses deleted files of which more bytes than this are allocated; None saves any size.
    pub ghost_limit: Option<u64>,
    /// Gives a temporary second name to deleted files that have other names elsewhere.
    pub link_remap: bool,
    /// Saves locks and leases of files; else they stand in the way.
    pub file_locks: bool,
    /// The tasks are a job of a shell: their terminal stays and the restore supplies another.
    pub shell_job: bool,
    /// Pseudo terminals may have their master outside: the restore makes a new pair and gives it away.
    pub orphan_pts_master: bool,
    /// What is noted about files, to recognise them at restore.
    pub validation: FileValidation,
    /// Objects whose other side is outside of the tree and which the restore will be given, by CRIU's names:
    /// `pipe:[INODE]`, `tty[RDEV:DEV]`, `file[MNT:INODE]`.
    pub external: Vec<String>,
    /// What saves files that no kind of the engine does.
    pub plugins: plugin::Plugins,
    /// What is done with sockets.
    pub sockets: SocketDumpOptions,
}

/// How a restore recognises that a file is still the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileValidation {
    /// By its size.
    FileSize,
    /// By the build id of ELF files, and by size.
    #[default]
    BuildId,
    /// By the time of the last change of content, and by size.
    Mtime,
}

/// What a restore is to do with files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileRestoreOptions {
    /// Accepts files whose permission bits have changed.
    pub skip_rwx_check: bool,
    /// How files are compared with what the image says about them.
    pub validation: FileValidation,
    /// What may have changed about files whose path fits a pattern (`*` is any text); the first pattern
    /// that fits counts, in the place of `validation`.
    pub policies: Vec<(String, FilePolicy)>,
    /// Directory that stands for `/` in all paths.
    pub root: Option<PathBuf>,
    /// Terminals are replaced by the one that the restore runs on.
    pub shell_job: bool,
    /// Who gets the masters of pseudo terminals of which the tree has the slave only.
    pub orphan_masters: Option<MasterReceiver>,
    /// What takes the place of objects of the images.
    pub inherit: Vec<InheritedFd>,
    /// What opens files that no kind of the engine does.
    pub plugins: plugin::Plugins,
    /// What is done with sockets.
    pub sockets: SocketRestoreOptions,
}
