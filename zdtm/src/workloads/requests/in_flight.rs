//! Rings with requests in flight that wait for something: each ends once, with what it was asked for.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use super::ring::{SEEN, turn};
use crate::sys::{self, Completion, PAGE, Region, Request, Ring};
use crate::{Stage, Workload};

pub static POLLS: Workload = Workload::new(
    "requests/uring-polls",
    "polls of a pipe and a socket in flight, that tell once and that tell again",
    polls,
)
.needs(SEEN);
pub static READS: Workload = Workload::new(
    "requests/uring-reads",
    "reads of pipes and an eventfd and receptions of sockets in flight",
    reads,
)
.needs(SEEN);
pub static ACCEPTS: Workload = Workload::new(
    "requests/uring-accepts",
    "listening sockets with accepts in flight, of one connection and of many",
    accepts,
)
.needs(SEEN);
pub static MANY: Workload = Workload::new(
    "requests/uring-many-reads",
    "more reads in flight than the ring has entries, of rings of all kinds",
    many,
)
.needs(SEEN);
pub static TIMEOUTS: Workload = Workload::new(
    "requests/uring-timeouts",
    "timeouts in flight: for some time, until a moment, for some completions, again and again",
    timeouts,
)
.needs(SEEN);
pub static WRITING: Workload = Workload::new(
    "requests/uring-writing",
    "a ring with a write in flight, to a pipe that is full",
    writing,
)
.needs(SEEN)
.refused(&["io_uring", "IORING_OP_WRITE", "cancel"]);
pub static LINKED: Workload = Workload::new(
    "requests/uring-linked",
    "a ring with a read in flight to which a timeout is linked",
    linked,
)
.needs(SEEN)
.refused(&[
    "io_uring",
    "IORING_OP_READ",
    "user_data 0x1",
    "linked",
    "cancel",
]);

const POLLIN: u32 = 1;
const POLLOUT: u32 = 4;
const POLLHUP: i32 = 16;

/// What has come until now, without waiting.
fn taken(ring: &mut Ring) -> Result<Vec<Completion>> {
    ring.submit(0)?;
    Ok(ring.take())
}

/// Waits for one completion and expects it.
fn expect(ring: &mut Ring, wanted: Completion, when: &str) -> Result<()> {
    ring.submit(1).context("waiting")?;
    let found = ring.take();
    ensure!(found == [wanted], "{found:?} instead of {wanted:?} {when}");
    Ok(())
}

/// Expects that nothing is there but what comes of a request made now.
fn expect_nothing_else(ring: &mut Ring) -> Result<()> {
    let last = ring.run(&Request {
        value: 999,
        ..Request::default()
    })?;
    ensure!(last == (999, 0), "completion {last:?} at the end");
    ensure!(ring.take().is_empty(), "more completions at the end");
    Ok(())
}

fn polls(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let (again, wakes) = sys::pipe(0)?;
    let (one, other) = UnixStream::pair()?;
    let mut ring = Ring::new(8, None, 0)?;
    turn(&mut ring, 13)?;
    let poll = |fd: &dyn AsRawFd, events, len, value| Request {
        opcode: sys::POLL_ADD,
        fd: fd.as_raw_fd(),
        operation_flags: events,
        len,
        value,
        ..Request::default()
    };
    ring.put(&poll(&reader, POLLIN, 0, 1));
    ring.put(&poll(&one, POLLIN, 0, 2));
    ring.put(&poll(&again, POLLIN, sys::POLL_MULTI, 3));
    // It tells at once that there is room, and what comes after that.
    ring.put(&poll(&other, POLLIN | POLLOUT, sys::POLL_MULTI, 4));
    // One without completions where it succeeds.
    ring.put(&Request {
        flags: 1 << 6,
        ..poll(&writer, POLLIN, 0, 5)
    });
    ring.submit(1)?;
    let found = ring.take();
    ensure!(found == [(4, 4)], "before the dump {found:?}");
    sys::write(&wakes, b"x")?;
    expect(&mut ring, (3, 1), "before the dump")?;
    // An entry that the kernel does not know of, in a ring that goes round.
    ring.put(&Request {
        value: 77,
        ..Request::default()
    });
    let indices = ring.indices();
    stage.ready_and_wait()?;
    ensure!(
        ring.indices() == indices,
        "{indices:?} became {:?}",
        ring.indices()
    );
    let found = taken(&mut ring)?;
    ensure!(found == [(77, 0)], "after the restore {found:?}");
    sys::write(&writer, b"x")?;
    expect(&mut ring, (1, 1), "of the first pipe")?;
    sys::write(&wakes, b"y")?;
    expect(&mut ring, (3, 1), "of the second pipe")?;
    sys::write(&wakes, b"z")?;
    expect(&mut ring, (3, 1), "of the second pipe, again")?;
    sys::write(&other, b"to one")?;
    expect(&mut ring, (2, 1), "of the socket")?;
    sys::write(&one, b"to the other")?;
    expect(&mut ring, (4, 1), "of the other socket")?;
    drop(wakes);
    expect(&mut ring, (3, 1 | POLLHUP), "of the end of the second pipe")?;
    expect_nothing_else(&mut ring)
}

/// A request with a value for memory at a place.
fn request(opcode: u8, fd: &dyn AsRawFd, memory: (usize, usize), value: u64) -> Result<Request> {
    Ok(Request {
        opcode,
        fd: fd.as_raw_fd(),
        offset: u64::MAX,
        addr: memory.0,
        len: u32::try_from(memory.1)?,
        value,
        ..Request::default()
    })
}

fn expect_memory(memory: Region, at: usize, wanted: &[u8]) -> Result<()> {
    let found = memory.get(at, wanted.len());
    ensure!(found == wanted, "{found:?} instead of {wanted:?} at {at}");
    Ok(())
}

fn reads(stage: &Stage) -> Result<()> {
    const LIST: usize = 2048;
    const HEADER: usize = 3072;
    let memory = Region::anon(PAGE)?;
    let at = |place: usize| memory.addr + place;
    let (pipe, writer) = sys::pipe(0)?;
    let (parts, to_parts) = sys::pipe(0)?;
    let event = sys::eventfd(0, 0)?;
    let (stream, peer) = UnixStream::pair()?;
    let (datagrams, sender) = UnixDatagram::pair()?;
    let mut ring = Ring::new(8, None, 0)?;
    turn(&mut ring, 3)?;
    ring.put(&request(sys::READ, &pipe, (at(0), 100), 1)?);
    // By a worker of the kernel, which finds nothing.
    ring.put(&Request {
        flags: 1 << 4,
        ..request(sys::READ, &event, (at(128), 8), 2)?
    });
    let list = [at(256), 3, at(320), 5].map(usize::to_ne_bytes).concat();
    memory.put(LIST, &list);
    ring.put(&request(sys::READV, &parts, (at(LIST), 2), 3)?);
    ring.put(&Request {
        offset: 0,
        ..request(sys::RECV, &stream, (at(512), 64), 4)?
    });
    memory.put(LIST + 64, &[at(640), 32].map(usize::to_ne_bytes).concat());
    let header = [0, 0, at(LIST + 64), 1, 0, 0, 0].map(usize::to_ne_bytes);
    memory.put(HEADER, &header.concat());
    ring.put(&Request {
        offset: 0,
        ..request(sys::RECVMSG, &datagrams, (at(HEADER), 1), 5)?
    });
    ring.submit(0)?;
    // The kernel has its own copy.
    memory.put(LIST, &[0; 32]);
    // What this one waits for is there, and the kernel does not go on before it is asked.
    let (early, to_early) = sys::pipe(0)?;
    let mut deferred = Ring::new(8, None, sys::SINGLE_ISSUER | sys::DEFER_TASKRUN)?;
    deferred.put(&request(sys::READ, &early, (at(768), 32), 6)?);
    deferred.submit(0)?;
    sys::write(&to_early, b"early")?;
    stage.ready_and_wait()?;
    let found = taken(&mut ring)?;
    ensure!(found.is_empty(), "after the restore {found:?}");
    expect(&mut deferred, (6, 5), "of what came early")?;
    expect_memory(memory, 768, b"early\0")?;
    expect_nothing_else(&mut deferred)?;
    sys::write(&writer, b"seven b")?;
    expect(&mut ring, (1, 7), "of the pipe")?;
    expect_memory(memory, 0, b"seven b\0")?;
    sys::write(&event, &7u64.to_ne_bytes())?;
    expect(&mut ring, (2, 8), "of the eventfd")?;
    expect_memory(memory, 128, &7u64.to_ne_bytes())?;
    sys::write(&to_parts, b"abcdefghij")?;
    expect(&mut ring, (3, 8), "of the second pipe")?;
    expect_memory(memory, 256, b"abc\0")?;
    expect_memory(memory, 320, b"defgh\0")?;
    ensure!(sys::read_exact(&parts, 2)? == b"ij", "the rest of the pipe");
    sys::write(&peer, b"to the stream")?;
    expect(&mut ring, (4, 13), "of the stream")?;
    expect_memory(memory, 512, b"to the stream\0")?;
    sender.send(b"one").context("sending")?;
    expect(&mut ring, (5, 3), "of the datagram socket")?;
    expect_memory(memory, 640, b"one\0")?;
    expect_nothing_else(&mut ring)
}

/// Connects, and expects that the ring has accepted the connection, which is tried out.
fn expect_connection(
    ring: &mut Ring,
    value: u64,
    to: &mut dyn FnMut() -> Result<OwnedFd>,
) -> Result<()> {
    let client = to()?;
    ring.submit(1)?;
    let found = ring.take();
    let [(found_value, fd)] = found[..] else {
        anyhow::bail!("{found:?} of a connection");
    };
    ensure!(
        found_value == value && fd > 2,
        "{found:?} instead of {value}"
    );
    // SAFETY: the kernel has just made it for this process, which has it nowhere else.
    let accepted = unsafe { OwnedFd::from_raw_fd(fd) };
    sys::write(&client, b"hello")?;
    ensure!(
        sys::read_exact(&accepted, 5)? == b"hello",
        "another connection"
    );
    Ok(())
}

fn accepts(stage: &Stage) -> Result<()> {
    let path = stage.path("listener");
    let unix = UnixListener::bind(&path)?;
    let other_path = stage.path("other listener");
    let other = UnixListener::bind(&other_path)?;
    let inet = TcpListener::bind("127.0.0.1:0")?;
    let address = inet.local_addr()?;
    let flags = sys::SINGLE_ISSUER | sys::DEFER_TASKRUN;
    let (mut ring, mut deferred) = (Ring::new(4, None, 0)?, Ring::new(4, None, flags)?);
    let accept = |fd: &dyn AsRawFd, ioprio, value| Request {
        opcode: sys::ACCEPT,
        fd: fd.as_raw_fd(),
        ioprio,
        value,
        ..Request::default()
    };
    let mut by_path = || Ok(UnixStream::connect(&path)?.into());
    let mut by_other_path = || Ok(UnixStream::connect(&other_path)?.into());
    let mut by_address = || Ok(TcpStream::connect(address)?.into());
    ring.put(&accept(&unix, 0, 1));
    ring.put(&accept(&inet, sys::ACCEPT_MULTI, 2));
    ring.put(&accept(&unix, 0, 4));
    ring.submit(0)?;
    deferred.put(&accept(&other, 0, 3));
    deferred.submit(0)?;
    expect_connection(&mut ring, 2, &mut by_address).context("before the dump")?;
    stage.ready_and_wait()?;
    for ring in [&mut ring, &mut deferred] {
        let found = taken(ring)?;
        ensure!(found.is_empty(), "after the restore {found:?}");
    }
    for _ in 0..3 {
        expect_connection(&mut ring, 2, &mut by_address).context("of many")?;
    }
    // Who asked first is served first.
    expect_connection(&mut ring, 1, &mut by_path).context("of one")?;
    expect_connection(&mut ring, 4, &mut by_path).context("of the next one")?;
    expect_connection(&mut deferred, 3, &mut by_other_path).context("of one, deferred")?;
    expect_nothing_else(&mut ring)?;
    expect_nothing_else(&mut deferred)
}

fn many(stage: &Stage) -> Result<()> {
    const NR: usize = 21;
    let memory = Region::anon(PAGE)?;
    let shapes = [
        0,
        sys::SQE128 | sys::CQE32,
        sys::NO_SQARRAY | sys::COOP_TASKRUN,
    ];
    let mut rings = Vec::new();
    for flags in shapes {
        let mut ring = Ring::new(4, Some(64), flags)?;
        let mut pipes = Vec::new();
        for nth in 0..NR {
            let (reader, writer) = sys::pipe(0)?;
            let place = (memory.addr + 8 * nth, 8);
            ring.put(&request(sys::READ, &reader, place, u64::try_from(nth)?)?);
            ring.submit(0)?;
            pipes.push((reader, writer));
        }
        ring.put(&Request {
            value: 777,
            ..Request::default()
        });
        rings.push((ring, pipes));
    }
    stage.ready_and_wait()?;
    for (ring, pipes) in &mut rings {
        let found = taken(ring)?;
        ensure!(found == [(777, 0)], "after the restore {found:?}");
        for (nth, (_, writer)) in pipes.iter().enumerate().rev() {
            let text = [u8::try_from(nth)?; 3];
            sys::write(writer, &text)?;
            expect(ring, (u64::try_from(nth)?, 3), "of one of many")?;
            expect_memory(memory, 8 * nth, &text)?;
        }
        expect_nothing_else(ring)?;
    }
    Ok(())
}

/// A timeout, whose time is put into memory at a place.
fn timeout(memory: Region, at: usize, time: Duration, flags: u32, value: u64) -> Request {
    memory.put(at, &time.as_secs().to_ne_bytes());
    memory.put(at + 8, &u64::from(time.subsec_nanos()).to_ne_bytes());
    Request {
        opcode: sys::TIMEOUT,
        fd: -1,
        addr: memory.addr + at,
        len: 1,
        operation_flags: flags,
        value,
        ..Request::default()
    }
}

/// Ends a timeout, and expects that it was there.
fn remove(ring: &mut Ring, value: u64) -> Result<()> {
    ring.put(&Request {
        opcode: sys::TIMEOUT_REMOVE,
        fd: -1,
        addr: usize::try_from(value)?,
        value: 1000 + value,
        ..Request::default()
    });
    ring.submit(2)?;
    let mut found = ring.take();
    found.sort_unstable();
    let wanted = [(value, -libc::ECANCELED), (1000 + value, 0)];
    ensure!(found == wanted, "{found:?} instead of {wanted:?}");
    Ok(())
}

fn timeouts(stage: &Stage) -> Result<()> {
    const HOUR: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_secs(2);
    const PERIOD: Duration = Duration::from_millis(200);
    let memory = Region::anon(PAGE)?;
    let date = SystemTime::now().duration_since(UNIX_EPOCH)? + HOUR;
    let moment = sys::TIMEOUT_MOMENT | sys::TIMEOUT_REALTIME;
    let mut ring = Ring::new(8, None, 0)?;
    ring.put(&timeout(memory, 0, HOUR, 0, 1));
    ring.put(&timeout(memory, 16, HOUR, sys::TIMEOUT_BOOTTIME, 2));
    ring.put(&timeout(memory, 32, date, moment, 3));
    ring.put(&Request {
        offset: 3,
        ..timeout(memory, 48, HOUR, 0, 4)
    });
    let nop = Request {
        value: 5,
        ..Request::default()
    };
    ring.put(&nop);
    ring.submit(1)?;
    let found = ring.take();
    ensure!(found == [(5, 0)], "before the dump {found:?}");
    // Those of the others come at any moment, the last ones again and again.
    let flags = sys::SINGLE_ISSUER | sys::DEFER_TASKRUN;
    let (mut short, mut deferred) = (Ring::new(8, None, 0)?, Ring::new(8, None, flags)?);
    let mut ticking = Ring::new(8, Some(4096), 0)?;
    let begun = Instant::now();
    short.put(&timeout(memory, 64, SHORT, 0, 6));
    short.submit(0)?;
    deferred.put(&timeout(memory, 80, SHORT, 0, 7));
    deferred.submit(0)?;
    ticking.put(&timeout(memory, 96, PERIOD, sys::TIMEOUT_MULTI, 8));
    ticking.submit(0)?;
    stage.ready_and_wait()?;
    for (ring, value) in [(&mut short, 6), (&mut deferred, 7)] {
        expect(ring, (value, -libc::ETIME), "of a short time")?;
        ensure!(begun.elapsed() >= SHORT, "it was over too early");
        expect_nothing_else(ring)?;
    }
    drop(ticking.take());
    expect(&mut ticking, (8, -libc::ETIME), "of a time that goes on")?;
    remove(&mut ticking, 8)?;
    expect_nothing_else(&mut ticking)?;
    let done = ring.run(&nop)?;
    ensure!(done == (5, 0), "{done:?} as the second of three");
    ring.put(&nop);
    ring.submit(2)?;
    let found = ring.take();
    ensure!(found == [(5, 0), (4, 0)], "{found:?} with the third one");
    for value in 1..=3 {
        remove(&mut ring, value)?;
    }
    expect_nothing_else(&mut ring)
}

fn writing(stage: &Stage) -> Result<()> {
    let (_reader, writer) = sys::pipe(libc::O_NONBLOCK)?;
    let memory = Region::anon(PAGE)?;
    while sys::write(&writer, &[7; PAGE]).is_ok() {}
    let fd = i64::from(writer.as_raw_fd());
    sys::call_plain(libc::SYS_fcntl, [fd, libc::F_SETFL.into(), 0, 0, 0, 0])?;
    let mut ring = Ring::new(8, None, 0)?;
    ring.put(&request(sys::WRITE, &writer, (memory.addr, PAGE), 1)?);
    ring.submit(0)?;
    stage.ready_and_wait()
}

fn linked(stage: &Stage) -> Result<()> {
    let (reader, _writer) = sys::pipe(0)?;
    let time = Region::anon(PAGE)?;
    time.put(0, &1000u64.to_ne_bytes());
    let mut ring = Ring::new(8, None, 0)?;
    ring.put(&Request {
        flags: 1 << 2,
        ..request(sys::READ, &reader, (time.addr + 64, 8), 1)?
    });
    ring.put(&Request {
        opcode: sys::LINK_TIMEOUT,
        fd: -1,
        addr: time.addr,
        len: 1,
        value: 2,
        ..Request::default()
    });
    ring.submit(0)?;
    stage.ready_and_wait()
}
