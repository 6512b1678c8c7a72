//! BPF maps: hashes and arrays with all that they hold.
//!
//! Source: man 2 bpf; linux include/uapi/linux/bpf.h, `union bpf_attr`. Batches: Linux 5.6.

use std::collections::HashSet;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::pidfd::own;
use crate::{Errno, Result};

/// A map whose keys are hashed.
pub const HASH: u32 = 1;
/// A map whose keys are numbers below its size.
pub const ARRAY: u32 = 2;
/// A descriptor that can't write.
pub const RDONLY: u32 = 1 << 3;
/// A descriptor that can't read.
pub const WRONLY: u32 = 1 << 4;

const MAP_CREATE: i64 = 0;
const OBJ_PIN: i64 = 6;
const OBJ_GET: i64 = 7;
const PROG_GET_NEXT_ID: i64 = 11;
const PROG_GET_FD_BY_ID: i64 = 13;
const MAP_GET_FD_BY_ID: i64 = 14;
const OBJ_GET_INFO_BY_FD: i64 = 15;
const MAP_FREEZE: i64 = 22;
const MAP_LOOKUP_BATCH: i64 = 24;
const MAP_UPDATE_BATCH: i64 = 26;
const NAME_LEN: usize = 16;
/// More than any map of this machine can hold; guards against images that say otherwise.
const MAX_BYTES: usize = 1 << 36;

/// What a map is made with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MapSpec {
    /// [`HASH`], [`ARRAY`] or another number of `enum bpf_map_type`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries that it may hold.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// Up to 15 letters, digits, `_` and `.`.
    pub name: Vec<u8>,
    /// Network interface that it is offloaded to; 0 for none.
    pub ifindex: u32,
    /// More, by type.
    pub extra: u64,
}

/// What a map is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MapInfo {
    /// Its number on this machine.
    pub id: u32,
    /// What it was made with.
    pub spec: MapSpec,
    /// Number of the description of its types; 0 for none.
    pub btf_id: u32,
}

/// What a map holds: keys and values, one behind the other, in the same order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    /// Number of entries.
    pub count: u32,
    /// Keys.
    pub keys: Vec<u8>,
    /// Values.
    pub values: Vec<u8>,
}

#[repr(C)]
#[derive(Default)]
struct CreateAttr {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; NAME_LEN],
    ifindex: u32,
    btf: [u32; 4],
    extra: u64,
}
const _: () = assert!(size_of::<CreateAttr>() == 72);

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct RawInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    name: [u8; NAME_LEN],
    ifindex: u32,
    btf_vmlinux_value_type_id: u32,
    netns: [u64; 2],
    btf_id: u32,
    btf_types: [u32; 3],
    extra: u64,
}
const _: () = assert!(size_of::<RawInfo>() == 88);

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}
const _: () = assert!(size_of::<BatchAttr>() == 56);

/// # Safety
/// `attr` must be what the command takes, and its addresses good for what the command does with them.
pub(crate) unsafe fn bpf<T>(command: i64, attr: &mut T) -> Result<u64> {
    // SAFETY: the caller vouches for the attributes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    Errno::check(result)
}

fn number(fd: impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

fn address<T>(slice: &[T]) -> u64 {
    u64::try_from(slice.as_ptr().addr()).expect("addresses fit 64 bits")
}

/// Makes a map.
///
/// # Errors
/// EPERM without CAP_BPF; EINVAL: the kernel knows no such type or flag; E2BIG, ENOMEM.
pub fn create_map(spec: &MapSpec) -> Result<OwnedFd> {
    let mut attr = CreateAttr {
        kind: spec.kind,
        key_size: spec.key_size,
        value_size: spec.value_size,
        max_entries: spec.max_entries,
        flags: spec.flags,
        ifindex: spec.ifindex,
        extra: spec.extra,
        ..CreateAttr::default()
    };
    // The last byte stays zero.
    let name = spec.name.get(..NAME_LEN - 1).unwrap_or(&spec.name);
    attr.name[..name.len()].copy_from_slice(name);
    // SAFETY: numbers only.
    let fd = unsafe { bpf(MAP_CREATE, &mut attr) }?;
    // SAFETY: the call has just made it for us.
    Ok(unsafe { own(i32::try_from(fd).map_err(|_| Errno::EINVAL)?) })
}

/// Opens a map by its number; `flags` are [`RDONLY`], [`WRONLY`] or none.
///
/// # Errors
/// ENOENT: there is none. EPERM without CAP_SYS_ADMIN.
pub fn map_by_id(id: u32, flags: u32) -> Result<OwnedFd> {
    let mut attr = [id, 0, flags];
    // SAFETY: numbers only.
    let fd = unsafe { bpf(MAP_GET_FD_BY_ID, &mut attr) }?;
    // SAFETY: the call has just made it for us.
    Ok(unsafe { own(i32::try_from(fd).map_err(|_| Errno::EINVAL)?) })
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at a path in a filesystem of type bpf, a map or something else; `flags` are as for
/// [`map_by_id`].
///
/// # Errors
/// ENOENT; EACCES; EINVAL: it can't be opened with these flags, or the path is of another filesystem.
pub fn pinned(path: &CStr, flags: u32) -> Result<OwnedFd> {
    let mut attr = ObjectAttr {
        path: address(path.to_bytes_with_nul()),
        fd: 0,
        flags,
    };
    // SAFETY: the path ends in NUL and lives through the call.
    let fd = unsafe { bpf(OBJ_GET, &mut attr) }?;
    // SAFETY: the call has just made it for us.
    Ok(unsafe { own(i32::try_from(fd).map_err(|_| Errno::EINVAL)?) })
}

/// Pins a map at a path in a filesystem of type bpf.
///
/// # Errors
/// EEXIST, ENOENT; EPERM: the path is of another filesystem.
pub fn pin(map: impl AsFd, path: &CStr) -> Result<()> {
    let mut attr = ObjectAttr {
        path: address(path.to_bytes_with_nul()),
        fd: number(map),
        flags: 0,
    };
    // SAFETY: the path ends in NUL and lives through the call.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

/// Numbers of the maps that loaded programs use.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN.
pub fn maps_of_programs() -> Result<HashSet<u32>> {
    let mut maps = HashSet::new();
    let mut at = 0;
    loop {
        // The last program before, then the place of the next one.
        let mut attr = [at, 0, 0];
        // SAFETY: numbers only.
        match unsafe { bpf(PROG_GET_NEXT_ID, &mut attr) } {
            Err(Errno::ENOENT) => return Ok(maps),
            result => result?,
        };
        at = attr[1];
        let mut attr = [at, 0, 0];
        // SAFETY: numbers only.
        match unsafe { bpf(PROG_GET_FD_BY_ID, &mut attr) } {
            // It is gone meanwhile.
            Err(Errno::ENOENT) => {}
            fd => {
                let fd = i32::try_from(fd?).map_err(|_| Errno::EINVAL)?;
                // SAFETY: the call has just made it for us.
                maps.extend(maps_of_program(&unsafe { own(fd) })?);
            }
        }
    }
}

/// The beginning of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct RawProgram {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    lens: [u32; 2],
    code: [u64; 2],
    load_time: u64,
    uid: u32,
    nr_maps: u32,
    maps: u64,
}
const _: () = assert!(size_of::<RawProgram>() == 64);

/// Numbers of the maps of a program: the first 64, which is as many as the verifier allows.
fn maps_of_program(program: &OwnedFd) -> Result<Vec<u32>> {
    const MAX_MAPS: usize = 64;
    let mut maps = [0u32; MAX_MAPS];
    let mut raw = RawProgram {
        nr_maps: u32::try_from(MAX_MAPS).expect("64"),
        maps: address(std::slice::from_mut(&mut maps)),
        ..RawProgram::default()
    };
    let mut attr = InfoAttr {
        fd: number(program),
        len: u32::try_from(size_of::<RawProgram>()).expect("64"),
        info: address(std::slice::from_mut(&mut raw)),
    };
    // SAFETY: both structures are as long as said and live through the call.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let nr = usize::try_from(raw.nr_maps).unwrap_or(0).min(MAX_MAPS);
    Ok(maps[..nr].to_vec())
}

/// Describes a map.
///
/// # Errors
/// EBADF, EINVAL: it is no map.
pub fn map_info(map: impl AsFd) -> Result<MapInfo> {
    let mut raw = RawInfo::default();
    let mut attr = InfoAttr {
        fd: number(map),
        len: u32::try_from(size_of::<RawInfo>()).expect("88"),
        info: address(std::slice::from_mut(&mut raw)),
    };
    // SAFETY: the structure is as long as said and lives through the call.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let name = raw.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(MapInfo {
        id: raw.id,
        spec: MapSpec {
            kind: raw.kind,
            key_size: raw.key_size,
            value_size: raw.value_size,
            max_entries: raw.max_entries,
            flags: raw.flags,
            name: name.to_vec(),
            ifindex: raw.ifindex,
            extra: raw.extra,
        },
        btf_id: raw.btf_id,
    })
}

/// Bytes of so many keys and of so many values of a hash or an array.
fn sizes(spec: &MapSpec, count: u32) -> Result<(usize, usize)> {
    if ![HASH, ARRAY].contains(&spec.kind) {
        return Err(Errno::EOPNOTSUPP);
    }
    let bytes = |size: u32| {
        let bytes = u64::from(size) * u64::from(count);
        let bytes = usize::try_from(bytes).ok();
        bytes
            .filter(|bytes| *bytes <= MAX_BYTES)
            .ok_or(Errno::ENOMEM)
    };
    Ok((bytes(spec.key_size)?, bytes(spec.value_size)?))
}

/// Reads all that a hash or an array holds.
///
/// # Errors
/// EPERM: the descriptor can't read. EOPNOTSUPP: it is another kind of map.
pub fn read_map(map: impl AsFd) -> Result<Contents> {
    let spec = map_info(&map)?.spec;
    let (key_bytes, value_bytes) = sizes(&spec, spec.max_entries)?;
    let mut keys = vec![0; key_bytes];
    let mut values = vec![0; value_bytes];
    let key_size = usize::try_from(spec.key_size).map_err(|_| Errno::EINVAL)?;
    let next = vec![0u8; key_size.max(size_of::<u64>())];
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: address(&next),
        keys: address(&keys),
        values: address(&values),
        count: spec.max_entries,
        map_fd: number(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the buffers have room for all entries that the map can have.
    match unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) } {
        // The end was reached.
        Ok(_) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(errno),
    }
    let (key_bytes, value_bytes) = sizes(&spec, attr.count.min(spec.max_entries))?;
    keys.truncate(key_bytes);
    values.truncate(value_bytes);
    Ok(Contents {
        count: attr.count,
        keys,
        values,
    })
}

/// Puts entries into a hash or an array.
///
/// # Errors
/// EINVAL: keys and values are not as many as said. E2BIG: they are more than it can hold. EPERM: it is
/// frozen or the descriptor can't write.
pub fn fill_map(map: impl AsFd, contents: &Contents) -> Result<()> {
    let spec = map_info(&map)?.spec;
    if sizes(&spec, contents.count)? != (contents.keys.len(), contents.values.len()) {
        return Err(Errno::EINVAL);
    }
    if contents.count == 0 {
        return Ok(());
    }
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: address(&contents.keys),
        values: address(&contents.values),
        count: contents.count,
        map_fd: number(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the buffers hold as many keys and values as said, which was checked against the map.
    unsafe { bpf(MAP_UPDATE_BATCH, &mut attr) }.map(drop)
}

/// Forbids writing to a map by system calls, for good.
///
/// # Errors
/// EBUSY: it is frozen already, or mapped for writing.
pub fn freeze_map(map: impl AsFd) -> Result<()> {
    let mut attr = [number(map)];
    // SAFETY: a number only.
    unsafe { bpf(MAP_FREEZE, &mut attr) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_comes_out() {
        let spec = MapSpec {
            kind: HASH,
            key_size: 4,
            value_size: 2,
            max_entries: 8,
            name: b"firn_test".to_vec(),
            ..MapSpec::default()
        };
        let map = match create_map(&spec) {
            Err(errno @ (Errno::EPERM | Errno::ENOSYS)) => {
                eprintln!("skipped: no BPF maps here ({errno})");
                return;
            }
            map => map.expect("a map"),
        };
        assert_eq!(map_info(&map).expect("it is a map").spec, spec);
        let contents = Contents {
            count: 2,
            keys: vec![1, 0, 0, 0, 2, 0, 0, 0],
            values: vec![10, 11, 20, 21],
        };
        fill_map(&map, &contents).expect("there is room");
        let read = read_map(&map).expect("it is readable");
        assert_eq!(read.count, 2);
        // A hash has no order.
        let pairs = |contents: &Contents| {
            let keys = contents.keys.chunks(4).map(<[u8]>::to_vec);
            let mut pairs: Vec<_> = keys
                .zip(contents.values.chunks(2).map(<[u8]>::to_vec))
                .collect();
            pairs.sort();
            pairs
        };
        assert_eq!(pairs(&read), pairs(&contents));
        let short = Contents {
            count: 3,
            ..contents.clone()
        };
        assert_eq!(fill_map(&map, &short), Err(Errno::EINVAL));
        freeze_map(&map).expect("not frozen yet");
        assert_eq!(fill_map(&map, &contents), Err(Errno::EPERM));
    }
}
