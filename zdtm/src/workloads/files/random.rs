//! Descriptors that come about at random: files, pipes, sockets and others, some of them twice, sent, inherited,
//! closed on one side.
//!
//! Each task compares its own with what it saw before, and the root which of all are one open file.
//! `FIRN_ZDTM_SEED` names another number to grow from.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};

use crate::random::Random;
use crate::sys;
use crate::{Child, Stage, Workload, proc};

pub static DESCRIPTORS: Workload = Workload::new(
    "files/random",
    "tasks with descriptors grown at random: kinds, flags, positions, queues, and who shares what",
    descriptors,
)
// Whose peer was closed is connected to the kernel, which is outside.
.dump_options(&["--tcp-established"])
.restore_options(&["--tcp-established"]);

const STEPS: usize = 34;
const GENERATIONS: u32 = 3;
/// Numbers that dup2 is asked for.
const HIGH: RawFd = 100;

/// What is seen of a descriptor: what it leads to, lines of its fdinfo, and what waits to be received first.
type Seen = (String, Vec<String>, Option<(Vec<u8>, usize)>);

struct Holder<'a> {
    stage: &'a Stage,
    random: Random,
    held: Vec<OwnedFd>,
    generation: u32,
}

impl Holder<'_> {
    fn some(&mut self) -> Option<&OwnedFd> {
        if self.held.is_empty() {
            return None;
        }
        let nth = self.random.index(self.held.len());
        Some(&self.held[nth])
    }

    fn flags(&mut self, from: &[i32]) -> i32 {
        let chosen = |flag: &&i32| self.random.below(3) == 0 && **flag != 0;
        from.iter().filter(chosen).fold(0, |all, flag| all | flag)
    }

    /// One random step. What the kernel refuses at this moment is left out.
    fn step(&mut self) -> Result<()> {
        match self.random.below(15) {
            0 | 1 => self.open()?,
            2 | 3 => self.pipe()?,
            4 => self.sockets()?,
            5 => self.internet()?,
            6 | 7 => self.other()?,
            8 => {
                let copy = self.some().map(sys::dup).transpose()?;
                self.held.extend(copy);
            }
            9 => self.dup_high()?,
            10 => {
                if !self.held.is_empty() {
                    let nth = self.random.index(self.held.len());
                    self.held.swap_remove(nth);
                }
            }
            11 => {
                let flags = self.flags(&[libc::O_NONBLOCK, libc::O_APPEND]);
                let close = i64::from(self.random.below(2) == 0);
                if let Some(fd) = self.some() {
                    sys::fcntl(fd, libc::F_SETFD, close)?;
                    let _ = sys::fcntl(fd, libc::F_SETFL, flags.into());
                }
            }
            12 => {
                let to = i64::try_from(self.random.below(5000))?;
                let _ = self.some().map(|fd| sys::seek(fd, to, libc::SEEK_SET));
            }
            13 => self.send(),
            _ => self.watch()?,
        }
        Ok(())
    }

    fn open(&mut self) -> Result<()> {
        let name = format!("file.{}.{}", sys::pid(), self.random.below(1 << 30));
        let path = self.stage.path(&name);
        fs::write(&path, vec![b'x'; 3000])?;
        let kinds = [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_PATH];
        let kind = kinds[self.random.index(kinds.len())];
        let more = self.flags(&[libc::O_APPEND, libc::O_NONBLOCK, libc::O_CLOEXEC]);
        self.held.push(sys::open(&path, kind | more)?);
        match self.random.below(4) {
            0 => fs::remove_file(&path)?,
            1 => self.held.push(sys::open(
                self.stage.path(""),
                libc::O_DIRECTORY | libc::O_CLOEXEC,
            )?),
            2 => self.held.push(sys::open(&path, libc::O_RDWR)?),
            _ => {}
        }
        Ok(())
    }

    fn pipe(&mut self) -> Result<()> {
        let flags = self.flags(&[libc::O_NONBLOCK, libc::O_DIRECT, libc::O_CLOEXEC]);
        let (reader, writer) = sys::pipe(flags)?;
        for _ in 0..self.random.below(3) {
            let len = 1 + self.random.index(300);
            sys::write(&writer, &vec![b'p'; len])?;
        }
        match self.random.below(4) {
            0 => self.held.push(reader),
            1 => self.held.push(writer),
            _ => self.held.extend([reader, writer]),
        }
        Ok(())
    }

    fn sockets(&mut self) -> Result<()> {
        let kinds = [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET];
        let kind = kinds[self.random.index(kinds.len())];
        let flags = self.flags(&[libc::SOCK_NONBLOCK, libc::SOCK_CLOEXEC]);
        let (one, other) = sys::socket_pair(kind | flags)?;
        for from in [&one, &other] {
            let len = 1 + self.random.index(300);
            if self.random.below(2) == 0 {
                sys::send_message(from, &vec![b's'; len], None, &[])?;
            }
        }
        match self.random.below(4) {
            0 => self.held.push(one),
            1 => {
                self.held.push(one);
                sys::shutdown(&other, libc::SHUT_WR)?;
                self.held.push(other);
            }
            _ => self.held.extend([one, other]),
        }
        Ok(())
    }

    /// A connection over TCP, perhaps half closed, or two connected UDP sockets, perhaps with something in their queues.
    fn internet(&mut self) -> Result<()> {
        let len = 1 + self.random.index(300);
        let (one, other): (OwnedFd, OwnedFd) = match self.random.below(2) {
            0 => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                let one = TcpStream::connect(listener.local_addr()?)?;
                let mut other = listener.accept()?.0;
                if self.random.below(2) == 0 {
                    other.write_all(&vec![b't'; len])?;
                    // Until it is there, what waits would grow meanwhile.
                    one.peek(&mut [0; 1])?;
                }
                if self.random.below(3) == 0 {
                    one.shutdown(Shutdown::Write)?;
                    other.read_exact(&mut [0; 1]).expect_err("the end");
                }
                (one.into(), other.into())
            }
            _ => {
                let [one, other] = [(); 2].map(|()| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)));
                let (one, other) = (one?, other?);
                one.connect(other.local_addr()?)?;
                other.connect(one.local_addr()?)?;
                for _ in 0..self.random.below(3) {
                    one.send(&vec![b'u'; len])?;
                }
                (one.into(), other.into())
            }
        };
        self.held.extend([one, other]);
        Ok(())
    }

    /// Watches the directory of this run, in which nothing happens after all are ready.
    fn inotify(&mut self) -> Result<OwnedFd> {
        let watching = sys::inotify(self.flags(&[libc::IN_NONBLOCK, libc::IN_CLOEXEC]))?;
        for _ in 0..self.random.below(3) {
            let masks = [libc::IN_DELETE_SELF, libc::IN_MOVE_SELF, libc::IN_ATTRIB];
            let mask = masks[self.random.index(masks.len())];
            sys::add_watch(&watching, &self.stage.path(""), mask)?;
        }
        Ok(watching)
    }

    fn other(&mut self) -> Result<()> {
        let count = u32::try_from(self.random.below(9))?;
        let flags = self.flags(&[libc::EFD_SEMAPHORE, libc::EFD_NONBLOCK]);
        let made = match self.random.below(9) {
            5 => sys::signalfd(1 << (libc::SIGUSR1 - 1 + i32::try_from(count)?))?,
            6 => self.inotify()?,
            7 => sys::pidfd(sys::pid(), 0)?,
            8 => sys::socket_of(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0)?,
            0 => sys::eventfd(count, flags)?,
            1 => sys::timerfd(libc::CLOCK_MONOTONIC, flags & libc::TFD_NONBLOCK)?,
            2 => sys::memfd(c"random", 0)?,
            3 => sys::open("/dev/null", libc::O_RDWR)?,
            _ => sys::epoll()?,
        };
        self.held.push(made);
        Ok(())
    }

    fn dup_high(&mut self) -> Result<()> {
        let number = HIGH + i32::try_from(self.random.below(60))?;
        // What is there may belong to the stage.
        if leads_to(number).is_err() {
            let flags = self.flags(&[libc::O_CLOEXEC]);
            let copy = self.some().map(|fd| sys::dup_to(fd, number, flags));
            self.held.extend(copy.transpose()?);
        }
        Ok(())
    }

    /// Sends a descriptor; no socket, since a socket that is on its way through itself is refused.
    fn send(&mut self) {
        let Some(what) = self.some().map(AsRawFd::as_raw_fd) else {
            return;
        };
        // Others take the bytes and leave the descriptor.
        let is_socket = |fd: RawFd| {
            let copy = sys::dup(sys::borrow(fd)).map(UnixStream::from);
            copy.is_ok_and(|socket| socket.local_addr().is_ok())
        };
        let sockets = self.held.iter().filter(|fd| is_socket(fd.as_raw_fd()));
        let sockets: Vec<RawFd> = sockets.map(AsRawFd::as_raw_fd).collect();
        let is_one_of =
            |path: &str, kinds: &[&str]| kinds.iter().any(|kind| path.starts_with(kind));
        let plain = [
            "/",
            "pipe:",
            "anon_inode:[eventfd]",
            "anon_inode:[timerfd]",
            "anon_inode:[signalfd]",
        ];
        let is_plain = leads_to(what).is_ok_and(|path| is_one_of(&path, &plain));
        if !sockets.is_empty() && is_plain {
            let through = sys::borrow(sockets[self.random.index(sockets.len())]);
            let was = sys::fcntl(through, libc::F_GETFL, 0).unwrap_or(0);
            // A full queue is left alone.
            let _ = sys::fcntl(through, libc::F_SETFL, i64::from(was | libc::O_NONBLOCK));
            let _ = sys::send_message(through, b"with rights", None, &[what]);
            let _ = sys::fcntl(through, libc::F_SETFL, was.into());
        }
    }

    /// Has a set of epoll watch something.
    fn watch(&mut self) -> Result<()> {
        let is_set = |fd: RawFd| leads_to(fd).is_ok_and(|path| path.contains("eventpoll"));
        let sets = self.held.iter().filter(|fd| is_set(fd.as_raw_fd()));
        let sets: Vec<RawFd> = sets.map(AsRawFd::as_raw_fd).collect();
        let Some(what) = self.some().map(AsRawFd::as_raw_fd) else {
            return Ok(());
        };
        if !sets.is_empty() {
            let set = sys::borrow(sets[self.random.index(sets.len())]);
            let events = [
                libc::EPOLLIN,
                libc::EPOLLOUT | libc::EPOLLET,
                libc::EPOLLRDHUP,
            ];
            let events = events[self.random.index(events.len())].cast_unsigned();
            let data = self.random.next();
            // Files and circles can't be watched.
            let _ = sys::epoll_control(set, libc::EPOLL_CTL_ADD, what, events, data);
        }
        Ok(())
    }

    fn live(mut self) -> Result<()> {
        for step in 0..STEPS {
            self.step().with_context(|| format!("step {step}"))?;
        }
        // It changes what it has inherited; from then on nobody does.
        let child = (self.generation < GENERATIONS).then(|| self.bear());
        let child = child.transpose()?;
        let before = seen(&self.held)?;
        let root = (self.generation == 0).then(sys::pid);
        let shared = root.map(settled_sharing).transpose()?;
        self.stage.ready_and_wait()?;
        let now = seen(&self.held)?;
        for (fd, before) in &before {
            ensure!(
                now.get(fd) == Some(before),
                "fd {fd} was {before:?}, is {:?}",
                now.get(fd)
            );
        }
        let shared_now = root.map(settled_sharing).transpose()?;
        ensure!(
            shared_now == shared,
            "(task, fd, open file) were {shared:?}, are {shared_now:?}"
        );
        child.map_or(Ok(()), Child::finish)
    }

    fn bear(&mut self) -> Result<Child> {
        let random = Random::new(self.random.next());
        let held = self.held.iter().map(AsRawFd::as_raw_fd);
        let held: Vec<RawFd> = held.collect();
        let generation = self.generation + 1;
        self.stage.child(|stage| {
            let owned = held.iter().map(|fd| sys::inherited(*fd)).collect();
            let child = Holder {
                stage,
                random,
                held: owned,
                generation,
            };
            child.live()
        })
    }
}

fn leads_to(fd: RawFd) -> Result<String> {
    let link = proc::link("self", &format!("fd/{fd}"))?;
    Ok(link.to_string_lossy().into_owned())
}

/// What is seen of these descriptors.
fn seen(held: &[OwnedFd]) -> Result<BTreeMap<RawFd, Seen>> {
    let seen = |fd: &OwnedFd| Ok((fd.as_raw_fd(), seen_of(fd)?));
    held.iter().map(seen).collect()
}

fn seen_of(fd: &OwnedFd) -> Result<Seen> {
    let number = fd.as_raw_fd();
    let path = leads_to(number)?;
    let first = path.starts_with("socket:").then(|| {
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // An error that the peer has left is told once.
        let _ = sys::receive_message(fd, 4096, flags);
        let message = sys::receive_message(fd, 4096, flags);
        message.map_or((Vec::new(), 0), |message| {
            (message.bytes, message.rights.len())
        })
    });
    // Numbers of inodes are new after a restore, and the order of an epoll set's targets is nobody's.
    let path = path.split(":[").next().unwrap_or(&path).to_owned();
    let text = proc::text("self", &format!("fdinfo/{number}"))?;
    let is_kept = |line: &&str| {
        let kinds = [
            "pos:",
            "flags:",
            "eventfd-count:",
            "tfd:",
            "sigmask:",
            "clockid:",
            "ticks:",
            "Pid:",
        ];
        kinds.iter().any(|kind| line.starts_with(kind))
    };
    let lines = text.lines().filter(is_kept);
    let lines = lines.map(|line| line.split(" pos:").next().unwrap_or(line).to_owned());
    let mut lines: Vec<String> = lines.collect();
    lines.sort();
    Ok((path, lines, first))
}

/// As [`sharing`], once it is the same for a while: a child closes a pipe right after it has said that it is ready.
fn settled_sharing(root: i32) -> Result<Vec<(i32, RawFd, usize)>> {
    let mut last = None;
    loop {
        let found = sharing(root).ok();
        if found.is_some() && found == last {
            return found.context("it was there");
        }
        last = found;
        sys::pause_for(10);
    }
}

/// Which descriptors of a tree are one open file: each with the number of the first that is the same.
fn sharing(root: i32) -> Result<Vec<(i32, RawFd, usize)>> {
    let mut firsts: Vec<(i32, RawFd)> = Vec::new();
    let mut all = Vec::new();
    for pid in proc::tree(root)? {
        for fd in proc::numbers(&format!("/proc/{pid}/fd"))? {
            // By the directory that was read for this the own ones are one too many.
            if proc::link(pid, &format!("fd/{fd}")).is_err() {
                continue;
            }
            let mut nth = 0;
            while nth < firsts.len() && !sys::same_open_file(pid, fd, firsts[nth].0, firsts[nth].1)?
            {
                nth += 1;
            }
            if nth == firsts.len() {
                firsts.push((pid, fd));
            }
            all.push((pid, fd, nth));
        }
    }
    Ok(all)
}

fn descriptors(stage: &Stage) -> Result<()> {
    let (seed, random) = Random::chosen()?;
    eprintln!("grown from {seed}");
    let holder = Holder {
        stage,
        random,
        held: Vec::new(),
        generation: 0,
    };
    holder.live()
}
