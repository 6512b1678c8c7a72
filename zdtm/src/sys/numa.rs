//! NUMA policies by the raw system calls.

use std::io;

use super::{Region, check_long};

/// Prefer these nodes.
pub const MPOL_PREFERRED: u32 = 1;
/// Only these nodes.
pub const MPOL_BIND: u32 = 2;
/// Page by page from each of these nodes.
pub const MPOL_INTERLEAVE: u32 = 3;
/// From the node of the CPU.
pub const MPOL_LOCAL: u32 = 4;
/// Prefer any of these nodes.
pub const MPOL_PREFERRED_MANY: u32 = 5;
/// As interleave, by weight (Linux 6.9).
pub const MPOL_WEIGHTED_INTERLEAVE: u32 = 6;
/// Nodes are counted among the allowed ones.
pub const MPOL_F_RELATIVE_NODES: u32 = 1 << 14;
/// Nodes are kept as they were given.
pub const MPOL_F_STATIC_NODES: u32 = 1 << 15;
const MPOL_F_ADDR: u32 = 2;
/// Bits of the nodes, and the one that the kernel leaves out.
const MAX_NODE: u64 = 65;

/// The nodes as an argument: the kernel takes no mask of no bits, only none.
fn mask(nodes: &u64) -> (*const u64, u64) {
    match nodes {
        0 => (std::ptr::null(), 0),
        nodes => (nodes, MAX_NODE),
    }
}

/// Gives the calling thread a policy.
pub fn set_policy(mode: u32, nodes: u64) -> io::Result<()> {
    let nr = libc::SYS_set_mempolicy;
    let (mask, count) = mask(&nodes);
    // SAFETY: the nodes live through the call and have the told number of bits.
    check_long(unsafe { libc::syscall(nr, mode, mask, count) }).map(drop)
}

/// Gives memory a policy.
pub fn govern(region: Region, mode: u32, nodes: u64) -> io::Result<()> {
    let nr = libc::SYS_mbind;
    let (mask, count) = mask(&nodes);
    let (addr, len) = (region.addr, region.len);
    // SAFETY: as above; the policy of memory changes nothing in it.
    check_long(unsafe { libc::syscall(nr, addr, len, mode, mask, count, 0) }).map(drop)
}

/// Mode and nodes of the calling thread's policy, or of memory.
pub fn policy(region: Option<Region>) -> io::Result<(u32, u64)> {
    let (mut mode, mut nodes) = (0u32, 0u64);
    let nr = libc::SYS_get_mempolicy;
    let (addr, flags) = region.map_or((0, 0), |region| (region.addr, MPOL_F_ADDR));
    // SAFETY: mode and nodes live through the call; the nodes have the told number of bits.
    let result = unsafe { libc::syscall(nr, &raw mut mode, &raw mut nodes, MAX_NODE, addr, flags) };
    check_long(result).map(|_| (mode, nodes))
}
