//! What is asked of a dump.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use firn_sys::Pid;

use super::{DumpError, DumpReport};
use crate::cancel::CancelFlag;
use crate::files::plugin::{FilePlugin, Plugins};
use crate::files::{FileDumpOptions, FileValidation, SocketDumpOptions};
use crate::inject::Journal;
use crate::memory::{Trackers, TrackersHere};
use crate::progress::{Progress, Reporter};
use crate::script::Scripts;

/// What becomes of the tasks after a successful dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Leave {
    /// They are killed.
    #[default]
    Killed,
    /// They go on.
    Running,
    /// They stay, stopped by SIGSTOP.
    Stopped,
}

/// Options of a dump; see the methods of [`Dump`].
#[derive(Debug, Clone)]
pub struct DumpOptions {
    pub(crate) pid: Pid,
    pub(crate) images_dir: PathBuf,
    pub(crate) work_dir: Option<PathBuf>,
    pub(crate) leave: Leave,
    pub(crate) shell_job: bool,
    pub(crate) orphan_pts_master: bool,
    pub(crate) ghost_limit: Option<u64>,
    pub(crate) link_remap: bool,
    pub(crate) file_locks: bool,
    pub(crate) external: Vec<String>,
    pub(crate) timeout: Duration,
    pub(crate) prev_images_dir: Option<PathBuf>,
    pub(crate) track_mem: bool,
    pub(crate) trackers: Arc<dyn Trackers>,
    pub(crate) file_validation: FileValidation,
    pub(crate) freeze_cgroup: Option<PathBuf>,
    pub(crate) plugins: Plugins,
    pub(crate) scripts: Scripts,
    pub(crate) sockets: SocketDumpOptions,
    pub(crate) journal: Option<Journal>,
}

impl DumpOptions {
    pub(crate) fn work_dir(&self) -> PathBuf {
        self.work_dir
            .clone()
            .unwrap_or_else(|| self.images_dir.clone())
    }

    pub(crate) fn file_options(&self) -> FileDumpOptions {
        FileDumpOptions {
            ghost_limit: self.ghost_limit,
            link_remap: self.link_remap,
            file_locks: self.file_locks,
            shell_job: self.shell_job,
            orphan_pts_master: self.orphan_pts_master,
            validation: self.file_validation,
            external: self.external.clone(),
            plugins: self.plugins.clone(),
            sockets: self.sockets.clone(),
        }
    }
}

/// A dump about to be made.
///
/// ```no_run
/// use firn_engine::{Dump, Leave, Pid};
///
/// let report = Dump::new(Pid::from_raw(4711))
///     .images_dir("/var/lib/checkpoints/web")
///     .leave(Leave::Running)
///     .run()?;
/// println!("{} tasks, frozen for {:?}", report.tasks, report.frozen);
/// # Ok::<(), firn_engine::DumpError>(())
/// ```
pub struct Dump {
    options: DumpOptions,
    reporter: Reporter,
    cancel: CancelFlag,
}

impl Dump {
    /// A dump of the process tree below `pid`, into the current directory.
    pub fn new(pid: Pid) -> Dump {
        let options = DumpOptions {
            pid,
            images_dir: PathBuf::from("."),
            work_dir: None,
            leave: Leave::Killed,
            shell_job: false,
            orphan_pts_master: false,
            ghost_limit: None,
            link_remap: false,
            file_locks: false,
            external: Vec::new(),
            timeout: Duration::from_secs(10),
            prev_images_dir: None,
            track_mem: false,
            trackers: TrackersHere::of_this_process(),
            file_validation: FileValidation::default(),
            freeze_cgroup: None,
            plugins: Plugins::default(),
            scripts: Scripts::new(),
            sockets: SocketDumpOptions::default(),
            journal: None,
        };
        Dump {
            options,
            reporter: Reporter::none(),
            cancel: CancelFlag::new(),
        }
    }

    /// Directory that the images go to; it must exist.
    #[must_use]
    pub fn images_dir(mut self, path: impl AsRef<Path>) -> Dump {
        self.options.images_dir = path.as_ref().to_owned();
        self
    }

    /// Directory of the statistics image; the image directory unless it is set.
    #[must_use]
    pub fn work_dir(mut self, path: impl AsRef<Path>) -> Dump {
        self.options.work_dir = Some(path.as_ref().to_owned());
        self
    }

    /// What becomes of the tasks.
    #[must_use]
    pub fn leave(mut self, leave: Leave) -> Dump {
        self.options.leave = leave;
        self
    }

    /// The tree is a job of a shell: session, group and terminal from outside are allowed.
    #[must_use]
    pub fn shell_job(mut self, yes: bool) -> Dump {
        self.options.shell_job = yes;
        self
    }

    /// Pseudo terminals whose master is outside of the tree are allowed; the restore makes new pairs and
    /// hands the masters out ([`Restore::orphan_pts_masters`](crate::Restore::orphan_pts_masters)).
    #[must_use]
    pub fn orphan_pts_master(mut self, yes: bool) -> Dump {
        self.options.orphan_pts_master = yes;
        self
    }

    /// Refuses deleted files of which more than this many bytes are allocated.
    #[must_use]
    pub fn ghost_limit(mut self, bytes: u64) -> Dump {
        self.options.ghost_limit = Some(bytes);
        self
    }

    /// Gives deleted files that have other names a temporary one next to their old place.
    #[must_use]
    pub fn link_remap(mut self, yes: bool) -> Dump {
        self.options.link_remap = yes;
        self
    }

    /// Saves locks and leases of files, which otherwise stand in the way of a dump.
    #[must_use]
    pub fn file_locks(mut self, yes: bool) -> Dump {
        self.options.file_locks = yes;
        self
    }

    /// Declares an object external: somebody outside of the tree has the other side of a pipe
    /// (`pipe:[INODE]`), of a terminal (`tty[RDEV:DEV]`), or will supply a file (`file[MNT:INODE]`). The
    /// restore must be given it ([`Restore::inherit_fd`](crate::Restore::inherit_fd)).
    #[must_use]
    pub fn external(mut self, key: impl Into<String>) -> Dump {
        self.options.external.push(key.into());
        self
    }

    /// How long stopping the tree may take; 10 s unless it is set.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Dump {
        self.options.timeout = timeout;
        self
    }

    /// Directory of the previous images, relative to the image directory.
    #[must_use]
    pub fn prev_images_dir(mut self, path: impl AsRef<Path>) -> Dump {
        self.options.prev_images_dir = Some(path.as_ref().to_owned());
        self
    }

    /// Tracks which pages are written to from now on, if the tasks go on, so that a following dump that has
    /// these images as its previous ones saves no others. Who keeps track is told by [`Dump::trackers`].
    #[must_use]
    pub fn track_mem(mut self, yes: bool) -> Dump {
        self.options.track_mem = yes;
        self
    }

    /// Who keeps track of written pages between dumps; unless it is set, this process does.
    #[must_use]
    pub fn trackers(mut self, trackers: Arc<dyn Trackers>) -> Dump {
        self.options.trackers = trackers;
        self
    }

    /// What is noted about files, to recognise them at restore.
    #[must_use]
    pub fn file_validation(mut self, method: FileValidation) -> Dump {
        self.options.file_validation = method;
        self
    }

    /// Freezes this cgroup (v2) while the tree is stopped, instead of the one found for it.
    #[must_use]
    pub fn freeze_cgroup(mut self, path: impl AsRef<Path>) -> Dump {
        self.options.freeze_cgroup = Some(path.as_ref().to_owned());
        self
    }

    /// What is done with sockets; by default connections to the outside are refused.
    #[must_use]
    pub fn sockets(mut self, options: SocketDumpOptions) -> Dump {
        self.options.sockets = options;
        self
    }

    /// Saves files that no kind of the engine does; may repeat, see [`crate::files::plugin`].
    #[must_use]
    pub fn plugin(mut self, plugin: impl FilePlugin + 'static) -> Dump {
        self.options.plugins.add(plugin);
        self
    }

    /// Scripts that run before and after.
    #[must_use]
    pub fn scripts(mut self, scripts: Scripts) -> Dump {
        self.options.scripts = scripts;
        self
    }

    /// Calls `callback` whenever a phase begins and while bytes are copied.
    #[must_use]
    pub fn progress(mut self, callback: impl FnMut(Progress) + Send + 'static) -> Dump {
        self.reporter = Reporter::new(callback);
        self
    }

    /// Notes what is changed in the tasks for a moment, so that another process can put them back should this one be
    /// killed: see [`repair`](crate::inject::repair).
    #[must_use]
    pub fn journal(mut self, journal: Option<Journal>) -> Dump {
        self.options.journal = journal;
        self
    }

    /// Stops and takes everything back when the flag is raised.
    #[must_use]
    pub fn cancel(mut self, flag: CancelFlag) -> Dump {
        self.cancel = flag;
        self
    }

    /// Dumps the tree.
    ///
    /// The calling thread traces the tasks meanwhile; it should be blocked in nothing else.
    ///
    /// # Errors
    /// See [`DumpError`]. The tasks then go on as they were and nothing that was written is left.
    pub fn run(self) -> Result<DumpReport, DumpError> {
        super::run(&self.options, self.reporter, &self.cancel)
    }
}
