//! Rings with something of their process: a thread that submits, registered memory, files and eventfds.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::TYPES;
use super::ring::{NEEDS, SEEN, file, turn, use_ring, write_and_read};
use crate::sys::{self, PAGE, Region, Request, Ring};
use crate::workloads::scripts;
use crate::{Need, Stage, Workload};

pub static REGISTERED: Workload = Workload::new(
    "requests/uring-belongings",
    "a ring with registered memory, registered files with empty places, and an eventfd",
    registered,
)
.needs(SEEN);
pub static NOWHERE: Workload = Workload::new(
    "requests/uring-file-nowhere",
    "a ring with a registered file that has no descriptor any more",
    |stage| {
        let (fd, _) = file(stage)?;
        let ring = Ring::new(8, None, 0)?;
        register_files(&ring, &[fd.as_raw_fd()])?;
        drop(fd);
        stage.ready_and_wait()
    },
)
.needs(NEEDS)
.refused(&["registered", "unregister"]);
pub static THREAD: Workload = Workload::new(
    "requests/uring-sqpoll",
    "a ring with a thread of the kernel that submits, and an epoll set that watches it",
    with_thread,
)
.needs(NEEDS);
pub static THREAD_ASLEEP: Workload = Workload::new(
    "requests/uring-sqpoll-asleep",
    "entries that wait because the thread that submits sleeps",
    asleep,
)
.needs(NEEDS);
pub static SHARED_THREAD: Workload = Workload::new(
    "requests/uring-sqpoll-shared",
    "a ring with a thread that submits, which a child has, too",
    |stage| {
        let _ring = Ring::new(8, None, sys::SQPOLL)?;
        let child = stage.child(Stage::ready_and_wait)?;
        stage.ready_and_wait()?;
        child.finish()
    },
)
.needs(NEEDS)
.refused(&["io_uring", "another process has it, too"]);
pub static OPENING: Workload = Workload::new(
    "requests/uring-opening",
    "a ring with a thread that submits, which opens and closes files all the time",
    opening,
)
.needs(NEEDS)
.moves(scripts::CHANGING);
pub static NODE: Workload = Workload::script(
    "requests/uring-node",
    "Node with io_uring, which reads and writes files all the time",
    "bash",
    include_str!("uring-node.sh"),
)
.needs(&[
    Need::Program("node"),
    Need::Call(libc::SYS_io_uring_setup, "io_uring"),
    TYPES,
])
.moves(scripts::CHANGING);

fn register_files(ring: &Ring, files: &[i32]) -> Result<()> {
    let numbers = Region::anon(PAGE)?;
    for (nth, fd) in files.iter().enumerate() {
        numbers.put(4 * nth, &fd.to_ne_bytes());
    }
    ring.register(2, numbers, files.len())
        .context("registering files")?;
    Ok(())
}

fn register_memory(ring: &Ring, memory: &[Region]) -> Result<()> {
    let iovecs = Region::anon(PAGE)?;
    for (nth, part) in memory.iter().enumerate() {
        iovecs.put(16 * nth, &part.addr.to_ne_bytes());
        iovecs.put(16 * nth + 8, &part.len.to_ne_bytes());
    }
    ring.register(0, iovecs, memory.len())
        .context("registering memory")?;
    Ok(())
}

/// Writes and reads by the places of a registered file and of registered memory.
fn use_registered(ring: &mut Ring, place: i32, memory: Region, seed: u8) -> Result<()> {
    let request = |opcode, value| Request {
        opcode,
        flags: sys::FIXED_FILE,
        fd: place,
        addr: memory.addr,
        len: 4096,
        value,
        ..Request::default()
    };
    let requests = [request(sys::WRITE_FIXED, 1), request(sys::READ_FIXED, 2)];
    write_and_read(ring, memory, seed, requests)
}

fn count(eventfd: &OwnedFd) -> Result<u64> {
    let mut bytes = [0; 8];
    sys::read(eventfd, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

fn registered(stage: &Stage) -> Result<()> {
    let (fd, _) = file(stage)?;
    // Requests name the first registered memory.
    let memory = [
        Region::anon(4 * PAGE)?,
        Region { addr: 0, len: 0 },
        Region::anon(PAGE)?,
    ];
    let eventfd = sys::eventfd(0, 0)?;
    let mut ring = Ring::new(8, None, 0)?;
    register_memory(&ring, &memory)?;
    register_files(&ring, &[-1, -1, fd.as_raw_fd(), -1])?;
    use_registered(&mut ring, 2, memory[0], 3)?;
    let number = Region::anon(PAGE)?;
    number.put(0, &eventfd.as_raw_fd().to_ne_bytes());
    ring.register(4, number, 1)?;
    turn(&mut ring, 5)?;
    ensure!(count(&eventfd)? == 5, "the eventfd was not told");
    turn(&mut ring, 2)?;
    stage.ready_and_wait()?;
    ensure!(count(&eventfd)? == 2, "the eventfd counted the restore");
    use_registered(&mut ring, 2, memory[0], 7)?;
    ensure!(count(&eventfd)? == 2, "the eventfd is not told any more");
    let empty = ring.run(&Request {
        opcode: sys::READ_FIXED,
        flags: sys::FIXED_FILE,
        fd: 1,
        addr: memory[0].addr,
        len: 1,
        value: 9,
        ..Request::default()
    })?;
    ensure!(empty == (9, -libc::EBADF), "an empty place: {empty:?}");
    drop(fd);
    // The registered file is the same open file, and stays.
    use_registered(&mut ring, 2, memory[0], 8)
}

fn with_thread(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let mut ring = Ring::new(16, None, sys::SQPOLL)?;
    let set = sys::epoll()?;
    sys::epoll_control(&set, libc::EPOLL_CTL_ADD, ring.fd.as_raw_fd(), 1, 77)?;
    use_ring(&mut ring, &fd, memory, 3)?;
    turn(&mut ring, 50)?;
    let (regions, indices) = (ring.regions(), ring.indices());
    stage.ready_and_wait()?;
    ensure!(ring.regions() == regions, "it is mapped elsewhere");
    ensure!(
        ring.indices() == indices,
        "{indices:?} became {:?}",
        ring.indices()
    );
    use_ring(&mut ring, &fd, memory, 5)?;
    turn(&mut ring, 100)?;
    ring.put(&Request::default());
    ring.submit(1)?;
    let events = sys::epoll_wait(&set, 1000)?;
    ensure!(events == [(1, 77)], "the epoll set saw {events:?}");
    Ok(())
}

/// The dump comes at any moment, also while a thread of the kernel opens the file.
fn opening(stage: &Stage) -> Result<()> {
    let (_fd, _) = file(stage)?;
    let path = Region::anon(PAGE)?;
    let name = stage.path("data");
    path.put(0, std::os::unix::ffi::OsStrExt::as_bytes(name.as_os_str()));
    let mut ring = Ring::new(16, None, sys::SQPOLL)?;
    stage.ready()?;
    let mut round = 0u64;
    while !stage.stopping() {
        let (_, fd) = ring.run(&Request {
            opcode: sys::OPENAT,
            fd: libc::AT_FDCWD,
            addr: path.addr,
            value: round,
            ..Request::default()
        })?;
        ensure!(fd >= 0, "opening in round {round}: {fd}");
        // SAFETY: the ring has just opened it for us alone.
        let opened = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        let mut byte = [0];
        let read = sys::read(&opened, &mut byte).with_context(|| format!("round {round}"))?;
        ensure!((read, byte) == (1, [7]), "round {round} read {byte:?}");
        let (_, closed) = ring.run(&Request {
            opcode: sys::CLOSE,
            fd: std::os::fd::IntoRawFd::into_raw_fd(opened),
            value: round,
            ..Request::default()
        })?;
        ensure!(closed == 0, "closing in round {round}: {closed}");
        round += 1;
    }
    Ok(())
}

fn asleep(stage: &Stage) -> Result<()> {
    let mut ring = Ring::new(16, None, sys::SQPOLL)?;
    turn(&mut ring, 3)?;
    let begun = Instant::now();
    while !ring.thread_sleeps() {
        ensure!(
            begun.elapsed() < Duration::from_secs(20),
            "the thread does not sleep"
        );
        sys::pause_for(1);
    }
    ring.put(&Request {
        value: 8,
        ..Request::default()
    });
    stage.ready_and_wait()?;
    // The kernel may have taken it: whoever interrupts the process wakes the thread.
    ensure!(ring.indices()[1] == 4, "{:?}", ring.indices());
    while ring.indices()[3] == 3 {
        ring.submit(1)?;
    }
    ensure!(ring.take() == [(8, 0)], "the entry that waited");
    turn(&mut ring, 20)
}
