//! Trees of 64-bit and 32-bit programs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{NEEDS, compile, run};
use crate::{Need, Stage, Workload, proc, sys};

pub static TREE: Workload = Workload::new(
    "ia32/tree",
    "64-bit parent, 32-bit child with threads, 64-bit sibling",
    tree,
)
.needs(NEEDS)
.moves(&["syscall"]);
pub static BARE: Workload = Workload::new(
    "ia32/bare",
    "a child that runs a 32-bit program of 93 bytes, without libc and thread pointer",
    bare,
)
.needs(&[Need::File("/proc/sys/abi/vsyscall32")]);

fn tree(stage: &Stage) -> Result<()> {
    let program = compile(stage, "threads")?;
    let dir = stage.path("child");
    fs::create_dir(&dir)?;
    let child = sys::fork()?;
    if child == 0 {
        eprintln!("{}", run(&program, "threads", &dir));
        sys::exit_now(99);
    }
    let sibling = stage.child(|stage| {
        let on_heap = vec![17u64; 100_000];
        stage.ready_and_wait()?;
        ensure!(
            on_heap.iter().all(|&number| number == 17),
            "the heap differs"
        );
        Ok(())
    })?;
    while !dir.join("ready").exists() {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    sibling.finish()?;
    sys::kill(child, libc::SIGTERM)?;
    let exit = sys::wait(child)?;
    let result = fs::read_to_string(dir.join("result")).context("the child's result")?;
    ensure!(exit == sys::Exit::Code(0), "the child: {exit}, {result}");
    Ok(())
}

/// mov eax, 29 (pause); int 0x80; jmp back
const CODE: [u8; 9] = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];

fn executable() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let length = HEADERS + 9;
    let mut image = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves = |image: &mut Vec<u8>, values: &[u16]| {
        image.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    let words = |image: &mut Vec<u8>, values: &[u32]| {
        image.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    halves(&mut image, &[2, 3]); // an executable, for i386
    words(&mut image, &[1, BASE + HEADERS, 52, 0, 0]); // version, entry, program headers
    halves(&mut image, &[52, 32, 1, 0, 0, 0]);
    words(&mut image, &[1, 0, BASE, BASE, length, length, 5, 4096]); // one PT_LOAD
    image.extend(CODE);
    image
}

fn bare(stage: &Stage) -> Result<()> {
    let path = stage.path("program");
    fs::write(&path, executable())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
    let child = sys::fork()?;
    if child == 0 {
        let _ = sys::exec(&path, &[]);
        sys::exit_now(1);
    }
    let is_running = |path: &Path| proc::link(child, "exe").is_ok_and(|exe| exe == path);
    while !is_running(&path) {
        sys::pause_for(1);
    }
    stage.ready_and_wait()?;
    let (_, status) = sys::wait_status(child, libc::WNOHANG)?;
    ensure!(status == 0, "the child has ended with {status:x}");
    sys::kill(child, libc::SIGKILL)?;
    let exit = sys::wait(child)?;
    ensure!(
        exit == sys::Exit::Signal(libc::SIGKILL),
        "the child: {exit}"
    );
    Ok(())
}
