//! The supervisor of one disk.
//!
//! Everything that may wait for the disk (opening its file, mounting, unmounting) happens in a thread
//! of its own: the worker that would answer may have died meanwhile, and the main thread starts the next.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::config::{Denied, Launched, NotServed, ServeConfig, WorkerConfig};
use super::pending::PendingFile;
use super::registry::{Held, Place, Record};
use super::scratch::Scratch;
use super::setup::{SetUp, SetUpError, set_up};
use super::state::State;
use super::worker::READY;
use super::{Registry, chain_of, is_denied, mounting};
use crate::device::{Channel, Device, Lent, View, choose};
use crate::kernel;

/// A worker that lived as long did not die of its start.
const LIVED: Duration = Duration::from_secs(1);
/// Longest pause before the next try.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long the reason of a failure is waited for.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Pause between two tries to unmount a busy file system.
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// What can happen.
enum Event {
    /// A worker ended, after that time.
    Ended(ExitStatus, Duration),
    /// The device is there, or not.
    SetUp(Box<Result<SetUp, SetUpError>>),
    /// Somebody wants the disk down.
    Terminate,
}

/// What all workers inherit.
struct Shared {
    config: ServeConfig,
    prefix: Vec<String>,
    device: Option<Arc<dyn Device>>,
    control: UnixListener,
    state: File,
    pending: File,
    scratch: Option<File>,
    held: Held,
}

/// Runs as the supervisor until the disk is released. `prefix` are the words that make this program
/// a server.
///
/// # Errors
/// The launcher has been told why there is no disk; the text says it once more.
pub fn run(prefix: &[String]) -> Result<(), String> {
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| error.to_string())?;
    let config: ServeConfig = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    kernel::close_from(3).map_err(|error| error.to_string())?;
    if kernel::fork_off().map_err(|error| error.to_string())? {
        return Ok(());
    }
    let registry = Registry::at(&config.run_dir);
    let begun = begin(config, prefix, &registry);
    match begun {
        Ok((supervisor, place)) => supervisor.supervise(&place),
        Err(refused) => {
            // Before the log is there, a word more would come to the launcher's terminal.
            tell(io::stdout(), &Launched::Failed(refused));
            Ok(())
        }
    }
}

fn tell(mut launcher: impl Write, launched: &Launched) {
    // A launcher that has left does not want to know.
    let text = serde_json::to_string(launched).unwrap_or_default();
    let _ = launcher.write_all(text.as_bytes());
}

struct Supervisor {
    shared: Shared,
    launcher: Option<File>,
    events: Receiver<Event>,
    sender: Sender<Event>,
    worker: u32,
    /// The device, held where nothing is mounted from it.
    device: Option<SetUp>,
    failure: Option<SetUpError>,
    /// Somebody wants the disk down.
    is_over: bool,
    failures: u32,
}

fn begin(
    config: ServeConfig,
    prefix: &[String],
    registry: &Registry,
) -> Result<(Supervisor, Place), NotServed> {
    let place = registry
        .place(&config.source)
        .map_err(|error| format!("{}: {error}", config.source.path().display()))?;
    let held = place.hold().map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => NotServed {
            code: 37,
            ..format!("{} is mounted already", config.source.path().display()).into()
        },
        _ => NotServed {
            denied: is_denied(&error).then_some(Denied::Registry),
            ..format!(
                "the disk can't be noted as mounted in {}: {error}",
                registry.dir().display()
            )
            .into()
        },
    })?;
    // As long as the launcher still hears why there is none.
    let device = choose(config.device).map_err(|error| NotServed {
        denied: error.is_denied().then_some(Denied::Device),
        ..error.to_string().into()
    })?;
    let launcher = step_aside(&place).map_err(|error| format!("log: {error}"))?;
    let signals = kernel::signals_as_fd().map_err(|error| error.to_string())?;
    // A name left by a server that was killed together with its supervisor.
    let _ = std::fs::remove_file(&place.control);
    let control = UnixListener::bind(&place.control)
        .map_err(|error| format!("{}: {error}", place.control.display()))?;
    let state = State::create().map_err(|error| error.to_string())?;
    let pending = PendingFile::create().map_err(|error| error.to_string())?;
    let scratch = config.has_scratch().then(Scratch::memory).transpose();
    let scratch = scratch.map_err(|error| error.to_string())?;
    let (sender, events) = channel();
    watch_signals(signals, sender.clone());
    let supervisor = Supervisor {
        shared: Shared {
            config,
            prefix: prefix.to_vec(),
            device: device.map(Arc::from),
            control,
            state,
            pending,
            scratch,
            held,
        },
        launcher: Some(launcher),
        events,
        sender,
        worker: 0,
        device: None,
        failure: None,
        is_over: false,
        failures: 0,
    };
    Ok((supervisor, place))
}

/// Leaves the launcher's terminal and directory; gives back the launcher's ear.
fn step_aside(place: &Place) -> io::Result<File> {
    let launcher = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
    let null = File::open("/dev/null")?;
    let log = File::options().create(true).append(true).open(&place.log)?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&log)?;
    rustix::stdio::dup2_stderr(&log)?;
    std::env::set_current_dir("/")?;
    Ok(launcher.into())
}

fn watch_signals(mut signals: File, sender: Sender<Event>) {
    std::thread::spawn(move || {
        let mut info = [0; 128];
        while signals.read_exact(&mut info).is_ok() && sender.send(Event::Terminate).is_ok() {}
    });
}

impl Supervisor {
    fn supervise(mut self, place: &Place) -> Result<(), String> {
        let first = self.start_first();
        if let Err(refused) = first {
            place.remove();
            let message = refused.message.clone();
            self.report(&Launched::Failed(refused));
            return Err(message);
        }
        self.start_set_up(place);
        let outcome = loop {
            match self.events.recv() {
                Ok(Event::Ended(status, _)) if status.success() => break Ok(()),
                Ok(Event::Ended(status, lived)) => self.start_again(status, lived),
                Ok(Event::SetUp(result)) => self.is_set_up(*result, place),
                Ok(Event::Terminate) => self.terminate(),
                Err(_) => break Err("no thread is left".to_owned()),
            }
        };
        place.remove();
        if self.launcher.is_some() && self.failure.is_none() {
            self.hear_of_failure();
        }
        if let Some(failure) = self.failure.take() {
            self.report(&Launched::Failed(NotServed {
                message: chain_of(&failure),
                code: failure.exit_code(),
                denied: is_denied(&failure).then_some(Denied::Device),
            }));
        }
        outcome
    }

    /// The worker has ended before the device was there: whoever makes it will say so.
    fn hear_of_failure(&mut self) {
        while let Ok(event) = self.events.recv_timeout(LAST_WORDS) {
            if let Event::SetUp(result) = event {
                self.failure = result.err();
                return;
            }
        }
    }

    fn report(&mut self, launched: &Launched) {
        if let Some(launcher) = self.launcher.take() {
            tell(launcher, launched);
        }
    }

    /// Starts the first worker, whose failure is the launcher's business.
    fn start_first(&mut self) -> Result<(), NotServed> {
        let (mut ready, theirs) = io::pipe().map_err(|error| error.to_string())?;
        self.spawn(&theirs, false)
            .map_err(|error| format!("the server can't be started: {error}"))?;
        drop(theirs);
        let mut answer = String::new();
        ready
            .read_to_string(&mut answer)
            .map_err(|error| error.to_string())?;
        if answer == READY {
            return Ok(());
        }
        let silent = || NotServed::from("the server ended at its start".to_owned());
        Err(serde_json::from_str(&answer).unwrap_or_else(|_| silent()))
    }

    fn spawn(&mut self, ready: &io::PipeWriter, restarted: bool) -> io::Result<()> {
        let shared = &self.shared;
        let (hears, closed) = io::pipe()?;
        let (channel, lent) = shared.channel()?;
        let config = WorkerConfig {
            serve: shared.config.clone(),
            channel,
            control: shared.control.as_raw_fd(),
            state: shared.state.as_raw_fd(),
            pending: shared.pending.as_raw_fd(),
            scratch: shared.scratch.as_ref().map(AsRawFd::as_raw_fd),
            ready: ready.as_raw_fd(),
            held: shared.held.as_fd().as_raw_fd(),
            closed: closed.as_raw_fd(),
            restarted,
        };
        let child = shared.inherited([ready, &closed], &lent, || {
            let mut command = Command::new("/proc/self/exe");
            command.arg0("firn").args(&shared.prefix).arg("worker");
            command.arg(serde_json::to_string(&config).map_err(io::Error::other)?);
            command.stdin(Stdio::null()).spawn()
        })?;
        self.worker = child.id();
        if let Some(device) = &shared.device {
            device.lent(child.id());
        }
        wait_for(child, hears, self.sender.clone());
        Ok(())
    }

    fn start_again(&mut self, status: ExitStatus, lived: Duration) {
        self.failures = match lived > LIVED {
            true => 0,
            false => self.failures.saturating_add(1),
        };
        eprintln!("the server ended ({status}); starting it again");
        let pause = Duration::from_millis(5) * (1 << self.failures.min(10));
        if self.failures > 0 {
            std::thread::sleep(pause.min(LONGEST_PAUSE));
        }
        let spawned = io::pipe().and_then(|(_, theirs)| self.spawn(&theirs, true));
        if let Err(error) = spawned {
            eprintln!("the server can't be started: {error}");
            let sender = self.sender.clone();
            std::thread::spawn(move || {
                std::thread::sleep(LONGEST_PAUSE);
                // Counts as a worker that died at its start.
                let _ = sender.send(Event::Ended(failed_status(), Duration::ZERO));
            });
        }
    }

    fn start_set_up(&mut self, place: &Place) {
        let config = self.shared.config.clone();
        let device = self.shared.device.clone();
        let view = self.shared.view();
        let control = place.control.clone();
        let sender = self.sender.clone();
        std::thread::spawn(move || {
            let result = match device {
                Some(device) => set_up(&config, &*device, view, &control),
                None => Ok(SetUp::NONE),
            };
            let _ = sender.send(Event::SetUp(Box::new(result)));
        });
    }

    fn is_set_up(&mut self, result: Result<SetUp, SetUpError>, place: &Place) {
        let set_up = match result {
            Ok(set_up) => set_up,
            Err(error) => {
                // Nothing is open any more: the worker will end, and then the launcher hears of it.
                self.failure = Some(error);
                self.end_worker_without_device();
                return;
            }
        };
        let record = Record {
            source: self.shared.config.source.clone(),
            read_only: self.shared.config.read_only,
            supervisor: rustix::process::getpid().as_raw_nonzero().get(),
            device: set_up.path.clone(),
            via: set_up.via.to_owned(),
            mountpoint: set_up.mountpoint.clone(),
            fs_type: set_up.fs_type.clone(),
            partition_offset: set_up.offset,
            control: place.control.clone(),
        };
        if let Err(error) = place.write(&record) {
            eprintln!("{}: {error}", place.record.display());
        }
        self.device = Some(set_up);
        self.report(&Launched::Ready(record));
        if self.is_over {
            self.terminate();
        }
    }

    /// Takes the mount down and lets go of the device; the worker ends when its last user has.
    fn terminate(&mut self) {
        self.is_over = true;
        let Some(mut device) = self.device.take() else {
            return;
        };
        self.end_worker_without_device();
        std::thread::spawn(move || {
            if let (Some(path), Some(target)) = (&device.path, device.mountpoint.take()) {
                while mounting::is_mounted_at(path, &target) && mounting::unmount(&target).is_err()
                {
                    std::thread::sleep(BUSY_PAUSE);
                }
            }
            drop(device);
        });
    }

    fn end_worker_without_device(&self) {
        let pid = i32::try_from(self.worker).ok().and_then(Pid::from_raw);
        if let (true, Some(pid)) = (self.shared.device.is_none(), pid) {
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
    }
}

impl Shared {
    /// What the next worker gets of the device.
    fn channel(&self) -> io::Result<(Option<Channel>, Vec<OwnedFd>)> {
        match self.device.as_ref().map(|device| device.lend()) {
            None => Ok((None, Vec::new())),
            Some(Ok(Lent::Channel(channel, fds))) => Ok((Some(channel), fds)),
            Some(Ok(Lent::Released)) => {
                // The next worker reads it and closes the image. There is none now that writes here.
                let state = State::open(self.state.try_clone()?)?;
                state.update(|kept| kept.released = true)?;
                Ok((None, Vec::new()))
            }
            Some(Err(error)) => Err(error),
        }
    }

    /// What the first worker has found out that the device is to show.
    fn view(&self) -> View {
        let state = self.state.try_clone().and_then(State::open);
        let view = state.ok().and_then(|state| state.get().view);
        view.unwrap_or(View::WHOLE)
    }

    /// Runs a spawn during which the shared descriptors, and those lent, are inherited.
    fn inherited<T>(
        &self,
        told: [&io::PipeWriter; 2],
        lent: &[OwnedFd],
        spawn: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        // The lock goes along, so that the disk counts as served while a worker lives.
        let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
        fds.extend(lent.iter().map(AsFd::as_fd));
        fds.extend([self.control.as_fd(), self.state.as_fd()]);
        fds.extend([self.pending.as_fd(), self.held.as_fd()]);
        fds.extend(told.map(AsFd::as_fd));
        fds.extend(self.scratch.as_ref().map(AsFd::as_fd));
        for fd in &fds {
            kernel::keep_over_exec(fd)?;
        }
        let spawned = spawn();
        for fd in &fds {
            kernel::close_on_exec(fd)?;
        }
        spawned
    }
}

/// Waits for a worker's death, or for its word that the image is closed.
fn wait_for(mut child: Child, closed: io::PipeReader, sender: Sender<Event>) {
    let begun = Instant::now();
    std::thread::spawn(move || {
        let status = match says_closed(&child, &closed) {
            true => Ok(ExitStatus::default()),
            false => child.wait(),
        };
        if let Ok(status) = status {
            let _ = sender.send(Event::Ended(status, begun.elapsed()));
        }
    });
}

/// Whether a worker has said so before it died. That the pipe has no writer any more says nothing, and that
/// it still has one neither: a tool that was started meanwhile may have it, too.
fn says_closed(child: &Child, closed: &io::PipeReader) -> bool {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let Some(Ok(process)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
        return false;
    };
    loop {
        let mut fds = [
            PollFd::new(closed, PollFlags::IN),
            PollFd::new(&process, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            _ => return fds[0].revents().contains(PollFlags::IN),
        }
    }
}

fn failed_status() -> ExitStatus {
    use std::os::unix::process::ExitStatusExt;
    ExitStatus::from_raw(1 << 8)
}
