//! What is asked of a restore.

use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use super::{RestoreError, RestoreReport};
use crate::cancel::CancelFlag;
use crate::files::plugin::{FilePlugin, Plugins};
use crate::files::{
    FilePolicy, FileRestoreOptions, FileValidation, InheritedFd, MasterReceiver,
    SocketRestoreOptions,
};
use crate::memory::VdsoChoice;
use crate::progress::{Progress, Reporter};
use crate::script::Scripts;
use crate::task::lsm::LabelChoice;

/// Options of a restore; see the methods of [`Restore`].
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    pub(crate) images_dir: PathBuf,
    pub(crate) work_dir: Option<PathBuf>,
    pub(crate) sibling: bool,
    pub(crate) shell_job: bool,
    pub(crate) leave_stopped: bool,
    pub(crate) strict: bool,
    pub(crate) root: Option<PathBuf>,
    pub(crate) skip_rwx_check: bool,
    pub(crate) file_validation: FileValidation,
    pub(crate) file_policies: Vec<(String, FilePolicy)>,
    pub(crate) orphan_masters: Option<MasterReceiver>,
    pub(crate) inherit: Vec<InheritedFd>,
    pub(crate) vdso: VdsoChoice,
    pub(crate) plugins: Plugins,
    pub(crate) scripts: Scripts,
    pub(crate) sockets: SocketRestoreOptions,
    pub(crate) labels: LabelChoice,
}

impl RestoreOptions {
    pub(crate) fn work_dir(&self) -> PathBuf {
        self.work_dir
            .clone()
            .unwrap_or_else(|| self.images_dir.clone())
    }

    pub(crate) fn file_options(&self) -> FileRestoreOptions {
        FileRestoreOptions {
            skip_rwx_check: self.skip_rwx_check,
            validation: self.file_validation,
            policies: self.file_policies.clone(),
            root: self.root.clone(),
            shell_job: self.shell_job,
            orphan_masters: self.orphan_masters.clone(),
            inherit: self.inherit.clone(),
            plugins: self.plugins.clone(),
            sockets: self.sockets.clone(),
        }
    }
}

/// A restore about to be made.
///
/// ```no_run
/// use firn_engine::Restore;
///
/// let mut report = Restore::new("/var/lib/checkpoints/web").run()?;
/// println!("process {} is back", report.pid);
/// let status = report.wait()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Restore {
    options: RestoreOptions,
    reporter: Reporter,
    cancel: CancelFlag,
}

impl Restore {
    /// A restore of the checkpoint in that directory. The tree becomes a child of this process.
    pub fn new(images_dir: impl AsRef<Path>) -> Restore {
        let options = RestoreOptions {
            images_dir: images_dir.as_ref().to_owned(),
            work_dir: None,
            sibling: false,
            shell_job: false,
            leave_stopped: false,
            strict: false,
            root: None,
            skip_rwx_check: false,
            file_validation: FileValidation::default(),
            file_policies: Vec::new(),
            orphan_masters: None,
            inherit: Vec::new(),
            vdso: VdsoChoice::default(),
            plugins: Plugins::default(),
            scripts: Scripts::new(),
            sockets: SocketRestoreOptions::default(),
            labels: LabelChoice::default(),
        };
        Restore {
            options,
            reporter: Reporter::none(),
            cancel: CancelFlag::new(),
        }
    }

    /// Directory of the statistics image; the image directory unless it is set.
    #[must_use]
    pub fn work_dir(mut self, path: impl AsRef<Path>) -> Restore {
        self.options.work_dir = Some(path.as_ref().to_owned());
        self
    }

    /// The tree becomes a child of this process's parent.
    #[must_use]
    pub fn sibling(mut self, yes: bool) -> Restore {
        self.options.sibling = yes;
        self
    }

    /// The tree joins the present session and terminal where it was part of a shell's.
    #[must_use]
    pub fn shell_job(mut self, yes: bool) -> Restore {
        self.options.shell_job = yes;
        self
    }

    /// Leaves the tasks stopped by SIGSTOP.
    #[must_use]
    pub fn leave_stopped(mut self, yes: bool) -> Restore {
        self.options.leave_stopped = yes;
        self
    }

    /// Refuses what can't come back exactly as it was, such as a hard limit above the present one,
    /// instead of reporting it.
    #[must_use]
    pub fn strict(mut self, yes: bool) -> Restore {
        self.options.strict = yes;
        self
    }

    /// Directory that stands for `/` in all paths of the images.
    #[must_use]
    pub fn root(mut self, path: impl AsRef<Path>) -> Restore {
        self.options.root = Some(path.as_ref().to_owned());
        self
    }

    /// Accepts files whose permission bits have changed.
    #[must_use]
    pub fn skip_file_rwx_check(mut self, yes: bool) -> Restore {
        self.options.skip_rwx_check = yes;
        self
    }

    /// How files are compared with what the image says about them.
    #[must_use]
    pub fn file_validation(mut self, method: FileValidation) -> Restore {
        self.options.file_validation = method;
        self
    }

    /// What may have changed about files whose path in the images fits a pattern, in which `*` is any text;
    /// the first pattern that fits counts.
    #[must_use]
    pub fn file_policy(mut self, pattern: impl Into<String>, policy: FilePolicy) -> Restore {
        self.options.file_policies.push((pattern.into(), policy));
        self
    }

    /// Makes a new pair for each pseudo terminal whose master is not part of the tree, and calls `receive` with
    /// its number and its master, as a container's runtime wants them.
    #[must_use]
    pub fn orphan_pts_masters(
        mut self,
        receive: impl Fn(u32, OwnedFd) + Send + Sync + 'static,
    ) -> Restore {
        self.options.orphan_masters = Some(MasterReceiver::new(receive));
        self
    }

    /// Puts a descriptor of this process in the place of an object of the images, which CRIU's name tells:
    /// `pipe:[INODE]`, `socket:[INODE]`, `tty[RDEV:DEV]`, `file[MNT:INODE]`, `/memfd:NAME`, or a path
    /// without its leading slash. It must stay open until the restore is done.
    #[must_use]
    pub fn inherit_fd(mut self, fd: RawFd, key: impl Into<String>) -> Restore {
        let key = key.into();
        self.options.inherit.push(InheritedFd { fd, key });
        self
    }

    /// Keeps the image's vdso code even where the running kernel's is the same, and leads it to the
    /// kernel's: for tests of what happens on another kernel.
    #[doc(hidden)]
    #[must_use]
    pub fn redirect_vdso(mut self, yes: bool) -> Restore {
        self.options.vdso = if yes {
            VdsoChoice::Redirect
        } else {
            VdsoChoice::ByContent
        };
        self
    }

    /// What is done with sockets.
    #[must_use]
    pub fn sockets(mut self, options: SocketRestoreOptions) -> Restore {
        self.options.sockets = options;
        self
    }

    /// Opens files that a plugin has saved; may repeat, see [`crate::files::plugin`].
    #[must_use]
    pub fn plugin(mut self, plugin: impl FilePlugin + 'static) -> Restore {
        self.options.plugins.add(plugin);
        self
    }

    /// Security labels of confined tasks.
    #[must_use]
    pub fn labels(mut self, choice: LabelChoice) -> Restore {
        self.options.labels = choice;
        self
    }

    /// Scripts that run before and after.
    #[must_use]
    pub fn scripts(mut self, scripts: Scripts) -> Restore {
        self.options.scripts = scripts;
        self
    }

    /// Calls `callback` whenever a phase begins and while bytes are copied.
    #[must_use]
    pub fn progress(mut self, callback: impl FnMut(Progress) + Send + 'static) -> Restore {
        self.reporter = Reporter::new(callback);
        self
    }

    /// Stops and takes everything back when the flag is raised.
    #[must_use]
    pub fn cancel(mut self, flag: CancelFlag) -> Restore {
        self.cancel = flag;
        self
    }

    /// The programs that would run, in words; no task is made.
    ///
    /// # Errors
    /// As of [`Restore::run`], as far as images and files go.
    pub fn plan(self) -> Result<String, RestoreError> {
        super::plan(&self.options)
    }

    /// Restores the tree.
    ///
    /// No library code of this process runs in the tasks, so the caller may have other threads.
    ///
    /// # Errors
    /// See [`RestoreError`]. Whatever had been made is gone then.
    pub fn run(self) -> Result<RestoreReport, RestoreError> {
        super::run(&self.options, self.reporter, &self.cancel)
    }
}
