//! Numbers of the NBD protocol. All of them travel in big endian.
//!
//! Source: the NBD protocol document of the NetworkBlockDevice project, 2024

pub(super) const MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, no padding after EXPORT_NAME.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

/// Options of the handshake.
pub(super) mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Answers to options.
pub(super) mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const UNSUPPORTED: u32 = 1 << 31 | 1;
    pub const INVALID: u32 = 1 << 31 | 3;
}

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// What an export can do.
pub(super) mod export_flag {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const FLUSH: u16 = 1 << 2;
    pub const FUA: u16 = 1 << 3;
    pub const TRIM: u16 = 1 << 5;
    pub const WRITE_ZEROES: u16 = 1 << 6;
    pub const DONT_FRAGMENT: u16 = 1 << 7;
    pub const MULTI_CONN: u16 = 1 << 8;
}

/// Commands of the transmission.
pub(super) mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flag: safe before the answer.
pub(super) const FLAG_FUA: u16 = 1;
/// Command flag of BLOCK_STATUS: one extent is enough.
pub(super) const FLAG_REQ_ONE: u16 = 1 << 3;

/// Chunks of a structured reply.
pub(super) mod chunk {
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15 | 1;
}

/// A request to end the connection.
pub(super) fn disconnect_request() -> [u8; 28] {
    let mut request = [0; 28];
    request[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    request[6..8].copy_from_slice(&command::DISCONNECT.to_be_bytes());
    request
}

/// Extent flags of the context `base:allocation`.
pub(super) const STATE_HOLE: u32 = 1;
pub(super) const STATE_ZERO: u32 = 2;

/// The context that tells holes from data.
pub(super) const ALLOCATION: &str = "base:allocation";
/// The number that this server gives it.
pub(super) const ALLOCATION_ID: u32 = 1;

/// The protocol's error numbers are Linux's; others become EIO.
pub(super) fn error_number(errno: i32) -> u32 {
    const KNOWN: [i32; 7] = [
        libc::EPERM,
        libc::EIO,
        libc::ENOMEM,
        libc::EINVAL,
        libc::ENOSPC,
        libc::EOVERFLOW,
        libc::ESHUTDOWN,
    ];
    let errno = match errno {
        libc::EROFS => libc::EPERM,
        libc::EDQUOT => libc::ENOSPC,
        errno if KNOWN.contains(&errno) => errno,
        _ => libc::EIO,
    };
    u32::try_from(errno).unwrap_or(5)
}
