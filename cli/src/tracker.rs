//! Keeping track of written memory between commands: a process of its own holds the userfaultfds.
//!
//! ```text
//! dump ── tasks and descriptors, a line on its standard input ──> holder   fetches the descriptors, listens
//! dump ── connects to the tree's abstract socket ──────────────> holder   tells tasks and descriptors
//!      <─ fetches duplicates by pidfd_getfd
//!      ── `forget` ────────────────────────────────────────────> holder   ends
//! ```
//!
//! The holder also ends when the memory of all its tasks is gone. If it is killed, the kernel tracks no
//! longer, and the next dump is a full one.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use firn_engine::Pid;
use firn_engine::memory::{Tracker, Trackers};
use firn_sys::uffd::Uffd;
use firn_sys::{pidfd, session, socket};
use serde::{Deserialize, Serialize};

use crate::output::Failure;

/// Longest line that a holder sends or takes: some twenty thousand tasks.
const MAX_LINE: u64 = 1 << 20;
/// How long the other side may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a holder looks whether its tasks are still there.
const INTERVAL: Duration = Duration::from_secs(2);
/// What ends a holder.
const FORGET: &str = "forget\n";

/// A tracker, as one process tells it another.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    root: i32,
    since: String,
    /// Tasks, and the descriptors that the teller has for them.
    tasks: Vec<(i32, i32)>,
}

impl Told {
    fn of(tracker: &Tracker) -> Told {
        let tasks = tracker.tasks.iter();
        Told {
            root: tracker.root.raw(),
            since: tracker.since.clone(),
            tasks: tasks
                .map(|(pid, uffd)| (pid.raw(), uffd.fd().as_raw_fd()))
                .collect(),
        }
    }

    /// Fetches the descriptors from the teller.
    fn fetch(self, teller: Pid) -> io::Result<Tracker> {
        let teller = pidfd::open(teller)?;
        let fetch = |(pid, fd): (i32, i32)| -> firn_sys::Result<(Pid, Uffd)> {
            Ok((
                Pid::from_raw(pid),
                Uffd::from_fd(pidfd::getfd(&teller, fd)?),
            ))
        };
        let tasks: firn_sys::Result<_> = self.tasks.into_iter().map(fetch).collect();
        Ok(Tracker {
            root: Pid::from_raw(self.root),
            since: self.since,
            tasks: tasks?,
        })
    }

    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        to.write_all(&line)
    }

    fn read(from: impl Read) -> io::Result<Told> {
        let mut line = String::new();
        BufReader::new(from.take(MAX_LINE)).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

/// Trackers in processes of their own.
#[derive(Debug)]
pub struct Holders;

impl Trackers for Holders {
    fn keep(&self, tracker: Tracker) -> io::Result<()> {
        let (own, other) = UnixStream::pair()?;
        // What this process was given would stay open for as long as the tasks live.
        session::close_on_exec_from(3)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("firn").arg("hold-tracker").current_dir("/");
        command
            .stdin(OwnedFd::from(other))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        drop(command);
        own.set_read_timeout(Some(PATIENCE))?;
        Told::of(&tracker).write(&mut &own)?;
        let mut answer = String::new();
        BufReader::new(own.take(MAX_LINE)).read_line(&mut answer)?;
        match answer.trim_end() {
            "kept" => Ok(()),
            "" => Err(io::Error::other("the process that keeps track has ended")),
            why => Err(io::Error::other(why.to_owned())),
        }
    }

    fn find(&self, root: Pid) -> Option<Tracker> {
        let (holder, told) = connect(root).ok()?;
        let told = told.fetch(holder.pid);
        told.inspect_err(|error| tracing::warn!("the tracker of task {root} is lost: {error}"))
            .ok()
    }

    fn forget(&self, root: Pid) -> io::Result<()> {
        let (mut holder, _) = match connect(root) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(()),
            connected => connected?,
        };
        holder.stream.write_all(FORGET.as_bytes())?;
        holder.stream.shutdown(Shutdown::Write)?;
        // It closes the connection when it has let go of the name.
        holder.stream.read_to_end(&mut Vec::new()).map(drop)
    }
}

/// A connection to the process that keeps track of a tree.
struct Holder {
    stream: UnixStream,
    pid: Pid,
}

fn connect(root: Pid) -> io::Result<(Holder, Told)> {
    let stream = UnixStream::connect_addr(&address(root)?)?;
    let who = socket::peer_credentials(&stream)?;
    if who.uid != 0 && who.uid != firn_sys::task::effective_uid() {
        return Err(io::Error::other("somebody else has the name of the socket"));
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    let told = Told::read(&stream)?;
    let pid = Pid::from_raw(who.pid);
    Ok((Holder { stream, pid }, told))
}

/// Name of the socket for a tree; pids count in the pid namespace, names in the network namespace.
fn address(root: Pid) -> io::Result<SocketAddr> {
    let namespace = std::fs::read_link("/proc/self/ns/pid")?;
    let namespace = namespace.to_string_lossy().into_owned();
    SocketAddr::from_abstract_name(format!("firn-tracker-{namespace}-{root}"))
}

/// `firn hold-tracker`: takes a tracker from its parent and keeps it.
pub fn hold() -> Result<u8, Failure> {
    let failed = |error| Failure::io("nothing can be tracked", &error);
    let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let mut parent = UnixStream::from(stdin);
    match begin(&mut parent) {
        Ok((tracker, listener)) => {
            parent.write_all(b"kept\n").map_err(failed)?;
            drop(parent);
            serve(&tracker, listener).map_err(failed)?;
            Ok(0)
        }
        Err(error) => {
            let _ = writeln!(parent, "{error}");
            Err(failed(error))
        }
    }
}

fn begin(parent: &mut UnixStream) -> io::Result<(Tracker, UnixListener)> {
    session::start()?;
    parent.set_read_timeout(Some(PATIENCE))?;
    let told = Told::read(&*parent)?;
    let teller = Pid::from_raw(socket::peer_credentials(&*parent)?.pid);
    let tracker = told.fetch(teller)?;
    let listener = UnixListener::bind_addr(&address(tracker.root)?)?;
    Ok((tracker, listener))
}

/// Tells who asks, until told to forget, or until there is nothing left to be tracked.
fn serve(tracker: &Tracker, listener: UnixListener) -> io::Result<()> {
    socket::set_receive_timeout(&listener, INTERVAL)?;
    while tracker.is_alive() {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        // One who does not read or goes away has no say.
        if let Ok(true) = answer(tracker, &mut stream) {
            // The name is free when the other side sees the end of the connection.
            drop(listener);
            return Ok(());
        }
    }
    Ok(())
}

/// Tells the tracker to one; whether that one says that it is to be forgotten.
fn answer(tracker: &Tracker, stream: &mut UnixStream) -> io::Result<bool> {
    let who = socket::peer_credentials(&*stream)?;
    if who.uid != 0 && who.uid != firn_sys::task::effective_uid() {
        return Ok(false);
    }
    stream.set_write_timeout(Some(PATIENCE))?;
    Told::of(tracker).write(stream)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut said = String::new();
    stream.take(64).read_to_string(&mut said)?;
    Ok(said == FORGET)
}
