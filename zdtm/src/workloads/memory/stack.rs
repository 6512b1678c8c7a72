//! Stacks that grow, and the heap of malloc.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::sys::{PAGE, RW, Region};
use crate::{Stage, Workload, proc};

pub static MAIN: Workload = Workload::new(
    "memory/stack",
    "the main stack grows after the restore",
    main_stack,
);
pub static THREAD: Workload = Workload::new(
    "memory/thread-stack",
    "frozen deep in a recursion of a thread",
    thread_stack,
);
pub static GROWS_DOWN: Workload = Workload::new(
    "memory/grows-down",
    "a mapping made with MAP_GROWSDOWN",
    grows_down,
);
pub static GROWS_DOWN_EDGES: Workload = Workload::new(
    "memory/grows-down-edges",
    "growing mappings: large, with a neighbour right below, with a lowest page that nobody may touch",
    grows_down_edges,
);
pub static MALLOC: Workload =
    Workload::new("memory/malloc", "a heap full of small objects", malloc);

/// Recurses with half a page at each depth, does something at the bottom, and checks on the way back.
fn recurse(depth: usize, bottom: &mut dyn FnMut() -> Result<()>) -> Result<usize> {
    let frame = black_box([depth; 256]);
    let below = if depth == 0 {
        bottom()?;
        0
    } else {
        recurse(depth - 1, bottom)?
    };
    ensure!(
        black_box(frame) == [depth; 256],
        "the frame at depth {depth} has changed"
    );
    Ok(below + 1)
}

fn main_stack(stage: &Stage) -> Result<()> {
    let local = black_box([0x5a_u8; 1000]);
    recurse(20, &mut || stage.ready_and_wait())?;
    let stack = |vma: &proc::Vma| vma.path == "[stack]";
    let before = proc::maps("self")?.into_iter().find(stack);
    // Some MiB deep, where there were some hundred KiB.
    let frames = recurse(400, &mut || Ok(()))?;
    let after = proc::maps("self")?.into_iter().find(stack);
    let (Some(before), Some(after)) = (before, after) else {
        return Err(anyhow!("no VMA is called [stack]"));
    };
    ensure!(frames == 401, "{frames} frames");
    ensure!(
        after.start < before.start && after.end == before.end,
        "{before:?} became {after:?}"
    );
    ensure!(
        black_box(local) == [0x5a; 1000],
        "the stack's contents have changed"
    );
    Ok(())
}

fn thread_stack(stage: &Stage) -> Result<()> {
    let (send, receive) = mpsc::channel();
    let deep = thread::Builder::new().stack_size(8 << 20).spawn(move || {
        let at_bottom = &mut || {
            send.send(()).map_err(|_| anyhow!("nobody listens"))?;
            crate::stop::wait();
            Ok(())
        };
        recurse(300, at_bottom)
    })?;
    receive.recv()?;
    stage.ready_and_wait()?;
    let frames = deep.join().map_err(|_| anyhow!("the thread panicked"))??;
    ensure!(frames == 301, "{frames} frames");
    Ok(())
}

/// The kernel grows such a mapping at a fault just below it.
fn grows_down(stage: &Stage) -> Result<()> {
    let room = Region::anon(1 << 20)?;
    room.unmap()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
    let place = room.end() - 16 * PAGE;
    let stack = Region::map(Some(place), 8 * PAGE, RW, flags, None, 0)?;
    stack.fill(3);
    stage.ready_and_wait()?;
    stack.check(3)?;
    let below = Region {
        addr: stack.addr - 4 * PAGE,
        len: 4 * PAGE,
    };
    for page in (0..4).rev() {
        below.put(page * PAGE + 8, &[1]);
    }
    let vma = proc::details_at(below.addr)?;
    ensure!(
        vma.has_flag("gd"),
        "the mapping does not grow any more: {:?}",
        vma.lines
    );
    ensure!(
        vma.vma.end == stack.end(),
        "the grown part is another VMA: {:?}",
        vma.vma
    );
    stack.check(3)
}

fn grows_down_edges(stage: &Stage) -> Result<()> {
    const LARGE: usize = 20 << 20;
    let growing = |at: usize, len: usize| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
        Region::map(Some(at), len, RW, flags, None, 0)
    };
    let room = Region::anon(64 << 20)?;
    room.unmap()?;
    let large = growing(room.addr + (4 << 20), LARGE)?;
    let narrow = growing(room.addr + (40 << 20), 8 * PAGE)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let below = Region::map(Some(narrow.addr - PAGE), PAGE, RW, flags, None, 0)?;
    let fenced = growing(room.addr + (50 << 20), 8 * PAGE)?;
    for (seed, region) in (1..).zip([large, narrow, below, fenced]) {
        region.fill(seed);
    }
    fenced.part(0, PAGE).protect(libc::PROT_NONE)?;
    stage.ready_and_wait()?;
    for (seed, region) in (1..).zip([large, narrow, below]) {
        region.check(seed)?;
        let vma = proc::details_at(region.addr)?.vma;
        ensure!(
            vma.start == region.addr,
            "a mapping begins elsewhere: {vma:?}"
        );
    }
    fenced.part(0, PAGE).protect(RW)?;
    fenced.check(4)?;
    for region in [large, narrow, fenced] {
        let vma = proc::details_at(region.addr)?;
        ensure!(
            vma.has_flag("gd"),
            "a mapping does not grow any more: {vma:?}"
        );
    }
    Ok(())
}

fn malloc(stage: &Stage) -> Result<()> {
    let mut map: HashMap<u64, String> = (0..20_000).map(|n| (n, format!("value {n}"))).collect();
    let large: Vec<Vec<u8>> = (0..20u8).map(|n| vec![n; 300_000]).collect();
    map.retain(|n, _| n % 3 != 0);
    stage.ready_and_wait()?;
    for n in 0..20_000 {
        let wanted = (n % 3 != 0).then(|| format!("value {n}"));
        ensure!(
            map.get(&n) == wanted.as_ref(),
            "entry {n} is {:?}",
            map.get(&n)
        );
    }
    for (n, block) in (0..).zip(&large) {
        ensure!(block.iter().all(|&byte| byte == n), "block {n} has changed");
    }
    map.extend((0..20_000).map(|n| (n, "again".to_owned())));
    drop(large);
    ensure!(map.len() == 20_000, "{} entries", map.len());
    Ok(())
}
