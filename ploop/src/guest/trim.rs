//! Giving back what a mounted file system does not use.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use crate::kernel;

/// Parts that are trimmed one after another, so that it can be told how far it is.
const PARTS: u64 = 64;
/// Smaller parts are not worth a call.
const LEAST_PART: u64 = 1 << 30;

/// Has the file system that an open directory belongs to discard what it does not use; returns the bytes
/// discarded. `progress` is told the bytes that were looked at and all of them.
///
/// # Errors
/// `EOPNOTSUPP` where the device below knows no discard.
pub fn trim(dir: &File, progress: &mut dyn FnMut(u64, u64)) -> io::Result<u64> {
    let stat = rustix::fs::fstatvfs(dir)?;
    let size = stat.f_blocks.saturating_mul(stat.f_frsize);
    let mut trimmed = 0;
    for (at, len_bytes) in parts(size) {
        trimmed += kernel::trim_fs(dir.as_fd(), at, len_bytes)?;
        progress(at.saturating_add(len_bytes).min(size), size);
    }
    Ok(trimmed)
}

/// Offset and length of each part. The last one goes to the end, wherever that is: Btrfs counts in
/// addresses of its own.
fn parts(size_bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let part = (size_bytes / PARTS).max(LEAST_PART);
    let count = size_bytes.div_ceil(part).max(1);
    (0..count).map(move |number| match number + 1 == count {
        true => (number * part, u64::MAX - number * part),
        false => (number * part, part),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for size in [0, 1, LEAST_PART, LEAST_PART + 1, 1000 * LEAST_PART + 77] {
            let mut end = 0;
            for (at, len) in parts(size) {
                assert_eq!(at, end);
                end = at + len;
            }
            assert_eq!(end, u64::MAX);
            assert!(parts(size).count() <= 65);
        }
    }
}
