//! Restartable sequences: the area that the kernel keeps a thread's CPU number in.

use std::arch::global_asm;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::sys::{self, PAGE, Region};
use crate::{Stage, Workload};

pub static GLIBC: Workload =
    Workload::new("task/rseq", "glibc's registration, in every thread", glibc);
pub static OWN: Workload = Workload::new(
    "task/rseq-section",
    "a registration of its own, frozen inside a critical section",
    |s| own(s, 32),
);
pub static LARGE: Workload =
    Workload::new("task/rseq-64", "the same with an area of 64 bytes", |s| {
        own(s, 64)
    });
pub static HUGE: Workload = Workload::new(
    "task/rseq-2048",
    "the same with an area of 2048 bytes",
    |s| own(s, 2048),
);

const CPU_ID: usize = 4;

/// Checks that the kernel writes the CPU number into the area, on every CPU there is.
fn check_updates(area: Region) -> Result<()> {
    let cpus = sys::allowed_cpus()?;
    for &cpu in &cpus {
        sys::run_on_cpu(cpu)?;
        let found = area.word(CPU_ID).load(Ordering::SeqCst);
        ensure!(found as usize == cpu, "on CPU {cpu} the area says {found}");
    }
    Ok(())
}

fn glibc(stage: &Stage) -> Result<()> {
    let (send, receive) = mpsc::channel();
    let keep = |wait: &dyn Fn() -> Result<()>| -> Result<()> {
        let area = Region {
            addr: sys::libc_rseq()?,
            len: 32,
        };
        wait()?;
        check_updates(area)?;
        // Only the registered address, length and signature may be unregistered.
        sys::unregister_rseq(area.addr, 32).context("unregistering glibc's area")
    };
    let handles: Vec<_> = (0..4)
        .map(|_| {
            let send = send.clone();
            thread::spawn(move || {
                keep(&|| {
                    send.send(()).map_err(|_| anyhow!("nobody listens"))?;
                    crate::stop::wait();
                    Ok(())
                })
            })
        })
        .collect();
    handles.iter().try_for_each(|_| receive.recv())?;
    keep(&|| stage.ready_and_wait())?;
    handles
        .into_iter()
        .try_for_each(|handle| handle.join().map_err(|_| anyhow!("a thread panicked"))?)
}

unsafe extern "C" {
    /// Enters a critical section with the given area, spins in it until SIGTERM or until aborted;
    /// returns how often it was aborted. The descriptor is at `zdtm_rseq_section`.
    fn zdtm_rseq_spin(area: usize) -> u64;
}

// Every preemption aborts the section, and the abort handler enters it again: that the count grows
// and the loop still ends by SIGTERM shows that descriptor and area are known to the kernel.
global_asm!(
    r#"
    .pushsection .data.rel.ro, "aw"
    .balign 32
    zdtm_rseq_section:
        .long 0, 0
        .quad 3f
        .quad 4f - 3f
        .quad 5f
    .popsection
    .pushsection .text
    .globl zdtm_rseq_spin
    zdtm_rseq_spin:
        xor eax, eax
    2:  lea rdx, [rip + zdtm_rseq_section]
        mov [rdi + 8], rdx
    3:  mov ecx, dword ptr [rip + {stop}]
        jrcxz 3b
    4:  mov qword ptr [rdi + 8], 0
        ret
        .long {signature}
    5:  inc rax
        jmp 2b
    .popsection
    "#,
    stop = sym crate::stop::STOPPED,
    signature = const sys::RSEQ_SIGNATURE,
);

/// Linux 6.3 takes longer areas than 32 bytes.
fn own(stage: &Stage, len: u32) -> Result<()> {
    sys::unregister_rseq(sys::libc_rseq()?, 32).context("taking back glibc's registration")?;
    let area = Region::anon(PAGE)?;
    sys::register_rseq(area, len).context("registering an area")?;
    stage.ready()?;
    // SAFETY: the area is registered, and the section writes only to it.
    let aborted = unsafe { zdtm_rseq_spin(area.addr) };
    // SIGTERM itself came by interrupting the section.
    ensure!(aborted >= 1, "the section was never aborted");
    check_updates(area)?;
    sys::unregister_rseq(area.addr, len).context("unregistering the own area")
}
