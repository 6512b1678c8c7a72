//! NUMA policies of threads and of memory.

use std::sync::{Arc, Barrier};
use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::sys::{self, Region};
use crate::{Need, Stage, Workload};

pub static POLICIES: Workload = Workload::new(
    "memory/numa",
    "NUMA policies of two threads, of memory, and of what a child has inherited",
    policies,
)
.needs(&[Need::Call(libc::SYS_get_mempolicy, "get_mempolicy")]);

const NODE_0: u64 = 1;
/// A node more than there may be, which is kept for the day when it comes.
const WITH_MORE: u64 = 3;

/// Policies that one node is enough for.
const MODES: [(u32, u64); 6] = [
    (sys::MPOL_BIND, NODE_0),
    (sys::MPOL_PREFERRED | sys::MPOL_F_STATIC_NODES, NODE_0),
    (sys::MPOL_INTERLEAVE | sys::MPOL_F_RELATIVE_NODES, NODE_0),
    (sys::MPOL_BIND | sys::MPOL_F_STATIC_NODES, WITH_MORE),
    (sys::MPOL_LOCAL, 0),
    (0, 0),
];
/// Those that older kernels don't have.
const NEWER: [(u32, u64); 2] = [
    (sys::MPOL_PREFERRED_MANY, NODE_0),
    (sys::MPOL_WEIGHTED_INTERLEAVE, NODE_0),
];

fn governed((mode, nodes): (u32, u64)) -> Result<Region> {
    // Apart from each other by a page, so that each is a mapping of its own.
    let region = Region::anon(4 * sys::PAGE)?.part(0, 3 * sys::PAGE);
    sys::govern(region, mode, nodes)?;
    region.put(0, b"governed");
    Ok(region)
}

fn expect(what: &str, region: Option<Region>, wanted: (u32, u64)) -> Result<()> {
    let found = sys::policy(region)?;
    ensure!(
        found == wanted,
        "{what}: (mode, nodes) were {wanted:?}, are {found:?}"
    );
    Ok(())
}

fn policies(stage: &Stage) -> Result<()> {
    let mut regions = Vec::new();
    for wanted in MODES {
        regions.push((governed(wanted)?, wanted));
    }
    for wanted in NEWER {
        if let Ok(region) = governed(wanted) {
            regions.push((region, wanted));
        }
    }
    let shared = Region::shared(2 * sys::PAGE)?;
    sys::govern(shared, sys::MPOL_BIND, NODE_0)?;
    regions.push((shared, (sys::MPOL_BIND, NODE_0)));
    let inherited = regions.clone();
    let child = stage.child(|stage| {
        let freed = inherited[0].0;
        sys::govern(freed, 0, 0)?;
        stage.ready_and_wait()?;
        expect("what the child was freed of", Some(freed), (0, 0))?;
        look(&inherited[1..])?;
        expect("the child", None, (0, 0))
    })?;
    // A thread that is just starting still maps its stacks and arena.
    let started = Arc::new(Barrier::new(3));
    let (of_other, of_third) = (Arc::clone(&started), Arc::clone(&started));
    let other = thread::spawn(move || {
        let set = sys::set_policy(sys::MPOL_INTERLEAVE, NODE_0);
        of_other.wait();
        set?;
        crate::stop::wait();
        expect("the other thread", None, (sys::MPOL_INTERLEAVE, NODE_0))
    });
    sys::set_policy(sys::MPOL_BIND | sys::MPOL_F_STATIC_NODES, NODE_0)?;
    let third = thread::spawn(move || {
        let set = sys::set_policy(0, 0);
        of_third.wait();
        set?;
        crate::stop::wait();
        expect("the thread without a policy", None, (0, 0))
    });
    started.wait();
    stage.ready_and_wait()?;
    let own = (sys::MPOL_BIND | sys::MPOL_F_STATIC_NODES, NODE_0);
    expect("the main thread", None, own)?;
    look(&regions)?;
    for thread in [other, third] {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    child.finish()
}

fn look(regions: &[(Region, (u32, u64))]) -> Result<()> {
    for &(region, wanted) in regions {
        expect("memory", Some(region), wanted)?;
    }
    Ok(())
}
