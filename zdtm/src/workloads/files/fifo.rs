//! Named fifos.

use std::fs;

use anyhow::{Result, ensure};

use crate::{Stage, Workload, sys};

pub static NAMED: Workload = Workload::new(
    "files/fifo",
    "a fifo with both ends in two tasks, and something in it",
    named,
);
pub static ONE_END: Workload = Workload::new(
    "files/fifo-one-end",
    "a fifo of which only the reading end is open",
    one_end,
);
pub static REMOVED: Workload = Workload::new(
    "files/fifo-removed",
    "a fifo that has lost its name",
    removed,
);

fn named(stage: &Stage) -> Result<()> {
    let path = stage.path("fifo");
    sys::mkfifo(&path)?;
    let both = sys::open(&path, libc::O_RDWR)?;
    let writing = path.clone();
    let child = stage.child(move |stage| {
        let writer = sys::open(&writing, libc::O_WRONLY | libc::O_NONBLOCK)?;
        sys::write(&writer, b"child ")?;
        stage.ready_and_wait()?;
        sys::write(&writer, b"again")?;
        Ok(())
    })?;
    sys::fcntl(&both, libc::F_SETPIPE_SZ, 16384)?;
    stage.ready_and_wait()?;
    child.finish()?;
    let text = sys::read_exact(&both, 11)?;
    ensure!(
        text == b"child again",
        "the fifo gave {:?}",
        String::from_utf8_lossy(&text)
    );
    let size = sys::fcntl(&both, libc::F_GETPIPE_SZ, 0)?;
    ensure!(size == 16384, "the size was 16384, is {size}");
    // Whoever opens the name now must come to the same fifo.
    let writer = sys::open(&path, libc::O_WRONLY | libc::O_NONBLOCK)?;
    sys::write(&writer, b"x")?;
    ensure!(
        sys::read_exact(&both, 1)? == b"x",
        "the name leads to another fifo"
    );
    Ok(())
}

fn one_end(stage: &Stage) -> Result<()> {
    let path = stage.path("fifo");
    sys::mkfifo(&path)?;
    let reader = sys::open(&path, libc::O_RDONLY | libc::O_NONBLOCK)?;
    stage.ready_and_wait()?;
    let mut byte = [0];
    ensure!(
        sys::read(&reader, &mut byte)? == 0,
        "somebody has the writing end"
    );
    fs::write(&path, "late")?;
    ensure!(
        sys::read_exact(&reader, 4)? == b"late",
        "the name leads to another fifo"
    );
    Ok(())
}

fn removed(stage: &Stage) -> Result<()> {
    let path = stage.path("fifo");
    sys::mkfifo(&path)?;
    let both = sys::open(&path, libc::O_RDWR)?;
    sys::write(&both, b"kept")?;
    fs::remove_file(&path)?;
    stage.ready_and_wait()?;
    ensure!(
        sys::read_exact(&both, 4)? == b"kept",
        "the contents have changed"
    );
    ensure!(!path.exists(), "the removed fifo is back");
    Ok(())
}
