//! Locks and leases.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};

use crate::{Stage, Workload, sys};

const SAVED: &[&str] = &["--file-locks"];

pub static POSIX: Workload = Workload::new(
    "files/locks-posix",
    "POSIX locks of whole files and of ranges, by two tasks",
    posix,
)
.dump_options(SAVED);
pub static OFD: Workload = Workload::new(
    "files/locks-ofd",
    "locks of open files, which two tasks share",
    ofd,
)
.dump_options(SAVED);
pub static FLOCK: Workload = Workload::new(
    "files/locks-flock",
    "flock, shared and exclusive, through a fork",
    flock,
)
.dump_options(SAVED);
pub static WAITERS: Workload = Workload::new(
    "files/locks-waiters",
    "tasks that wait for a lock wait on, and get it",
    waiters,
)
.dump_options(SAVED);
pub static LEASES: Workload = Workload::new(
    "files/leases",
    "leases for reading and writing, broken after the restore",
    leases,
)
.dump_options(SAVED);
pub static BREAKING: Workload = Workload::new(
    "files/lease-breaking",
    "leases that somebody waits for, one of whom sleeps until it is given up",
    breaking,
)
.dump_options(SAVED);

/// The survey tells before anything is stopped; either way of it (one by one, all of the machine) must.
pub static REFUSED: Workload = Workload::new(
    "files/locks-refused",
    "a locked file, without --file-locks",
    |stage| refused(stage, 0),
)
.refused(&["holds a lock (FLOCK ADVISORY WRITE)", "--file-locks"]);
pub static REFUSED_AMONG_MANY: Workload = Workload::new(
    "files/locks-refused-among-many",
    "a locked file among five hundred that are not, without --file-locks",
    |stage| refused(stage, 500),
)
.refused(&["holds a lock (POSIX ADVISORY READ)", "--file-locks"]);

const F_OFD_GETLK: i32 = 36;
const F_OFD_SETLK: i32 = 37;
const READ: i16 = 0;
const WRITE: i16 = 1;
const NONE: i16 = 2;

fn file(path: &Path) -> std::io::Result<OwnedFd> {
    sys::open(path, libc::O_RDWR | libc::O_CREAT)
}

/// The first lock in the way of a write lock on a range, as another open file sees it: type, start, length.
fn in_the_way(probe: &OwnedFd, start: i64, len: i64) -> Result<(i16, i64, i64)> {
    let found = sys::lock_range(probe, F_OFD_GETLK, WRITE, start, len)?;
    Ok((found.l_type, found.l_start, found.l_len))
}

fn posix(stage: &Stage) -> Result<()> {
    let path = stage.path("file");
    let fd = file(&path)?;
    let twin = file(&path)?;
    // To close it would give up the task's locks.
    let probe = file(&path)?;
    let set = |fd: &OwnedFd, kind, start, len| {
        sys::lock_range(fd, libc::F_SETLK, kind, start, len).map(drop)
    };
    set(&fd, WRITE, 10, 5)?;
    set(&twin, READ, 100, 1)?;
    set(&fd, READ, 1 << 40, 0)?;
    let child = stage.child(|stage| {
        let own = file(&stage.path("file"))?;
        set(&own, WRITE, 20, 5)?;
        set(&own, READ, 100, 10)?;
        stage.ready_and_wait()?;
        set(&own, WRITE, 20, 5)?;
        Ok(())
    })?;
    stage.ready_and_wait()?;
    let found = in_the_way(&probe, 0, 15)?;
    ensure!(found == (WRITE, 10, 5), "the first range: {found:?}");
    let found = in_the_way(&probe, 15, 20)?;
    ensure!(found == (WRITE, 20, 5), "the child's range: {found:?}");
    let found = in_the_way(&probe, 1 << 39, 0)?;
    ensure!(found == (READ, 1 << 40, 0), "the open end: {found:?}");
    ensure!(
        set(&fd, WRITE, 22, 1).is_err(),
        "the child's lock does not hold against its parent"
    );
    set(&fd, NONE, 0, 0)?;
    let found = in_the_way(&probe, 0, 15)?;
    ensure!(found.0 == NONE, "the lock is not the task's own: {found:?}");
    child.finish()?;
    let found = in_the_way(&probe, 0, 0)?;
    ensure!(found.0 == NONE, "the child's end leaves {found:?}");
    Ok(())
}

fn ofd(stage: &Stage) -> Result<()> {
    let path = stage.path("file");
    let fd = file(&path)?;
    sys::lock_range(&fd, F_OFD_SETLK, WRITE, 5, 10)?;
    let reader = sys::open(&path, libc::O_RDONLY)?;
    sys::lock_range(&reader, F_OFD_SETLK, READ, 50, 0)?;
    let probe = file(&path)?;
    let child = stage.child(|stage| stage.ready_and_wait())?;
    stage.ready_and_wait()?;
    let found = in_the_way(&probe, 0, 20)?;
    ensure!(found == (WRITE, 5, 10), "the first: {found:?}");
    let found = in_the_way(&probe, 40, 0)?;
    ensure!(found == (READ, 50, 0), "the second: {found:?}");
    drop(fd);
    let found = in_the_way(&probe, 0, 20)?;
    ensure!(found.0 == WRITE, "the child has it open still: {found:?}");
    child.finish()?;
    let found = in_the_way(&probe, 0, 20)?;
    ensure!(found.0 == NONE, "nobody has it open: {found:?}");
    Ok(())
}

fn flock(stage: &Stage) -> Result<()> {
    let (first, second) = (stage.path("first"), stage.path("second"));
    let exclusive = file(&first)?;
    sys::flock(&exclusive, libc::LOCK_EX)?;
    let (a, b) = (file(&second)?, file(&second)?);
    sys::flock(&a, libc::LOCK_SH)?;
    sys::flock(&b, libc::LOCK_SH)?;
    let try_lock = |path: &Path, operation| -> Result<bool> {
        let probe = file(path)?;
        Ok(sys::flock(&probe, operation | libc::LOCK_NB).is_ok())
    };
    let child = stage.child(|stage| stage.ready_and_wait())?;
    stage.ready_and_wait()?;
    ensure!(!try_lock(&first, libc::LOCK_SH)?, "the first is not locked");
    ensure!(
        !try_lock(&second, libc::LOCK_EX)?,
        "the second is not locked"
    );
    ensure!(try_lock(&second, libc::LOCK_SH)?, "it is not a shared one");
    drop(exclusive);
    ensure!(
        !try_lock(&first, libc::LOCK_SH)?,
        "the child does not hold it"
    );
    child.finish()?;
    ensure!(try_lock(&first, libc::LOCK_EX)?, "somebody holds it");
    sys::flock(&a, libc::LOCK_UN)?;
    ensure!(!try_lock(&second, libc::LOCK_EX)?, "both were one lock");
    sys::flock(&b, libc::LOCK_UN)?;
    ensure!(try_lock(&second, libc::LOCK_EX)?, "it is locked still");
    Ok(())
}

fn waiters(stage: &Stage) -> Result<()> {
    let (ranges, whole) = (stage.path("ranges"), stage.path("whole"));
    let fd = file(&ranges)?;
    sys::lock_range(&fd, libc::F_SETLK, WRITE, 0, 10)?;
    let held = file(&whole)?;
    sys::flock(&held, libc::LOCK_EX)?;
    let waits_for_range = stage.child(|stage| {
        let own = file(&stage.path("ranges"))?;
        stage.ready()?;
        while sys::lock_range(&own, libc::F_SETLKW, WRITE, 5, 1).is_err() {}
        stage.wait();
        Ok(())
    })?;
    let waits_for_whole = stage.child(|stage| {
        let own = file(&stage.path("whole"))?;
        stage.ready()?;
        while sys::flock(&own, libc::LOCK_EX).is_err() {}
        stage.wait();
        Ok(())
    })?;
    for (child, call) in [
        (&waits_for_range, libc::SYS_fcntl),
        (&waits_for_whole, libc::SYS_flock),
    ] {
        let call = format!("{call} ");
        while !crate::proc::text(child.pid, "syscall")?.starts_with(&call) {
            sys::pause_for(1);
        }
    }
    stage.ready_and_wait()?;
    sys::lock_range(&fd, libc::F_SETLK, NONE, 0, 10)?;
    sys::flock(&held, libc::LOCK_UN)?;
    // They have their locks when nobody else can get them.
    for _ in 0..5000 {
        let probe = file(&whole)?;
        let free = sys::flock(&probe, libc::LOCK_EX | libc::LOCK_NB).is_ok();
        if !free && in_the_way(&fd, 0, 10)? == (WRITE, 5, 1) {
            waits_for_range.finish()?;
            return waits_for_whole.finish();
        }
        drop(probe);
        sys::pause_for(2);
    }
    anyhow::bail!("nobody took the locks")
}

static BROKEN: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_break(_signal: i32) {
    BROKEN.fetch_add(1, Ordering::SeqCst);
}

fn leases(stage: &Stage) -> Result<()> {
    sys::handle(libc::SIGIO, on_break, 0)?;
    let (first, second) = (stage.path("first"), stage.path("second"));
    drop((file(&first)?, file(&second)?));
    let reads = sys::open(&first, libc::O_RDONLY)?;
    let writes = sys::open(&second, libc::O_RDWR)?;
    set_lease(&reads, libc::F_RDLCK)?;
    set_lease(&writes, libc::F_WRLCK)?;
    stage.ready_and_wait()?;
    for (fd, path, wanted) in [
        (&reads, &first, libc::F_RDLCK),
        (&writes, &second, libc::F_WRLCK),
    ] {
        let found = sys::fcntl(fd, libc::F_GETLEASE, 0)?;
        ensure!(found == wanted, "the lease was {wanted}, is {found}");
        let before = BROKEN.load(Ordering::SeqCst);
        let opened = sys::open(path, libc::O_WRONLY | libc::O_NONBLOCK);
        ensure!(opened.is_err(), "the lease is not respected");
        let count = BROKEN.load(Ordering::SeqCst) - before;
        ensure!(count == 1, "{count} signals came");
        set_lease(fd, libc::F_UNLCK)?;
        drop(sys::open(path, libc::O_WRONLY | libc::O_NONBLOCK)?);
    }
    Ok(())
}

/// The holder was told before the dump and is not told again.
fn breaking(stage: &Stage) -> Result<()> {
    sys::handle(libc::SIGIO, on_break, 0)?;
    let (first, second) = (stage.path("first"), stage.path("second"));
    drop((file(&first)?, file(&second)?));
    let reads = sys::open(&first, libc::O_RDONLY)?;
    let writes = sys::open(&second, libc::O_RDWR)?;
    set_lease(&reads, libc::F_RDLCK)?;
    set_lease(&writes, libc::F_WRLCK)?;
    let opened = sys::open(&first, libc::O_WRONLY | libc::O_NONBLOCK);
    ensure!(opened.is_err(), "the lease is not respected");
    let waits = stage.child(|stage| {
        stage.ready()?;
        while let Err(error) = sys::open(stage.path("second"), libc::O_RDONLY) {
            ensure!(error.kind() == std::io::ErrorKind::Interrupted, "{error}");
        }
        stage.wait();
        Ok(())
    })?;
    while BROKEN.load(Ordering::SeqCst) < 2 {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    let told = BROKEN.load(Ordering::SeqCst);
    for (fd, target) in [(&reads, libc::F_UNLCK), (&writes, libc::F_RDLCK)] {
        let found = sys::fcntl(fd, libc::F_GETLEASE, 0)?;
        ensure!(found == target, "{target} is to be left, found {found}");
        set_lease(fd, libc::F_UNLCK)?;
    }
    // A task that sleeps for a lease asks again when it is restored.
    ensure!(told <= 3, "{told} signals came");
    drop(sys::open(&first, libc::O_WRONLY | libc::O_NONBLOCK)?);
    waits.finish()
}

fn refused(stage: &Stage, nr_others: usize) -> Result<()> {
    let others = (0..nr_others).map(|_| file(&stage.path("other")));
    let others = others.collect::<std::io::Result<Vec<_>>>()?;
    let locked = file(&stage.path("locked"))?;
    match nr_others {
        0 => sys::flock(&locked, libc::LOCK_EX)?,
        _ => sys::lock_range(&locked, libc::F_SETLK, READ, 3, 0).map(drop)?,
    }
    stage.ready_and_wait()?;
    drop(others);
    Ok(())
}

fn set_lease(fd: impl AsFd, kind: i32) -> Result<()> {
    sys::fcntl(fd, libc::F_SETLEASE, i64::from(kind))?;
    Ok(())
}
