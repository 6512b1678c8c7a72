//! Questions about the mappings of a task without reading the text of its map.
//!
//! Source: linux include/uapi/linux/fs.h, PROCMAP_QUERY (Linux 6.11).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::{Errno, Pid, Result};

/// _IOWR('f', 17, struct procmap_query).
const PROCMAP_QUERY: u64 = 0xc068_6611;
/// The mapping that has the address, or else the next one.
const COVERING_OR_NEXT: u64 = 0x10;

/// struct procmap_query.
#[repr(C)]
#[derive(Debug, Default)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    device: [u32; 2],
    name_size: u32,
    build_id_size: u32,
    name_address: u64,
    build_id_address: u64,
}

const _: () = assert!(size_of::<Query>() == 104);

/// The mappings of a task, asked for one after the other.
#[derive(Debug)]
pub struct MapQueries(File);

impl MapQueries {
    /// Opens the map of a task.
    ///
    /// # Errors
    /// It is gone, or this process has no ptrace rights on it.
    pub fn open(pid: Pid) -> Result<MapQueries> {
        let path = format!("/proc/{pid}/maps");
        Ok(MapQueries(File::open(Path::new(&path))?))
    }

    /// First address and end of the mapping that has `address`, or else of the next one; None behind the last.
    ///
    /// # Errors
    /// ENOTTY before Linux 6.11.
    pub fn at_or_after(&self, address: u64) -> Result<Option<(u64, u64)>> {
        let mut query = Query {
            size: u64::try_from(size_of::<Query>()).expect("a small structure"),
            flags: COVERING_OR_NEXT,
            address,
            ..Query::default()
        };
        // SAFETY: the structure outlives the call and its size stands in it.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
        match Errno::check(i64::from(result)) {
            Ok(_) => Ok(Some((query.start, query.end))),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
