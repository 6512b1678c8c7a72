//! A thread-local segment of 64-bit code: only 32-bit calls make and tell one, and those take low addresses.

use std::arch::asm;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::sys::{PAGE, RW, Region};
use crate::{Need, Stage, Workload};

pub static SEGMENT: Workload = Workload::new(
    "ia32/segment",
    "a thread of a 64-bit program that has a thread-local segment, beside one that has another",
    segment,
)
.needs(&[Need::File("/proc/sys/abi/vsyscall32")]);

const SET_THREAD_AREA: i64 = 243;
const GET_THREAD_AREA: i64 = 244;
/// The first and the last of the three entries.
const ENTRIES: [u32; 2] = [12, 14];
/// seg_32bit, limit_in_pages, useable.
const FLAGS: u32 = 1 | 1 << 4 | 1 << 6;
/// read_exec_only and seg_not_present: an empty entry.
const EMPTY: u32 = 1 << 3 | 1 << 5;

/// struct user_desc: entry, base, limit, flags.
type Descriptor = [u32; 4];

/// Makes a 32-bit call about a descriptor, which it may write.
fn call(nr: i64, descriptor: &mut Descriptor) -> Result<i64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    let low = Region::map(None, PAGE, RW, flags, None, 0).context("a page below 4 GiB")?;
    low.put(0, &descriptor.map(u32::to_ne_bytes).concat());
    let result: i64;
    // SAFETY: the call reads and writes no more than a descriptor, in a page that nothing else refers to.
    unsafe {
        asm!(
            "xchg rbx, {address}",
            "int 0x80",
            "xchg rbx, {address}",
            address = inout(reg) low.addr => _,
            inout("rax") nr => result,
            out("r8") _,
            out("r9") _,
            out("r10") _,
            out("r11") _,
        );
    }
    for (word, bytes) in descriptor.iter_mut().zip(low.get(0, 16).chunks_exact(4)) {
        *word = u32::from_ne_bytes(bytes.try_into().expect("four bytes"));
    }
    low.unmap()?;
    Ok(result)
}

fn set(entry: u32, base: u32) -> Result<()> {
    let result = call(SET_THREAD_AREA, &mut [entry, base, 0xfffff, FLAGS])?;
    ensure!(result == 0, "set_thread_area returned {result}");
    Ok(())
}

fn check(entry: u32, base: u32, flags: u32) -> Result<()> {
    let mut found = [entry, 0, 0, 0];
    let result = call(GET_THREAD_AREA, &mut found)?;
    ensure!(result == 0, "get_thread_area returned {result}");
    ensure!(
        found[1] == base && found[3] & 0x7f == flags,
        "entry {entry} is {found:x?}"
    );
    Ok(())
}

fn segment(stage: &Stage) -> Result<()> {
    let (is_set, other_is_set) = mpsc::channel();
    let (go_on, restored) = mpsc::channel::<()>();
    let other = thread::spawn(move || -> Result<()> {
        set(ENTRIES[1], 0x2000)?;
        is_set.send(()).context("the first thread")?;
        restored.recv().context("the first thread")?;
        check(ENTRIES[0], 0, EMPTY)?;
        check(ENTRIES[1], 0x2000, FLAGS)
    });
    other_is_set.recv().context("the other thread")?;
    set(ENTRIES[0], 0x1000)?;
    stage.ready_and_wait()?;
    check(ENTRIES[0], 0x1000, FLAGS)?;
    check(ENTRIES[1], 0, EMPTY)?;
    go_on.send(()).context("the other thread")?;
    other.join().expect("it does not panic")
}
