//! The part of the FUSE wire protocol that one file needs.
//!
//! A request is a header of 40 bytes and its arguments, an answer a header of 16 bytes and its own.
//! All numbers are in the machine's byte order.
//!
//! | request header | bytes |   | answer header | bytes |
//! |---|---:|---|---|---:|
//! | length of all | 0..4 | | length of all | 0..4 |
//! | opcode | 4..8 | | 0 or minus errno, or a notification | 4..8 |
//! | unique | 8..16 | | unique of the request, 0 in a notification | 8..16 |
//! | node | 16..24 | | | |
//! | uid, gid, pid, padding | 24..40 | | | |
//!
//! Source: linux include/uapi/linux/fuse.h, protocol 7.40

/// Bytes before a request's arguments.
pub const IN_HEADER: usize = 40;
/// Bytes before the data of a write: the header and its arguments.
pub const WRITE_HEADER: usize = IN_HEADER + 40;
/// Bytes before an answer's arguments.
pub const OUT_HEADER: usize = 16;
/// Major version that this server speaks.
pub const MAJOR: u32 = 7;
/// Newest minor version that this server speaks.
pub const MINOR: u32 = 40;
/// Node of the one file; that of the root directory is 1.
pub const FILE: u64 = 2;
/// Name of the one file.
pub const FILE_NAME: &[u8] = b"disk";

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are the kernel's own")]
pub enum Opcode {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Flush = 25,
    Init = 26,
    Interrupt = 36,
    Destroy = 38,
    BatchForget = 42,
    Fallocate = 43,
}

impl Opcode {
    /// The known opcodes; the kernel is told that the others are not there.
    pub fn from_u32(number: u32) -> Option<Opcode> {
        use Opcode::{
            BatchForget, Destroy, Fallocate, Flush, Forget, Fsync, Getattr, Init, Interrupt,
            Lookup, Open, Read, Release, Setattr, Statfs, Write,
        };
        const ALL: [Opcode; 16] = [
            Lookup,
            Forget,
            Getattr,
            Setattr,
            Open,
            Read,
            Write,
            Statfs,
            Release,
            Fsync,
            Flush,
            Init,
            Interrupt,
            Destroy,
            BatchForget,
            Fallocate,
        ];
        ALL.into_iter().find(|opcode| *opcode as u32 == number)
    }

    /// Whether the kernel waits for an answer.
    pub fn is_answered(self) -> bool {
        !matches!(
            self,
            Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt
        )
    }
}

/// The head of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InHeader {
    /// Length of header and arguments.
    pub len_bytes: u32,
    /// Number of the operation.
    pub opcode: u32,
    /// Number of the request, to be given back.
    pub unique: u64,
    /// Node that it is about.
    pub node: u64,
}

impl InHeader {
    /// Reads it, or None where there is not enough of it.
    pub fn parse(bytes: &[u8]) -> Option<InHeader> {
        Some(InHeader {
            len_bytes: u32_at(bytes, 0)?,
            opcode: u32_at(bytes, 4)?,
            unique: u64_at(bytes, 8)?,
            node: u64_at(bytes, 16)?,
        })
    }
}

/// What the kernel offers at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitIn {
    /// Major version.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
    /// Feature bits.
    pub flags: u64,
}

impl InitIn {
    /// Reads the arguments of an INIT request.
    pub fn parse(args: &[u8]) -> Option<InitIn> {
        let low = u64::from(u32_at(args, 12)?);
        let high = match low & flag::INIT_EXT {
            0 => 0,
            _ => u64::from(u32_at(args, 16).unwrap_or(0)),
        };
        Some(InitIn {
            major: u32_at(args, 0)?,
            minor: u32_at(args, 4)?,
            flags: low | high << 32,
        })
    }
}

/// Feature bits of INIT.
pub mod flag {
    /// Several reads at once.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// Writes of more than a page.
    pub const BIG_WRITES: u64 = 1 << 5;
    /// Direct I/O is submitted without waiting for its end.
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// The answer names the most pages of a request.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// Bits 32 to 63 are there.
    pub const INIT_EXT: u64 = 1 << 30;
    /// Requests that were read and not answered can be had again (linux 6.9).
    pub const HAS_RESEND: u64 = 1 << 39;
}

/// What this server answers to INIT.
#[derive(Debug, Clone, Copy)]
pub struct InitOut {
    /// Minor version that both speak.
    pub minor: u32,
    /// Feature bits that both know.
    pub flags: u64,
    /// Requests in flight at most.
    pub max_background: u16,
    /// Bytes of a write at most.
    pub max_write: u32,
    /// Pages of a request at most.
    pub max_pages: u16,
}

impl InitOut {
    /// The answer's arguments.
    pub fn encode(&self) -> [u8; 64] {
        let mut out = [0; 64];
        let low = u32::try_from(self.flags & u64::from(u32::MAX)).unwrap_or(0);
        let high = u32::try_from(self.flags >> 32).unwrap_or(0);
        put(&mut out, 0, &MAJOR.to_ne_bytes());
        put(&mut out, 4, &self.minor.to_ne_bytes());
        put(&mut out, 8, &self.max_write.to_ne_bytes());
        put(&mut out, 12, &low.to_ne_bytes());
        put(&mut out, 16, &self.max_background.to_ne_bytes());
        put(&mut out, 18, &self.max_background.to_ne_bytes());
        put(&mut out, 20, &self.max_write.to_ne_bytes());
        put(&mut out, 24, &1u32.to_ne_bytes());
        put(&mut out, 28, &self.max_pages.to_ne_bytes());
        put(&mut out, 32, &high.to_ne_bytes());
        out
    }
}

/// Place and length of a read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len_bytes: u32,
}

impl Span {
    /// Reads the arguments of READ or WRITE, which begin alike.
    pub fn parse(args: &[u8]) -> Option<Span> {
        Some(Span {
            offset: u64_at(args, 8)?,
            len_bytes: u32_at(args, 16)?,
        })
    }
}

/// Place, length and manner of an allocation or a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fallocate {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len_bytes: u64,
    /// The mode of fallocate(2).
    pub mode: u32,
}

impl Fallocate {
    /// Reads the arguments of FALLOCATE.
    pub fn parse(args: &[u8]) -> Option<Fallocate> {
        Some(Fallocate {
            offset: u64_at(args, 8)?,
            len_bytes: u64_at(args, 16)?,
            mode: u32_at(args, 24)?,
        })
    }
}

/// How an open file behaves.
pub mod open_flag {
    /// Past the page cache.
    pub const DIRECT_IO: u32 = 1 << 0;
    /// No request at close.
    pub const NOFLUSH: u32 = 1 << 5;
    /// Writes need not wait for each other.
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Notification: have the unanswered requests once more.
pub const NOTIFY_RESEND: i32 = 7;

/// How long the kernel may believe attributes and names.
const VALID_SECONDS: u64 = 3600;

/// Attributes of the root or the file: 88 bytes.
pub fn attributes(node: u64, size_bytes: u64) -> [u8; 88] {
    let is_file = node == FILE;
    let mode: u32 = if is_file { 0o100_600 } else { 0o40_700 };
    let size = if is_file { size_bytes } else { 0 };
    let mut out = [0; 88];
    put(&mut out, 0, &node.to_ne_bytes());
    put(&mut out, 8, &size.to_ne_bytes());
    put(&mut out, 16, &size.div_ceil(512).to_ne_bytes());
    put(&mut out, 60, &mode.to_ne_bytes());
    put(&mut out, 64, &1u32.to_ne_bytes());
    put(&mut out, 80, &4096u32.to_ne_bytes());
    out
}

/// The answer to GETATTR and SETATTR; attributes are asked for anew each time, as the size may grow.
pub fn attr_out(node: u64, size_bytes: u64) -> [u8; 104] {
    let mut out = [0; 104];
    put(&mut out, 16, &attributes(node, size_bytes));
    out
}

/// The answer to a LOOKUP that found the file.
pub fn entry_out(size_bytes: u64) -> [u8; 128] {
    let mut out = [0; 128];
    put(&mut out, 0, &FILE.to_ne_bytes());
    put(&mut out, 16, &VALID_SECONDS.to_ne_bytes());
    put(&mut out, 40, &attributes(FILE, size_bytes));
    out
}

/// The answer to OPEN.
pub fn open_out(flags: u32) -> [u8; 16] {
    let mut out = [0; 16];
    put(&mut out, 8, &flags.to_ne_bytes());
    out
}

/// The answer to WRITE.
pub fn write_out(len_bytes: u32) -> [u8; 8] {
    let mut out = [0; 8];
    put(&mut out, 0, &len_bytes.to_ne_bytes());
    out
}

/// The answer to STATFS. The block size becomes the loop device's unit of discards.
pub fn statfs_out(size_bytes: u64, block_bytes: u32) -> [u8; 80] {
    let mut out = [0; 80];
    let blocks = size_bytes / u64::from(block_bytes);
    put(&mut out, 0, &blocks.to_ne_bytes());
    put(&mut out, 40, &block_bytes.to_ne_bytes());
    put(&mut out, 44, &255u32.to_ne_bytes());
    put(&mut out, 48, &block_bytes.to_ne_bytes());
    out
}

/// The head of an answer with this many bytes after it; `error` is 0, an errno, or a notification.
pub fn out_header(unique: u64, error: i32, args_len: usize) -> [u8; OUT_HEADER] {
    let mut out = [0; OUT_HEADER];
    let len = u32::try_from(OUT_HEADER + args_len).unwrap_or(u32::MAX);
    put(&mut out, 0, &len.to_ne_bytes());
    put(&mut out, 4, &error.to_ne_bytes());
    put(&mut out, 8, &unique.to_ne_bytes());
    out
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// The number of eight bytes at a place, or None where the bytes end before.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_requests_are_refused_not_misread() {
        for len in 0..IN_HEADER {
            let bytes = vec![0xff; len];
            assert_eq!(InHeader::parse(&bytes).is_some(), len >= 24);
            assert_eq!(Span::parse(&bytes).is_some(), len >= 20);
            assert_eq!(Fallocate::parse(&bytes).is_some(), len >= 28);
            assert_eq!(InitIn::parse(&bytes).is_some(), len >= 16);
        }
    }

    #[test]
    fn feature_bits_come_from_both_words() {
        let mut args = [0u8; 64];
        put(&mut args, 0, &7u32.to_ne_bytes());
        put(&mut args, 12, &(1u32 << 30 | 1).to_ne_bytes());
        put(&mut args, 16, &(1u32 << 7).to_ne_bytes());
        let init = InitIn::parse(&args).unwrap();
        assert_eq!(
            init.flags,
            flag::ASYNC_READ | flag::INIT_EXT | flag::HAS_RESEND
        );
        put(&mut args, 12, &1u32.to_ne_bytes());
        assert_eq!(InitIn::parse(&args).unwrap().flags, flag::ASYNC_READ);
    }

    #[test]
    fn the_opcodes_are_the_kernels() {
        assert_eq!(Opcode::from_u32(16), Some(Opcode::Write));
        assert_eq!(Opcode::from_u32(43), Some(Opcode::Fallocate));
        assert_eq!(Opcode::from_u32(22), None);
        assert!(!Opcode::Forget.is_answered() && Opcode::Release.is_answered());
    }
}
