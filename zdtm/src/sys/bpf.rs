//! BPF maps and programs.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// A hash.
pub const BPF_HASH: u32 = 1;
/// An array.
pub const BPF_ARRAY: u32 = 2;
/// A map of prefixes.
pub const BPF_LPM_TRIE: u32 = 11;

/// Calls bpf with words of 32 bits and of 64 bits as attributes.
///
/// # Safety
/// Addresses among the attributes must be good for what the command does with them.
unsafe fn bpf(command: usize, attributes: &mut [u8]) -> io::Result<i32> {
    let arguments = [
        command,
        attributes.as_mut_ptr().addr(),
        attributes.len(),
        0,
        0,
        0,
    ];
    // SAFETY: the attributes live through the call; the caller vouches for what they lead to.
    let result = unsafe { super::call(libc::SYS_bpf, arguments) }?;
    i32::try_from(result).map_err(io::Error::other)
}

fn words(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

fn own(fd: i32) -> OwnedFd {
    // SAFETY: a bpf command has just returned it to us alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Makes a map.
pub fn bpf_map(
    kind: u32,
    [key, value, entries]: [u32; 3],
    flags: u32,
    name: &str,
) -> io::Result<OwnedFd> {
    let mut attributes = words(&[kind, key, value, entries, flags, 0, 0]);
    attributes.extend(name.as_bytes());
    attributes.resize(72, 0);
    // SAFETY: numbers and a name only.
    unsafe { bpf(0, &mut attributes) }.map(own)
}

fn element(map: &OwnedFd, key: &[u8], value: *const u8) -> Vec<u8> {
    let mut attributes = words(&[map.as_raw_fd().cast_unsigned(), 0]);
    for address in [key.as_ptr().addr(), value.addr(), 0] {
        attributes.extend(address.to_ne_bytes());
    }
    attributes
}

/// Puts an entry into a map, whose keys and values must be as long as these.
pub fn bpf_put(map: &OwnedFd, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attributes = element(map, key, value.as_ptr());
    // SAFETY: key and value live through the call and are as long as the map's.
    unsafe { bpf(2, &mut attributes) }.map(drop)
}

/// Reads an entry of a map whose values are `len` bytes long.
pub fn bpf_get(map: &OwnedFd, key: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0; len];
    let mut attributes = element(map, key, value.as_mut_ptr());
    // SAFETY: the key is as long as the map's, and the value has room for one of it.
    unsafe { bpf(1, &mut attributes) }?;
    Ok(value)
}

/// Freezes a map.
pub fn bpf_freeze(map: &OwnedFd) -> io::Result<()> {
    let mut attributes = words(&[map.as_raw_fd().cast_unsigned()]);
    // SAFETY: a number only.
    unsafe { bpf(22, &mut attributes) }.map(drop)
}

/// Number and name of a map.
pub fn bpf_map_info(map: impl AsFd) -> io::Result<(u32, String)> {
    let mut info = [0u8; 88];
    let mut attributes = words(&[map.as_fd().as_raw_fd().cast_unsigned(), 88]);
    attributes.extend(info.as_mut_ptr().addr().to_ne_bytes());
    // SAFETY: the structure has as many bytes as said.
    unsafe { bpf(15, &mut attributes) }?;
    let id = u32::from_ne_bytes([info[4], info[5], info[6], info[7]]);
    let name = info[24..40].split(|byte| *byte == 0).next();
    Ok((
        id,
        String::from_utf8_lossy(name.unwrap_or_default()).into_owned(),
    ))
}

/// Opens a map by its number; flag 8 only to read, 16 only to write.
pub fn bpf_map_by_id(id: u32, flags: u32) -> io::Result<OwnedFd> {
    let mut attributes = words(&[id, 0, flags]);
    // SAFETY: numbers only.
    unsafe { bpf(14, &mut attributes) }.map(own)
}

/// Pins a map at a path in a filesystem of type bpf.
pub fn bpf_pin(map: &OwnedFd, path: &CStr) -> io::Result<()> {
    let mut attributes = path.as_ptr().addr().to_ne_bytes().to_vec();
    attributes.extend(words(&[map.as_raw_fd().cast_unsigned(), 0]));
    // SAFETY: the path ends in NUL and lives through the call.
    unsafe { bpf(6, &mut attributes) }.map(drop)
}

/// Opens what is pinned at a path.
pub fn bpf_pinned(path: &CStr) -> io::Result<OwnedFd> {
    let mut attributes = path.as_ptr().addr().to_ne_bytes().to_vec();
    attributes.extend(words(&[0, 0]));
    // SAFETY: the path ends in NUL and lives through the call.
    unsafe { bpf(7, &mut attributes) }.map(own)
}

/// Loads a socket filter that takes nothing.
pub fn bpf_program() -> io::Result<OwnedFd> {
    // r0 = 0; exit
    let code: [u64; 2] = [0xb7, 0x95];
    let licence = c"GPL";
    let mut attributes = words(&[1, 2]);
    attributes.extend(code.as_ptr().addr().to_ne_bytes());
    attributes.extend(licence.as_ptr().addr().to_ne_bytes());
    attributes.resize(72, 0);
    // SAFETY: code and licence live through the call.
    unsafe { bpf(5, &mut attributes) }.map(own)
}
