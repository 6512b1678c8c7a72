//! The inventory, the process tree, and the images that each process needs.

use std::collections::{BTreeMap, BTreeSet};

use firn_proto::{PstreeEntry, TaskKobjIdsEntry};

use super::{Fault, Findings};
use crate::ImageKind;
use crate::tools::set::SetImages;

/// Task states that have nothing but an exit status.
const DEAD: [u32; 2] = [2, 6];

/// Says whether a process has ended and only waits for its parent.
pub(crate) fn is_zombie(set: &SetImages, pid: u32) -> bool {
    let core = set.cores.get(&pid.into());
    let task = core.and_then(|core| core.tc.as_ref());
    task.is_some_and(|task| DEAD.contains(&task.task_state))
}

pub(super) fn check_inventory(set: &SetImages, found: &mut Findings) {
    let mut bad = |fault| found.file(ImageKind::Inventory, 0, fault);
    let Some(inventory) = &set.inventory else {
        if !set.has(ImageKind::Inventory, 0) {
            bad(Fault::NoInventory);
        }
        return;
    };
    if !matches!(inventory.img_version, 1 | 2) {
        bad(Fault::Version(inventory.img_version));
    }
    let (role, fdinfo_per_id, ns_per_id) = ("inventory", "fdinfo_per_id", "ns_per_id");
    let flags = [
        (fdinfo_per_id, inventory.fdinfo_per_id == Some(true)),
        (ns_per_id, inventory.ns_per_id == Some(true)),
        ("root_ids", inventory.root_ids.is_some()),
    ];
    for (part, _) in flags.into_iter().filter(|(_, there)| !there) {
        bad(Fault::Part { role, part });
    }
    if inventory.root_cg_set == Some(0) {
        let (field, value) = ("root_cg_set", 0);
        bad(Fault::Value { field, value });
    }
}

pub(super) fn check_tree(set: &SetImages, found: &mut Findings) {
    let kind = ImageKind::Pstree;
    if set.pstree.is_empty() {
        if set.is_damaged(kind, 0) {
            return;
        }
        let fault = match set.has(kind, 0) {
            true => Fault::NoTask,
            false => Fault::Missing("every restore".to_owned()),
        };
        return found.file(kind, 0, fault);
    }
    let roots = set
        .pstree
        .iter()
        .filter(|task| task.message.ppid == 0)
        .count();
    if roots != 1 || set.pstree[0].message.ppid != 0 {
        found.file(kind, 0, Fault::Roots(roots));
    }
    let mut pids = BTreeSet::new();
    let mut tids = BTreeSet::new();
    for placed in &set.pstree {
        let task = &placed.message;
        let mut bad = |fault| found.entry(kind, 0, placed, fault);
        if task.ppid != 0 && !pids.contains(&task.ppid) {
            let (pid, ppid) = (task.pid, task.ppid);
            bad(Fault::Parent { pid, ppid });
        }
        let zombie = is_zombie(set, task.pid);
        if !zombie && task.threads.first() != Some(&task.pid) {
            bad(Fault::Leader(task.pid));
        }
        // The one thread of a zombie may be any number; CRIU leaves it unset.
        let others = task.threads.iter().skip(1).copied();
        for tid in others.chain([task.pid]) {
            if !tids.insert(tid) {
                let (what, id) = ("task", tid.into());
                bad(Fault::Twice { what, id });
            }
        }
        pids.insert(task.pid);
        if !zombie {
            check_needed(set, task, found);
        }
    }
    check_leaders(set, &pids, found);
    check_namespaces(set, found);
}

/// Checks that groups and sessions are led by a process of the tree.
fn check_leaders(set: &SetImages, pids: &BTreeSet<u32>, found: &mut Findings) {
    let mut told = BTreeMap::new();
    for placed in &set.pstree {
        let task = &placed.message;
        for (what, id) in [("session", task.sid), ("process group", task.pgid)] {
            let led = id == 0 || pids.contains(&id);
            if !led && told.insert((what, id), ()).is_none() {
                found.entry(ImageKind::Pstree, 0, placed, Fault::Led { what, id });
                // Legal where the tree was part of a shell's session.
                found.last_is_remark();
            }
        }
    }
}

/// Checks that a living process has its images.
fn check_needed(set: &SetImages, task: &PstreeEntry, found: &mut Findings) {
    let pid = u64::from(task.pid);
    let needed_by = || format!("process {pid}");
    for kind in [
        ImageKind::Core,
        ImageKind::Ids,
        ImageKind::Mm,
        ImageKind::Fs,
        ImageKind::Pagemap,
    ] {
        if !set.has(kind, pid) {
            found.file(kind, pid, Fault::Missing(needed_by()));
        }
    }
    for tid in task.threads.iter().skip(1).map(|tid| u64::from(*tid)) {
        if !set.has(ImageKind::Core, tid) {
            let needed_by = format!("thread {tid} of process {pid}");
            found.file(ImageKind::Core, tid, Fault::Missing(needed_by));
        }
    }
    if let Some(ids) = set.ids.get(&pid)
        && !set.has(ImageKind::Fdinfo, ids.files_id.into())
    {
        found.file(
            ImageKind::Fdinfo,
            ids.files_id.into(),
            Fault::Missing(needed_by()),
        );
    }
}

/// Checks that namespaces which a restore makes anew have their images.
fn check_namespaces(set: &SetImages, found: &mut Findings) {
    let Some(host) = set.inventory.as_ref().and_then(|inv| inv.root_ids.as_ref()) else {
        return;
    };
    let mut told = BTreeSet::new();
    for (pid, ids) in &set.ids {
        for (kind, id, hosts) in namespaces(ids, host) {
            let id = u64::from(id);
            if id != 0 && id != u64::from(hosts) && !set.has(kind, id) && told.insert((kind, id)) {
                found.file(
                    kind,
                    id,
                    Fault::Missing(format!("namespaces of process {pid}")),
                );
            }
        }
    }
}

fn namespaces(ids: &TaskKobjIdsEntry, host: &TaskKobjIdsEntry) -> [(ImageKind, u32, u32); 6] {
    let pair =
        |kind, own: Option<u32>, host: Option<u32>| (kind, own.unwrap_or(0), host.unwrap_or(0));
    [
        pair(ImageKind::Utsns, ids.uts_ns_id, host.uts_ns_id),
        pair(ImageKind::IpcVar, ids.ipc_ns_id, host.ipc_ns_id),
        pair(ImageKind::Netns, ids.net_ns_id, host.net_ns_id),
        pair(ImageKind::Mnts, ids.mnt_ns_id, host.mnt_ns_id),
        pair(ImageKind::Userns, ids.user_ns_id, host.user_ns_id),
        pair(ImageKind::Timens, ids.time_ns_id, host.time_ns_id),
    ]
}
