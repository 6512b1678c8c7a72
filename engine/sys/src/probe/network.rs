//! Probes about the network, made in a network namespace of a child.

use std::ptr::{from_ref, null};

use super::process::in_own_network;
use crate::{Errno, Result};

const NETLINK_NETFILTER: i32 = 12;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETGEN: u16 = 16;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;

/// Puts a new TCP socket into repair mode.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN, ENOPROTOOPT without CONFIG_CHECKPOINT_RESTORE.
pub fn tcp_repair() -> Result<()> {
    // SAFETY: plain system calls.
    unsafe {
        in_own_network(|| {
            let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
            Errno::check(i64::from(fd))?;
            let on = 1i32;
            let result = libc::setsockopt(
                fd,
                libc::IPPROTO_TCP,
                libc::TCP_REPAIR,
                from_ref(&on).cast(),
                4,
            );
            Errno::check(i64::from(result)).map(drop)
        })
    }
}

/// A netlink request without attributes, and room for its answer.
#[repr(C)]
struct Request {
    len: u32,
    kind: u16,
    flags: u16,
    seq: u32,
    port: u32,
    family: u8,
    version: u8,
    res_id: u16,
}

const _: () = assert!(size_of::<Request>() == 20);

/// Asks nf_tables for the generation of its (empty) rule set.
///
/// # Errors
/// EPROTONOSUPPORT, EINVAL without CONFIG_NF_TABLES, EPERM without CAP_NET_ADMIN.
pub fn nft_generation() -> Result<()> {
    // SAFETY: plain system calls.
    unsafe {
        in_own_network(|| {
            let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_NETFILTER);
            Errno::check(i64::from(fd))?;
            let request = Request {
                len: 20,
                kind: NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN,
                flags: NLM_F_REQUEST,
                seq: 1,
                port: 0,
                family: 0,
                version: 0,
                res_id: 0,
            };
            let sent = libc::sendto(fd, from_ref(&request).cast(), 20, 0, null(), 0);
            Errno::check(i64::try_from(sent).unwrap_or(-1))?;
            // An answer of one kind or the other comes at once.
            let mut answer = [0u32; 64];
            let got = libc::recv(fd, answer.as_mut_ptr().cast(), 256, 0);
            Errno::check(i64::try_from(got).unwrap_or(-1))?;
            let kind = answer[1] & 0xffff;
            if kind == u32::from(NLMSG_ERROR) {
                return Err(Errno::from_raw(-answer[4].cast_signed()));
            }
            Ok(())
        })
    }
}
