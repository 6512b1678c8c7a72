//! Character devices of /dev.

use anyhow::{Result, ensure};

use crate::{Stage, Workload, sys};

pub static CHARACTER: Workload = Workload::new(
    "files/devices",
    "null, zero, full, random, urandom",
    character,
);
pub static STANDARD: Workload = Workload::new(
    "files/no-standard",
    "a task without descriptors 0, 1 and 2",
    standard,
);

fn character(stage: &Stage) -> Result<()> {
    let open = |name: &str, flags| sys::open(format!("/dev/{name}"), flags);
    let null = open("null", libc::O_RDWR)?;
    let zero = open("zero", libc::O_RDONLY)?;
    let full = open("full", libc::O_RDWR | libc::O_NONBLOCK)?;
    let random = [
        open("random", libc::O_RDONLY)?,
        open("urandom", libc::O_RDONLY)?,
    ];
    stage.ready_and_wait()?;
    let mut buffer = [1; 64];
    ensure!(
        sys::read(&null, &mut buffer)? == 0,
        "/dev/null gives something"
    );
    ensure!(
        sys::write(&null, b"gone")? == 4,
        "/dev/null does not take everything"
    );
    ensure!(
        sys::read(&zero, &mut buffer)? == 64 && buffer == [0; 64],
        "/dev/zero is not zero"
    );
    let error = sys::write(&full, b"x")
        .err()
        .and_then(|error| error.raw_os_error());
    ensure!(error == Some(libc::ENOSPC), "/dev/full gave {error:?}");
    for fd in random {
        ensure!(
            sys::read(&fd, &mut buffer)? == 64 && buffer != [0; 64],
            "no random bytes"
        );
    }
    Ok(())
}

fn standard(stage: &Stage) -> Result<()> {
    let child = stage.child(|stage| {
        for number in 0..3 {
            sys::close(number)?;
        }
        stage.ready_and_wait()?;
        for number in 0..3 {
            let open = sys::close(number).is_ok();
            ensure!(!open, "descriptor {number} is open");
        }
        Ok(())
    })?;
    stage.ready_and_wait()?;
    child.finish()
}
