//! Commands and structures of ublk. All numbers are in the machine's byte order.
//!
//! ```text
//! control command (32)     device (64)                parameters (60)
//! 0  u32 device            0  u16 queues              0  u32 length of all
//! 4  u16 queue, 0xffff     2  u16 depth of a queue    4  u32 kinds: 1 basic, 2 discard
//! 6  u16 length            4  u16 state               8  u32 attributes
//! 8  u64 address           8  u32 most data           12 u8 logical, physical, best, least block (2^n)
//! 16 u64 value             12 u32 number              16 u32 most sectors of a request
//!                          16 i32 server              24 u64 sectors
//! request (24)             24 u64 features            40 u32 alignment, granularity, most sectors of
//! 0  u32 operation, flags                                    a discard, of zeroes
//! 4  u32 sectors           answer (16)                56 u16 segments of a discard
//! 8  u64 first sector      0  u16 queue, u16 tag
//! 16 u64 address           4  i32 result, u64 buffer
//! ```
//!
//! Source: linux include/uapi/linux/ublk_cmd.h (linux 6.5)

use crate::device::View;

/// Where the control commands go.
pub(super) const CONTROL: &str = "/dev/ublk-control";

/// Requests in flight.
pub(super) const DEPTH: u16 = 32;
/// Most bytes of one request.
pub(super) const MAX_DATA: u32 = 256 << 10;
/// A request for a request that comes back because the device gives no more.
pub(super) const ABORTED: i32 = -libc::ENODEV;
/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;

/// A command's number as an ioctl is numbered, with that size of argument.
const fn number(reads_only: bool, command: u32, size: u32) -> u32 {
    let direction = if reads_only { 2 } else { 3 };
    direction << 30 | size << 16 | (b'u' as u32) << 8 | command
}

/// Commands to the control device.
pub(super) mod control {
    use super::number;

    pub const ADD: u32 = number(false, 0x04, 32);
    pub const DELETE: u32 = number(false, 0x05, 32);
    pub const START: u32 = number(false, 0x06, 32);
    pub const STOP: u32 = number(false, 0x07, 32);
    pub const SET_PARAMETERS: u32 = number(false, 0x08, 32);
    pub const START_RECOVERY: u32 = number(false, 0x10, 32);
    pub const END_RECOVERY: u32 = number(false, 0x11, 32);
    pub const GET_FEATURES: u32 = number(true, 0x13, 32);
    pub const UPDATE_SIZE: u32 = number(false, 0x15, 32);
}

/// Commands to a device's channel.
pub(super) mod io {
    use super::number;

    pub const FETCH: u32 = number(false, 0x20, 16);
    pub const COMMIT_AND_FETCH: u32 = number(false, 0x21, 16);
}

/// What the driver can do and a device wants.
pub(super) mod feature {
    /// The device outlives its server.
    pub const USER_RECOVERY: u64 = 1 << 3;
    /// Requests that the last server did not answer are handed out again.
    pub const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    /// Commands are numbered as ioctls.
    pub const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    /// A device that runs can get another size (linux 6.16).
    pub const UPDATE_SIZE: u64 = 1 << 10;
}

/// Operations.
pub(super) mod operation {
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const FLUSH: u8 = 2;
    pub const DISCARD: u8 = 3;
    pub const WRITE_ZEROES: u8 = 5;
}

const FLAG_FUA: u32 = 1 << 13;

/// A new device of one queue.
pub(super) fn device(features: u64, server: i32) -> [u8; 64] {
    let mut out = [0; 64];
    put(&mut out, 0, &1u16.to_ne_bytes());
    put(&mut out, 2, &DEPTH.to_ne_bytes());
    put(&mut out, 8, &MAX_DATA.to_ne_bytes());
    // Any free number.
    put(&mut out, 12, &u32::MAX.to_ne_bytes());
    put(&mut out, 16, &server.to_ne_bytes());
    put(&mut out, 24, &features.to_ne_bytes());
    out
}

/// Number and state of a device as the driver describes it.
pub(super) fn described(device: &[u8; 64]) -> (u32, u16) {
    let [.., s0, s1] = *device.first_chunk::<6>().expect("six of 64 bytes");
    let number = device[12..16].try_into().expect("four bytes");
    (u32::from_ne_bytes(number), u16::from_ne_bytes([s0, s1]))
}

/// How a device behaves.
pub(super) fn parameters(
    view: View,
    disk_bytes: u64,
    unit_bytes: u32,
    read_only: bool,
) -> [u8; 60] {
    const READ_ONLY: u32 = 1;
    const VOLATILE_CACHE: u32 = 4;
    const FUA: u32 = 8;
    const MOST: u32 = 1 << 21;
    let attributes = VOLATILE_CACHE | FUA | if read_only { READ_ONLY } else { 0 };
    let sectors = view.len_bytes(disk_bytes) / SECTOR;
    let most = u32::try_from(u64::from(MAX_DATA) / SECTOR).unwrap_or(u32::MAX);
    let mut out = [0; 60];
    put(&mut out, 0, &60u32.to_ne_bytes());
    put(&mut out, 4, &3u32.to_ne_bytes());
    put(&mut out, 8, &attributes.to_ne_bytes());
    put(&mut out, 12, &[9, 12, 12, 12]);
    put(&mut out, 16, &most.to_ne_bytes());
    put(&mut out, 24, &sectors.to_ne_bytes());
    put(&mut out, 44, &unit_bytes.to_ne_bytes());
    put(&mut out, 48, &MOST.to_ne_bytes());
    put(&mut out, 52, &MOST.to_ne_bytes());
    put(&mut out, 56, &1u16.to_ne_bytes());
    out
}

/// A control command's argument.
pub(super) fn control_command(device: u32, data: u64, len: u16, address: u64) -> [u8; 80] {
    let mut out = [0; 80];
    put(&mut out, 0, &device.to_ne_bytes());
    put(&mut out, 4, &u16::MAX.to_ne_bytes());
    put(&mut out, 6, &len.to_ne_bytes());
    put(&mut out, 8, &address.to_ne_bytes());
    put(&mut out, 16, &data.to_ne_bytes());
    out
}

/// What goes with a request for a request: the last one's result and the next one's buffer.
pub(super) fn answer(tag: u16, result: i32, buffer: u64) -> [u8; 16] {
    let mut out = [0; 16];
    put(&mut out, 2, &tag.to_ne_bytes());
    put(&mut out, 4, &result.to_ne_bytes());
    put(&mut out, 8, &buffer.to_ne_bytes());
    out
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    /// What is wanted.
    pub operation: u8,
    /// It is to be safe before the answer.
    pub fua: bool,
    /// First byte of the device.
    pub offset: u64,
    /// Number of bytes.
    pub len_bytes: u64,
}

impl Request {
    /// Bytes of a request in the queue.
    pub const SIZE: usize = 24;

    /// Reads one.
    pub fn parse(bytes: &[u8; Request::SIZE]) -> Request {
        let [
            op,
            f0,
            f1,
            f2,
            n0,
            n1,
            n2,
            n3,
            sector @ ..,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
        ] = *bytes;
        let flags = u32::from_ne_bytes([op, f0, f1, f2]);
        Request {
            operation: op,
            fua: flags & FLAG_FUA != 0,
            offset: u64::from_ne_bytes(sector).saturating_mul(SECTOR),
            len_bytes: u64::from(u32::from_ne_bytes([n0, n1, n2, n3])) * SECTOR,
        }
    }
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_kernels_numbers() {
        assert_eq!(control::ADD, 0xc020_7504);
        assert_eq!(control::GET_FEATURES, 0x8020_7513);
        assert_eq!(io::COMMIT_AND_FETCH, 0xc010_7521);
    }

    #[test]
    fn requests_are_read_as_the_kernel_lays_them_out() {
        let mut bytes = [0; Request::SIZE];
        put(&mut bytes, 0, &(1u32 | 1 << 13).to_ne_bytes());
        put(&mut bytes, 4, &8u32.to_ne_bytes());
        put(&mut bytes, 8, &(1u64 << 33).to_ne_bytes());
        let request = Request {
            operation: operation::WRITE,
            fua: true,
            offset: 1 << 42,
            len_bytes: 4096,
        };
        assert_eq!(Request::parse(&bytes), request);
    }

    #[test]
    fn a_device_is_described_as_the_kernel_reads_it() {
        let mut bytes = device(0x58, 7);
        assert_eq!(bytes[..4], [1, 0, 32, 0]);
        assert_eq!(described(&bytes), (u32::MAX, 0));
        put(&mut bytes, 4, &2u16.to_ne_bytes());
        put(&mut bytes, 12, &5u32.to_ne_bytes());
        assert_eq!(described(&bytes), (5, 2));
        let parameters = parameters(View::WHOLE, 1 << 30, 1 << 20, true);
        assert_eq!(parameters[8], 1 | 4 | 8);
        assert_eq!(parameters[24..32], (1u64 << 21).to_ne_bytes());
        assert_eq!(parameters[44..48], (1u32 << 20).to_ne_bytes());
    }
}
