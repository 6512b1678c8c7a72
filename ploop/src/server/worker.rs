//! A worker: opens the image, answers requests, ends when the device is released.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, Signal};

use super::config::{Denied, NotServed, WorkerConfig};
use super::pending::PendingFile;
use super::scratch::Scratch;
use super::state::State;
use super::{chain_of, conversation, is_denied, open};
use crate::DiskError;
use crate::device::{Ended, Export, View};
use crate::folder::{FolderError, OpenOptions};
use crate::guest::gpt;
use crate::kernel;
use crate::tracker::Begin;

/// Why a worker ended otherwise than it should. The supervisor starts another one.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Its orders make no sense.
    #[error("the worker's configuration is wrong: {0}")]
    Config(String),
    /// A step of the kernel's.
    #[error("{what} failed")]
    Step {
        /// The step.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The image.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The descriptor.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The channel to the kernel broke.
    #[error("the channel to the kernel broke")]
    Channel,
}

impl WorkerError {
    /// The exit status that the original command line gives for it.
    fn exit_code(&self) -> u8 {
        match self {
            WorkerError::Config(_) => 38,
            WorkerError::Step { .. } => 12,
            WorkerError::Disk(error) => error.exit_code(),
            WorkerError::Folder(error) => error.exit_code(),
            WorkerError::Channel => 2,
        }
    }
}

/// What the first worker tells its supervisor when requests are answered; otherwise it is a
/// [`NotServed`].
pub(super) const READY: &str = "ready";

fn step(what: &'static str) -> impl FnOnce(io::Error) -> WorkerError {
    move |source| WorkerError::Step { what, source }
}

/// What a worker's threads share.
pub(super) struct Worker {
    pub(super) export: Arc<Export>,
    pub(super) state: State,
    pub(super) config: WorkerConfig,
    /// How images are opened.
    pub(super) options: OpenOptions,
    /// The file system frozen by a client, held open.
    pub(super) frozen: Mutex<Option<File>>,
    /// Where a client's wish to end goes.
    pub(super) ended: Sender<Ended>,
}

/// Runs until the device is released and the image closed.
///
/// # Errors
/// The disk can't be opened, served or closed.
pub fn run(text: &str) -> Result<(), WorkerError> {
    let config: WorkerConfig =
        serde_json::from_str(text).map_err(|error| WorkerError::Config(error.to_string()))?;
    let adopt = |fd| kernel::adopt_fd(fd).map_err(step("taking over a descriptor"));
    let mut ready: File = adopt(config.ready)?.into();
    let (held, mut closed) = (adopt(config.held)?, File::from(adopt(config.closed)?));
    let channel = config.channel.clone();
    let result = serve(config, &mut ready);
    if result.is_ok() && channel.is_none_or(|channel| channel.is_left_behind()) {
        // To take down what this process had under way takes the kernel some 20 ms, for which nobody has to
        // wait: the disk can be served by others now. A supervisor that has died does not want to know.
        drop(held);
        let _ = closed.write_all(&[1]);
    }
    if let Err(error) = &result {
        // The first worker's supervisor listens; later ones' read it in the log.
        let why = NotServed {
            message: chain_of(error),
            code: error.exit_code(),
            denied: is_denied(error).then_some(Denied::Disk),
        };
        let answer = serde_json::to_vec(&why).unwrap_or_default();
        let _ = ready.write_all(&answer);
        eprintln!("{why}");
    }
    result
}

fn serve(config: WorkerConfig, ready: &mut File) -> Result<(), WorkerError> {
    let adopt = |fd| kernel::adopt_fd(fd).map_err(step("taking over a descriptor"));
    kernel::become_io_flusher();
    let signals = kernel::signals_as_fd().map_err(step("taking signals"))?;
    let listener = UnixListener::from(adopt(config.control)?);
    let state = State::open(adopt(config.state)?.into()).map_err(step("reading the state"))?;
    let pending = adopt(config.pending)?.into();
    let pending = PendingFile::open(pending).map_err(step("reading the pending changes"))?;
    let options = open::options(&config, &Arc::new(pending));
    let mut disk = open::open(&config.serve, &options)?;
    if let Some(scratch) = config.scratch {
        let scratch = Scratch::new(disk, adopt(scratch)?.into());
        disk = Arc::new(scratch.map_err(step("reading the scratch memory"))?);
    }
    if state.get().released {
        return Ok(disk.close()?);
    }
    let export = Arc::new(Export::new(disk));
    for spec in state.get().listeners {
        // What the last worker had marked is lost with it.
        let name = spec.name.clone();
        if let Err(error) = export.trackers().start(spec, Begin::Dirty) {
            eprintln!("listener {name}: {error}");
        }
    }
    let (ended, end) = channel();
    watch_signals(signals, ended.clone(), config.channel.is_some());
    let worker = Arc::new(Worker {
        export: Arc::clone(&export),
        state,
        config,
        options,
        frozen: Mutex::new(None),
        ended: ended.clone(),
    });
    let view = worker.view().map_err(step("reading the partition table"))?;
    if let Some(channel) = &worker.config.channel {
        let threads = worker.config.serve.threads;
        let serving = channel.serve(&export, view, threads, &ended);
        serving.map_err(step("starting to answer the kernel"))?;
    }
    worker.thaw_leftover();
    conversation::listen(Arc::clone(&worker), listener).map_err(step("starting threads"))?;
    // A supervisor that starts a worker again does not listen.
    let _ = ready.write_all(READY.as_bytes());
    *ready = File::open("/dev/null").map_err(step("opening /dev/null"))?;
    wait(&worker, &end)
}

fn wait(worker: &Worker, end: &std::sync::mpsc::Receiver<Ended>) -> Result<(), WorkerError> {
    match end.recv() {
        Ok(Ended::Released | Ended::Unmounted) => {
            let state = worker.state.update(|kept| kept.released = true);
            state.map_err(step("writing the state"))?;
            Ok(worker.export.disk().close()?)
        }
        Ok(Ended::Failed) | Err(_) => Err(WorkerError::Channel),
    }
}

/// SIGTERM is for the supervisor, who can unmount; SIGINT ends a worker that has no device.
fn watch_signals(mut signals: File, ended: Sender<Ended>, has_device: bool) {
    let supervisor = rustix::process::getppid();
    std::thread::spawn(move || {
        let mut info = [0u8; 128];
        while signals.read_exact(&mut info).is_ok() {
            let signal = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            let interrupted = i32::try_from(signal) == Ok(libc::SIGINT);
            match (interrupted && !has_device, supervisor) {
                (true, _) => drop(ended.send(Ended::Released)),
                (false, Some(supervisor)) if !interrupted => forward(supervisor),
                _ => {}
            }
        }
    });
}

fn forward(supervisor: Pid) {
    // It may have died; then there is nobody who could unmount.
    let _ = rustix::process::kill_process(supervisor, Signal::TERM);
}

impl Worker {
    /// What the device shows. It stays the same for all workers of a disk.
    fn view(&self) -> io::Result<View> {
        if let Some(view) = self.state.get().view {
            return Ok(view);
        }
        let size_bytes = self.export.size_bytes();
        let partition = match self.config.serve.mount {
            Some(_) => gpt::first_partition(&*self.export, size_bytes)?,
            None => None,
        };
        let view = partition.map_or(View::WHOLE, |found| View::of(&found, size_bytes));
        self.state.update(|kept| kept.view = Some(view))?;
        Ok(view)
    }

    /// The directory asked for, or where the server has mounted the disk.
    fn directory<'a>(&'a self, dir: Option<&'a Path>) -> io::Result<&'a Path> {
        let mounted = self.config.serve.mount.as_ref().map(|mount| &*mount.target);
        dir.or(mounted).ok_or_else(|| {
            io::Error::other("the server has mounted nothing; name the file system's directory")
        })
    }

    /// Has the file system at a directory write out what it caches.
    pub(super) fn write_out(&self, dir: Option<&Path>) -> io::Result<()> {
        Ok(rustix::fs::syncfs(File::open(self.directory(dir)?)?)?)
    }

    /// Freezes the file system at a directory, unless it is frozen.
    pub(super) fn freeze(&self, dir: Option<&Path>) -> io::Result<()> {
        let dir = self.directory(dir)?;
        let mut frozen = self.lock_frozen();
        if frozen.is_some() {
            return Err(io::Error::other("it is frozen already"));
        }
        let file = File::open(dir)?;
        rustix::fs::syncfs(&file)?;
        let name: PathBuf = dir.to_owned();
        // Written down before: a freeze that nobody knows of is worse than a thaw of nothing.
        self.state.update(|kept| kept.frozen = Some(name))?;
        if let Err(error) = kernel::freeze_fs(file.as_fd()) {
            self.state.update(|kept| kept.frozen = None)?;
            // Whoever stopped the writers may have done it this way; it is theirs to thaw.
            return match error.kind() {
                io::ErrorKind::ResourceBusy => Ok(()),
                _ => Err(error),
            };
        }
        *frozen = Some(file);
        Ok(())
    }

    /// Lets it go on.
    pub(super) fn thaw(&self) -> io::Result<()> {
        if let Some(file) = self.lock_frozen().take() {
            kernel::thaw_fs(file.as_fd())?;
        }
        self.state.update(|kept| kept.frozen = None)
    }

    /// Thaws what the worker before froze: the client that wanted it has lost its connection.
    fn thaw_leftover(&self) {
        let Some(dir) = self.state.get().frozen else {
            return;
        };
        match File::open(&dir).and_then(|file| kernel::thaw_fs(file.as_fd())) {
            Ok(()) => eprintln!("{} is thawed again", dir.display()),
            Err(error) => eprintln!("{}: {error}", dir.display()),
        }
        if let Err(error) = self.state.update(|kept| kept.frozen = None) {
            eprintln!("state: {error}");
        }
    }

    fn lock_frozen(&self) -> std::sync::MutexGuard<'_, Option<File>> {
        self.frozen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
