//! Pipes.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};

use crate::{Child, Stage, Workload, sys};

pub static CONTENTS: Workload =
    Workload::new("files/pipe", "a pipe with something in it", contents);
pub static SIZES: Workload = Workload::new(
    "files/pipe-sizes",
    "pipes of several sizes, empty and full",
    sizes,
);
pub static ENDS: Workload =
    Workload::new("files/pipe-ends", "pipes of which one end is closed", ends);
pub static ACROSS: Workload = Workload::new(
    "files/pipe-across",
    "a ring of tasks, each with a pipe to the next",
    across,
);
pub static REOPENED: Workload = Workload::new(
    "files/pipe-reopened",
    "ends opened again through /proc, with flags of their own",
    reopened,
);
pub static PACKETS: Workload = Workload::new(
    "files/pipe-packets",
    "a pipe in packet mode keeps its packets",
    packets,
);
pub static BUSY: Workload = Workload::new(
    "files/pipe-busy",
    "a writer and a reader that never pause",
    busy,
)
// Either may be caught between two calls.
.moves(&["syscall"]);

fn contents(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    sys::write(&writer, b"in flight")?;
    stage.ready_and_wait()?;
    ensure!(
        sys::read_exact(&reader, 9)? == b"in flight",
        "the contents have changed"
    );
    sys::write(&writer, b"more")?;
    ensure!(
        sys::read_exact(&reader, 4)? == b"more",
        "what is written does not come out"
    );
    ensure!(
        sys::poll(&reader, libc::POLLIN, 0)? == 0,
        "there is something left"
    );
    Ok(())
}

fn size(pipe: &OwnedFd) -> Result<usize> {
    Ok(usize::try_from(sys::fcntl(pipe, libc::F_GETPIPE_SZ, 0)?)?)
}

fn sizes(stage: &Stage) -> Result<()> {
    let mut pipes = Vec::new();
    for wanted in [4096, 65536, 1 << 20] {
        for full in [false, true] {
            let (reader, writer) = sys::pipe(libc::O_NONBLOCK)?;
            sys::fcntl(&writer, libc::F_SETPIPE_SZ, wanted)?;
            let size = size(&writer)?;
            let bytes: Vec<u8> = (0..size)
                .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
                .collect();
            let held = if full {
                sys::write(&writer, &bytes)?
            } else {
                0
            };
            ensure!(!full || held == size, "{held} bytes fill a pipe of {size}");
            pipes.push((reader, writer, size, bytes[..held].to_vec()));
        }
    }
    stage.ready_and_wait()?;
    for (reader, writer, was, bytes) in pipes {
        let is = size(&reader)?;
        ensure!(was == is, "the size was {was}, is {is}");
        if !bytes.is_empty() {
            let error = sys::write(&writer, b"x")
                .err()
                .and_then(|error| error.raw_os_error());
            ensure!(
                error == Some(libc::EAGAIN),
                "a full pipe of {was} takes more"
            );
        }
        let found = sys::read_exact(&reader, bytes.len())?;
        ensure!(
            found == bytes,
            "the contents of a pipe of {was} have changed"
        );
        let error = sys::read(&reader, &mut [0])
            .err()
            .and_then(|error| error.raw_os_error());
        ensure!(error == Some(libc::EAGAIN), "an emptied pipe gives more");
    }
    Ok(())
}

fn ends(stage: &Stage) -> Result<()> {
    sys::set_action(libc::SIGPIPE, libc::SIG_IGN, 0)?;
    let (no_writer, writer) = sys::pipe(0)?;
    sys::write(&writer, b"last words")?;
    drop(writer);
    let (reader, no_reader) = sys::pipe(0)?;
    drop(reader);
    stage.ready_and_wait()?;
    ensure!(
        sys::read_exact(&no_writer, 10)? == b"last words",
        "the contents have changed"
    );
    let mut byte = [0];
    ensure!(
        sys::poll(&no_writer, libc::POLLIN, 0)? & libc::POLLHUP != 0,
        "a writer has come"
    );
    ensure!(sys::read(&no_writer, &mut byte)? == 0, "no end of file");
    let error = sys::write(&no_reader, b"x")
        .err()
        .and_then(|error| error.raw_os_error());
    ensure!(
        error == Some(libc::EPIPE),
        "writing without a reader gave {error:?}"
    );
    Ok(())
}

/// Each task adds one to what it gets and passes it on; ends that are not its own are closed.
fn across(stage: &Stage) -> Result<()> {
    const TASKS: usize = 6;
    let mut pipes: Vec<Option<(OwnedFd, OwnedFd)>> = (0..=TASKS)
        .map(|_| Ok(Some(sys::pipe(0)?)))
        .collect::<Result<_>>()?;
    let mut children: Vec<Child> = Vec::new();
    for index in 0..TASKS {
        let pipes = &mut pipes;
        children.push(stage.child(move |stage| {
            let (reader, _) = pipes[index].take().context("own pipe")?;
            let (_, writer) = pipes[index + 1].take().context("next pipe")?;
            pipes.clear();
            stage.ready()?;
            let mut byte = [0];
            while sys::read(&reader, &mut byte)? == 1 {
                byte[0] += 1;
                sys::write(&writer, &byte)?;
            }
            Ok(())
        })?);
    }
    let (_, first) = pipes[0].take().context("the first pipe")?;
    let (last, _) = pipes[TASKS].take().context("the last pipe")?;
    drop(pipes);
    sys::write(&first, &[10])?;
    stage.ready_and_wait()?;
    sys::write(&first, &[20])?;
    let found = sys::read_exact(&last, 2)?;
    ensure!(found == [16, 26], "the ring gave {found:?}, not 16 and 26");
    // The end of the first pipe must run through all of them: no end is held anywhere else.
    drop(first);
    let mut byte = [0];
    match sys::read(&last, &mut byte)? {
        0 => children.into_iter().try_for_each(Child::reap),
        _ => bail!("something more came: {}", byte[0]),
    }
}

fn reopened(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let again = |fd: &OwnedFd, flags| sys::open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags);
    let nonblocking = again(&reader, libc::O_RDONLY | libc::O_NONBLOCK)?;
    let second_writer = again(&writer, libc::O_WRONLY | libc::O_APPEND)?;
    let both = again(&reader, libc::O_RDWR)?;
    drop(writer);
    sys::write(&second_writer, b"abc")?;
    stage.ready_and_wait()?;
    let flags = |fd: &OwnedFd| sys::fcntl(fd, libc::F_GETFL, 0);
    ensure!(
        flags(&reader)? & libc::O_NONBLOCK == 0,
        "the first end has become non-blocking"
    );
    ensure!(
        flags(&nonblocking)? & libc::O_NONBLOCK != 0,
        "the second end blocks"
    );
    ensure!(
        flags(&both)? & libc::O_ACCMODE == libc::O_RDWR,
        "the third end is not for both"
    );
    sys::write(&both, b"d")?;
    ensure!(
        sys::read_exact(&nonblocking, 2)? == b"ab",
        "the contents have changed"
    );
    ensure!(
        sys::read_exact(&reader, 2)? == b"cd",
        "the ends are of different pipes"
    );
    Ok(())
}

fn packets(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(libc::O_DIRECT)?;
    for packet in [&b"one"[..], b"second", b"3"] {
        sys::write(&writer, packet)?;
    }
    stage.ready_and_wait()?;
    let mut buffer = [0; 64];
    for packet in [&b"one"[..], b"second", b"3"] {
        let length = sys::read(&reader, &mut buffer)?;
        let found = &buffer[..length];
        ensure!(found == packet, "read {found:?} instead of {packet:?}");
    }
    let flags = sys::fcntl(&writer, libc::F_GETFL, 0)?;
    ensure!(flags & libc::O_DIRECT != 0, "the packet mode is lost");
    Ok(())
}

/// Numbers go through without pause; the reader sees every one in order.
fn busy(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(0)?;
    let inherited = writer.as_raw_fd();
    let child = stage.child(move |stage| {
        // Else this would never see the end.
        sys::close(inherited)?;
        stage.ready()?;
        let mut wanted = 0u32;
        let mut word = [0; 4];
        loop {
            match sys::read(&reader, &mut word)? {
                4 => {}
                0 => break,
                count => bail!("a word of {count} bytes after {wanted} words"),
            }
            let found = u32::from_le_bytes(word);
            ensure!(
                found == wanted,
                "the number {found} came instead of {wanted}"
            );
            wanted += 1;
        }
        ensure!(wanted > 0, "nothing came");
        Ok(())
    });
    let child = child?;
    stage.ready()?;
    let mut number = 0u32;
    while !stage.stopping() {
        sys::write(&writer, &number.to_le_bytes())?;
        number += 1;
    }
    drop(writer);
    child.reap()
}
