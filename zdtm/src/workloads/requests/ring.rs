//! io_uring rings.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::sys::{self, PAGE, Region, Request, Ring};
use crate::{Need, Stage, Workload};

pub(super) const NEEDS: &[Need] = &[Need::Call(libc::SYS_io_uring_setup, "io_uring")];

/// Only the kernel's own structures tell of some of it.
pub(super) const SEEN: &[Need] = &[NEEDS[0], super::TYPES];

pub static IDLE: Workload = Workload::new(
    "requests/uring",
    "an idle io_uring ring that has read and written files",
    idle,
)
.needs(NEEDS);
pub static FRESH: Workload = Workload::new(
    "requests/uring-fresh",
    "rings of all shapes that nothing was asked of yet",
    fresh,
)
.needs(NEEDS);
pub static WAITING: Workload = Workload::new(
    "requests/uring-waiting",
    "completions not taken by the program, and entries not taken by the kernel",
    waiting,
)
.needs(NEEDS);
pub static WRAPPED: Workload = Workload::new(
    "requests/uring-wrapped",
    "a ring whose indices have gone round many times",
    wrapped,
)
.needs(NEEDS);
pub static SHAPES: Workload = Workload::new(
    "requests/uring-shapes",
    "wide entries, wide completions, no array of indices, many completions",
    shapes,
)
.needs(NEEDS);
pub static SHARED: Workload = Workload::new(
    "requests/uring-shared",
    "a ring that parent and child use after a fork, and a duplicate of its descriptor",
    shared,
)
.needs(NEEDS);
pub static UNDER_LOAD: Workload = Workload::new(
    "requests/uring-under-load",
    "a ring in use all the time, each request counted",
    under_load,
)
.needs(NEEDS);
pub static CLOSED: Workload = Workload::new(
    "requests/uring-closed",
    "a ring that is mapped and whose descriptor is closed",
    |stage| {
        let ring = Ring::new(8, None, 0)?;
        drop(ring.fd);
        stage.ready_and_wait()
    },
)
.needs(NEEDS)
.refused(&["io_uring", "no descriptor any more"]);
pub static REGISTERED: Workload = Workload::new(
    "requests/uring-registered",
    "a ring whose descriptor two threads have registered with themselves",
    registered,
)
.needs(NEEDS);
pub static REGISTERED_TWO: Workload = Workload::new(
    "requests/uring-registered-two",
    "a thread that has registered two rings with itself",
    |stage| {
        let mut first = Ring::new(8, None, 0)?;
        let mut second = Ring::new(16, None, 0)?;
        turn(&mut first, 3)?;
        register_as(&second, 5)?;
        register_as(&first, 2)?;
        stage.ready_and_wait()?;
        use_registered(&mut first, 2, 7)?;
        use_registered(&mut second, 5, 8)
    },
)
.needs(SEEN);

pub(super) fn file(stage: &Stage) -> Result<(OwnedFd, Region)> {
    let path = stage.path("data");
    std::fs::write(&path, [7; PAGE]).context("writing the file")?;
    Ok((sys::open(&path, libc::O_RDWR)?, Region::anon(PAGE)?))
}

/// Lets the ring write to a file and read it back.
pub(super) fn use_ring(ring: &mut Ring, fd: &OwnedFd, memory: Region, seed: u8) -> Result<()> {
    let request = |opcode, value| Request {
        opcode,
        fd: fd.as_raw_fd(),
        addr: memory.addr,
        len: 4096,
        value,
        ..Request::default()
    };
    write_and_read(
        ring,
        memory,
        seed,
        [request(sys::WRITE, 1), request(sys::READ, 2)],
    )
}

/// Writes a page of `seed` by the first request and reads it by the second.
pub(super) fn write_and_read(
    ring: &mut Ring,
    memory: Region,
    seed: u8,
    [write, read]: [Request; 2],
) -> Result<()> {
    memory.put(0, &[seed; PAGE]);
    let wrote = ring.run(&write)?;
    ensure!(wrote == (write.value, 4096), "the write: {wrote:?}");
    memory.put(0, &[0; PAGE]);
    let read_back = ring.run(&read)?;
    ensure!(read_back == (read.value, 4096), "the read: {read_back:?}");
    ensure!(memory.get(0, PAGE) == [seed; PAGE], "other bytes came back");
    Ok(())
}

pub(super) fn turn(ring: &mut Ring, times: u64) -> Result<()> {
    for value in 0..times {
        let done = ring.run(&Request {
            value,
            ..Request::default()
        })?;
        ensure!(done == (value, 0), "nothing to do, came to {done:?}");
    }
    Ok(())
}

fn idle(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let mut ring = Ring::new(8, None, 0)?;
    use_ring(&mut ring, &fd, memory, 3)?;
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
    use_ring(&mut ring, &fd, memory, 9)
}

const ALL_SHAPES: [(u32, Option<u32>, u32); 7] = [
    (1, None, 0),
    (8, None, sys::NO_SQARRAY),
    (64, None, sys::CQE32),
    (64, None, sys::SQE128),
    (16, Some(256), sys::SQE128 | sys::CQE32),
    (512, None, sys::NO_SQARRAY),
    (32, Some(32), 0),
];

fn fresh(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let rings: std::io::Result<Vec<Ring>> = ALL_SHAPES
        .iter()
        .map(|(entries, completions, flags)| Ring::new(*entries, *completions, *flags))
        .collect();
    let mut rings = rings.context("making the rings")?;
    stage.ready_and_wait()?;
    rings
        .iter_mut()
        .try_for_each(|ring| use_ring(ring, &fd, memory, 5))
}

fn shapes(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let mut rings = Vec::new();
    for (entries, completions, flags) in ALL_SHAPES {
        let mut ring = Ring::new(entries, completions, flags)?;
        turn(&mut ring, 3 * u64::from(entries) + 1)
            .with_context(|| format!("{entries} entries, flags {flags:#x}"))?;
        rings.push(ring);
    }
    stage.ready_and_wait()?;
    for ring in &mut rings {
        turn(ring, 70)?;
        use_ring(ring, &fd, memory, 5)?;
    }
    Ok(())
}

fn waiting(stage: &Stage) -> Result<()> {
    let mut ring = Ring::new(8, None, 0)?;
    turn(&mut ring, 5)?;
    let nop = |value| Request {
        value,
        ..Request::default()
    };
    for value in 100..106 {
        ring.put(&nop(value));
    }
    ring.submit(6)?;
    for value in 200..204 {
        ring.put(&nop(value));
    }
    let indices = ring.indices();
    ensure!(indices == [11, 15, 5, 11], "the ring stands at {indices:?}");
    stage.ready_and_wait()?;
    ensure!(
        ring.indices() == indices,
        "{indices:?} became {:?}",
        ring.indices()
    );
    let taken = ring.take();
    let expected: Vec<_> = (100..106).map(|value| (value, 0)).collect();
    ensure!(taken == expected, "completions {taken:?}");
    let submitted = ring.submit(4)?;
    ensure!(submitted == 4, "the kernel took {submitted} of 4 entries");
    let taken = ring.take();
    let expected: Vec<_> = (200..204).map(|value| (value, 0)).collect();
    ensure!(taken == expected, "completions {taken:?}");
    turn(&mut ring, 20)
}

fn wrapped(stage: &Stage) -> Result<()> {
    let mut ring = Ring::new(16, None, 0)?;
    turn(&mut ring, 100_003)?;
    ring.put(&Request {
        value: 77,
        ..Request::default()
    });
    ring.submit(1)?;
    let indices = ring.indices();
    stage.ready_and_wait()?;
    ensure!(
        ring.indices() == indices,
        "{indices:?} became {:?}",
        ring.indices()
    );
    ensure!(ring.take() == [(77, 0)], "the last completion");
    turn(&mut ring, 40)
}

fn shared(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let mut ring = Ring::new(8, None, 0)?;
    turn(&mut ring, 11)?;
    let again = sys::dup(&ring.fd)?;
    let child = {
        let ring = &mut ring;
        stage.child(|stage| {
            stage.ready_and_wait()?;
            use_ring(ring, &fd, memory, 6)
        })?
    };
    stage.ready_and_wait()?;
    ensure!(
        sys::same_open_file(
            sys::pid(),
            again.as_raw_fd(),
            child.pid,
            ring.fd.as_raw_fd()
        )?,
        "they have different rings now"
    );
    let [taken, ..] = ring.indices();
    child.finish()?;
    let [after, ..] = ring.indices();
    ensure!(after == taken + 2, "the child's requests are not seen here");
    Ok(())
}

fn register(ring: &Ring) -> Result<()> {
    register_as(ring, 5)
}

/// Registers the ring with this thread, of which the kernel tells how many there were.
fn register_as(ring: &Ring, index: u32) -> Result<()> {
    let place = Region::anon(PAGE)?;
    place.put(0, &index.to_ne_bytes());
    place.put(8, &u64::try_from(ring.fd.as_raw_fd())?.to_ne_bytes());
    let count = ring.register(20, place, 1)?;
    ensure!(count == 1, "{count} rings were registered");
    Ok(())
}

fn use_registered(ring: &mut Ring, index: i64, value: u64) -> Result<()> {
    ring.put(&Request {
        value,
        ..Request::default()
    });
    let taken = ring
        .submit_registered(index)
        .context("by the registered ring")?;
    ensure!(taken == 1, "the kernel took {taken} entries");
    ensure!(ring.take() == [(value, 0)], "no completion of {value}");
    Ok(())
}

fn registered(stage: &Stage) -> Result<()> {
    let ring = std::sync::Mutex::new(Ring::new(8, None, 0)?);
    let lock = || ring.lock().map_err(|_| anyhow::anyhow!("the ring is lost"));
    register(&*lock()?)?;
    use_registered(&mut *lock()?, 5, 1)?;
    let (ready, go) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            register(&*lock()?)?;
            use_registered(&mut *lock()?, 5, 2)?;
            ready.wait();
            go.wait();
            use_registered(&mut *lock()?, 5, 3)
        });
        ready.wait();
        stage.ready_and_wait()?;
        use_registered(&mut *lock()?, 5, 4)?;
        go.wait();
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thread panicked"))?
    })
}

/// The dump comes at any moment. Requests that end at once are never in flight for long.
fn under_load(stage: &Stage) -> Result<()> {
    let (fd, memory) = file(stage)?;
    let mut ring = Ring::new(32, None, 0)?;
    stage.ready()?;
    let mut round = 0u8;
    while !stage.stopping() {
        use_ring(&mut ring, &fd, memory, round)?;
        turn(&mut ring, 50)?;
        round = round.wrapping_add(1);
    }
    Ok(())
}
