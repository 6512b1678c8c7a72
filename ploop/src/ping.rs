//! How long small reads and writes take: a probe in the manner of ioping.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::kernel::{self, PageBuffer};

/// Size of the file that a directory is probed with.
const FILE_BYTES: u64 = 1 << 20;

/// What is probed, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PingOptions {
    /// Bytes of a request.
    pub request_bytes: u32,
    /// Write instead of read; of a file or device this changes its contents.
    pub write: bool,
    /// Through the page cache.
    pub cached: bool,
    /// Requests.
    pub count: u32,
    /// Pause between two.
    pub interval: Duration,
}

/// How long the requests took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PingReport {
    /// Requests.
    pub count: u32,
    /// The shortest.
    pub min: Duration,
    /// The mean.
    pub mean: Duration,
    /// The longest.
    pub max: Duration,
    /// How far they lie apart: the standard deviation.
    pub deviation: Duration,
    /// Bytes moved.
    pub bytes: u64,
}

/// Probes a block device, a file, or the file system of a directory, in which a file is made that has
/// no name. `each` is told each request's number and time.
///
/// # Errors
/// It can't be opened so, is shorter than a request, or a request failed.
pub fn ping(
    target: &Path,
    options: &PingOptions,
    each: &mut dyn FnMut(u32, Duration),
) -> io::Result<PingReport> {
    let (file, size) = open(target, options)?;
    let len = u64::from(options.request_bytes);
    let slots = size / len.max(1);
    if slots == 0 || len == 0 {
        return Err(io::Error::other("it is shorter than a request"));
    }
    let mut buffer = PageBuffer::new(options.request_bytes as usize)?;
    let buffer = &mut buffer[..options.request_bytes as usize];
    buffer.fill(0x5a);
    let mut times = Vec::new();
    let mut place = 0x9e37_79b9_7f4a_7c15u64;
    for number in 0..options.count {
        if number > 0 {
            std::thread::sleep(options.interval);
        }
        place ^= place << 13;
        place ^= place >> 7;
        place ^= place << 17;
        let offset = place % slots * len;
        let begun = Instant::now();
        match options.write {
            true => {
                file.write_all_at(buffer, offset)?;
                file.sync_data()?;
            }
            false => file.read_exact_at(buffer, offset)?,
        }
        let took = begun.elapsed();
        each(number + 1, took);
        times.push(took);
    }
    Ok(summary(&times, len))
}

fn summary(times: &[Duration], len: u64) -> PingReport {
    let count = u32::try_from(times.len()).unwrap_or(u32::MAX);
    let total: Duration = times.iter().sum();
    let mean = total / count.max(1);
    let squares = times.iter().map(|time| {
        let off = time.as_secs_f64() - mean.as_secs_f64();
        off * off
    });
    let variance = squares.sum::<f64>() / f64::from(count.max(1));
    PingReport {
        count,
        min: times.iter().min().copied().unwrap_or_default(),
        mean,
        max: times.iter().max().copied().unwrap_or_default(),
        deviation: Duration::from_secs_f64(variance.sqrt()),
        bytes: len * u64::from(count),
    }
}

fn open(target: &Path, options: &PingOptions) -> io::Result<(File, u64)> {
    let kind = std::fs::metadata(target)?.file_type();
    if kind.is_dir() {
        return Ok((scratch(target, options)?, FILE_BYTES));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(options.write)
        .custom_flags(flags(options))
        .open(target)?;
    let size = match kind.is_block_device() {
        true => kernel::block_device_size(&file)?,
        false => file.metadata()?.len(),
    };
    Ok((file, size))
}

fn flags(options: &PingOptions) -> i32 {
    match options.cached {
        true => 0,
        false => libc::O_DIRECT,
    }
}

/// A file that goes with its descriptor.
fn scratch(dir: &Path, options: &PingOptions) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE | flags(options))
        .open(dir)?;
    let block = PageBuffer::new(64 << 10)?;
    for offset in (0..FILE_BYTES).step_by(block.len()) {
        file.write_all_at(&block, offset)?;
    }
    file.sync_all()?;
    Ok(file)
}

/// What a path of `ping` stands for when it names a served disk: its device.
pub fn target_of(path: &Path, registry: &crate::server::Registry) -> io::Result<PathBuf> {
    let served = registry.find_by(path)?;
    let is_plain = path.is_dir() && !path.join(crate::descriptor::FILE_NAME).exists();
    match served.and_then(|record| record.device) {
        Some(device) if !is_plain => Ok(device),
        _ => Ok(path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_directories_answer() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, [7; 8192]).unwrap();
        let options = PingOptions {
            request_bytes: 4096,
            write: false,
            cached: true,
            count: 3,
            interval: Duration::ZERO,
        };
        let mut seen = 0;
        let report = ping(&file, &options, &mut |_, _| seen += 1).unwrap();
        assert_eq!((report.count, report.bytes, seen), (3, 12_288, 3));
        assert!(report.min <= report.mean && report.mean <= report.max);
        let write = PingOptions {
            write: true,
            ..options
        };
        ping(dir.path(), &write, &mut |_, _| {}).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), [7; 8192]);
        let large = PingOptions {
            request_bytes: 1 << 20,
            ..options
        };
        assert!(ping(&file, &large, &mut |_, _| {}).is_err());
    }
}
