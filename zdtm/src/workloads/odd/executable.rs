//! Programs whose executable is not where it was.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::workload::find_program;
use crate::{Need, Stage, Workload, proc, sys};

pub static DELETED: Workload = Workload::new(
    "odd/deleted-executable",
    "a program whose file has been removed",
    deleted,
);
pub static MEMFD: Workload = Workload::new(
    "odd/memfd-executable",
    "a program run from a memory file",
    memfd,
);
pub static COPIED: Workload = Workload::new(
    "odd/other-executable",
    "parent and child with different executables",
    copied,
);

pub static OVERLAY: Workload = Workload::new(
    "odd/overlay-executable",
    "a program run from an overlay: from its lower layer, and copied up",
    overlay,
)
.needs(&[Need::FileSystem("overlay"), Need::Root]);

/// Set in the environment of the second life, after the exec.
const SECOND: &str = "FIRN_ZDTM_SECOND_LIFE";

/// Runs this very workload again from another file; returns only in its second life.
fn live_again(stage: &Stage, name: &str, program: &Path) -> Result<()> {
    if std::env::var_os(SECOND).is_some() {
        return Ok(());
    }
    // SAFETY: this task has one thread.
    unsafe { std::env::set_var(SECOND, "1") };
    let dir = stage.dir().to_string_lossy();
    let error = sys::exec(program, &["workload", name, "--dir", &dir]);
    bail!("the program cannot be run again: {error}")
}

fn copy_of_program(stage: &Stage) -> Result<PathBuf> {
    let path = stage.path("program");
    if std::env::var_os(SECOND).is_none() {
        fs::copy("/proc/self/exe", &path)?;
    }
    Ok(path)
}

fn deleted(stage: &Stage) -> Result<()> {
    let path = copy_of_program(stage)?;
    live_again(stage, "odd/deleted-executable", &path)?;
    fs::remove_file(&path)?;
    let before = proc::link("self", "exe")?;
    stage.ready_and_wait()?;
    let after = proc::link("self", "exe")?;
    ensure!(
        before == after,
        "the executable was {before:?}, is {after:?}"
    );
    ensure!(!path.exists(), "the removed executable is back");
    let mut start = [0; 4];
    std::io::Read::read_exact(&mut File::open("/proc/self/exe")?, &mut start)?;
    ensure!(&start == b"\x7fELF", "the executable starts with {start:?}");
    Ok(())
}

/// Each child is a program that only sleeps.
fn overlay(stage: &Stage) -> Result<()> {
    let base = stage.path("layers");
    fs::create_dir(&base)?;
    sys::mount(Some(c"tmpfs"), &sys::c_path(&base)?, Some(c"tmpfs"), 0).context("a tmpfs")?;
    fs::create_dir(base.join("lower"))?;
    for name in ["plain", "copied"] {
        fs::copy(
            find_program("sleep").context("no sleep")?,
            base.join("lower").join(name),
        )?;
    }
    let merged = sys::mount_overlay(&base).context("an overlay")?;
    drop(sys::open(merged.join("copied"), libc::O_RDWR)?);
    let mut sleepers = Vec::new();
    for name in ["plain", "copied"] {
        let program = merged.join(name);
        let sleeper = Command::new(&program).arg("1000").spawn()?;
        let pid = i32::try_from(sleeper.id())?;
        while proc::link(pid, "exe")? != program {
            sys::pause_for(1);
        }
        sleepers.push((program, pid));
    }
    stage.ready_and_wait()?;
    for (program, pid) in sleepers {
        let exe = proc::link(pid, "exe")?;
        ensure!(
            exe == program,
            "{} has become {}",
            program.display(),
            exe.display()
        );
        let busy = sys::open(&program, libc::O_WRONLY).map_err(|error| error.raw_os_error());
        ensure!(
            busy.err() == Some(Some(libc::ETXTBSY)),
            "its executable is not busy"
        );
        sys::kill(pid, libc::SIGKILL)?;
        sys::wait(pid)?;
    }
    sys::unmount(&sys::c_path(&merged)?)?;
    Ok(sys::unmount(&sys::c_path(&base)?)?)
}

fn memfd(stage: &Stage) -> Result<()> {
    if std::env::var_os(SECOND).is_none() {
        // It comes back as a file of that name in the root directory, where another instance does the same.
        let dir = stage.dir().to_string_lossy().replace('/', ".");
        let name = CString::new(format!("program{dir}"))?;
        let mut file = File::from(sys::memfd(&name, libc::MFD_CLOEXEC)?);
        file.write_all(&fs::read("/proc/self/exe")?)?;
        let name = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        live_again(stage, "odd/memfd-executable", &name)?;
    }
    let before = proc::link("self", "exe")?;
    let name = before.to_string_lossy().into_owned();
    ensure!(
        name.starts_with("/memfd:"),
        "not run from a memory file: {name}"
    );
    stage.ready_and_wait()?;
    let after = proc::link("self", "exe")?;
    ensure!(
        before == after,
        "the executable was {before:?}, is {after:?}"
    );
    Ok(())
}

fn copied(stage: &Stage) -> Result<()> {
    let path = copy_of_program(stage)?;
    live_again(stage, "odd/other-executable", &path)?;
    let pid = sys::fork()?;
    if pid == 0 {
        let _ = sys::exec(Path::new("/bin/sleep"), &["1000"]);
        sys::exit_now(99);
    }
    while !proc::link(pid, "exe")?.ends_with("sleep") {
        sys::pause_for(1);
    }
    let links = || Ok::<_, anyhow::Error>((proc::link("self", "exe")?, proc::link(pid, "exe")?));
    let before = links()?;
    ensure!(before.0 == path, "the own executable is {:?}", before.0);
    stage.ready_and_wait()?;
    let after = links()?;
    ensure!(
        before == after,
        "the executables were {before:?}, are {after:?}"
    );
    sys::kill(pid, libc::SIGTERM)?;
    let exit = sys::wait(pid)?;
    ensure!(
        exit == sys::Exit::Signal(libc::SIGTERM),
        "sleep ended with {exit}"
    );
    Ok(())
}
