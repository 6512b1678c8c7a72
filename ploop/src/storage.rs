//! The io layer: where an image's bytes are kept.
//!
//! Formats speak to a [`Storage`] and never to a file, so that tests can put a recorder or memory in
//! its place and a server can add its own way of reading and writing.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sys;

/// How a file or an image is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// For reading; nothing of it is changed, not even its marks.
    ReadOnly,
    /// For reading and writing.
    ReadWrite,
}

/// A growing row of bytes with holes. All calls may come from several threads at once.
pub trait Storage: Send + Sync {
    /// What it is called in messages: the path of a file.
    fn name(&self) -> &str;
    /// Number of bytes.
    ///
    /// # Errors
    /// The host refused.
    fn len_bytes(&self) -> io::Result<u64>;
    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// `UnexpectedEof` where the bytes end before; otherwise the host's answer.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`, growing where needed.
    ///
    /// # Errors
    /// The host refused, for instance for want of space.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Returns when everything written before the call outlives a loss of power.
    ///
    /// # Errors
    /// The host refused; what was written may be lost.
    fn sync(&self) -> io::Result<()>;
    /// Cuts off, or grows by zeroes.
    ///
    /// # Errors
    /// The host refused.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Grows to at least the end of the range and reserves space for it; what was never written
    /// reads as zeroes, what was stays.
    ///
    /// # Errors
    /// The host refused, for instance for want of space.
    fn allocate(&self, range: Range<u64>) -> io::Result<()>;
    /// Makes a range read as zeroes and keeps its space.
    ///
    /// # Errors
    /// The host refused.
    fn zero(&self, range: Range<u64>) -> io::Result<()>;
    /// Makes a range inside read as zeroes and gives its space back where the host can.
    ///
    /// # Errors
    /// The host refused.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;
    /// The first run at or after `offset` that is not a hole, or None where only holes follow.
    ///
    /// # Errors
    /// The host refused.
    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
    /// Takes the writer's seat, of which there is one.
    ///
    /// # Errors
    /// `WouldBlock` where somebody else sits there; `PermissionDenied` where it was opened for reading.
    fn claim(&self) -> io::Result<()> {
        Ok(())
    }
    /// Leaves the writer's seat.
    fn release(&self) {}
    /// The file, open for direct I/O in units of a sector, where there is such a thing.
    fn past_cache(&self) -> Option<Arc<File>> {
        None
    }
}

/// A file of the host, read and written through its page cache. Its one writer holds the file's lock.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    access: Access,
    path: PathBuf,
    name: String,
}

impl HostFile {
    /// Opens an existing file.
    ///
    /// # Errors
    /// It is not there or may not be opened so; `WouldBlock` where it has a writer already.
    pub fn open(path: &Path, access: Access) -> io::Result<HostFile> {
        let writes = access == Access::ReadWrite;
        let opened = HostFile::of(open_bytes(path, writes)?, path, access);
        if writes {
            opened.claim()?;
        }
        Ok(opened)
    }

    /// Makes a new, empty file.
    ///
    /// # Errors
    /// A file of that name is there already, or it can't be made.
    pub fn create(path: &Path) -> io::Result<HostFile> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(path)?;
        let created = HostFile::of(file, path, Access::ReadWrite);
        created.claim()?;
        Ok(created)
    }

    fn of(file: File, path: &Path, access: Access) -> HostFile {
        HostFile {
            file,
            access,
            path: path.to_owned(),
            name: path.display().to_string(),
        }
    }

    /// Which file it is on its file system.
    ///
    /// # Errors
    /// The host refused.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// Whether somebody else has the writer's seat at this moment.
    ///
    /// # Errors
    /// The host has no locks for it.
    pub fn has_writer(&self) -> io::Result<bool> {
        match patiently(|| self.file.try_lock_shared()) {
            Ok(()) => self.file.unlock().map(|()| false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        let zeroes = vec![0u8; 1 << 16];
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).map_or(zeroes.len(), |n| n.min(zeroes.len()));
            self.file.write_all_at(&zeroes[..len], at)?;
            at += len as u64;
        }
        Ok(())
    }
}

/// How long the writer's seat may be taken by nobody: a child of this process keeps what the process has
/// just closed until its exec.
const PATIENCE: Duration = Duration::from_millis(200);

/// Tries to lock a file until somebody must really have it.
fn patiently(lock: impl Fn() -> Result<(), TryLockError>) -> Result<(), TryLockError> {
    let begun = Instant::now();
    loop {
        match lock() {
            Err(TryLockError::WouldBlock) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// Opens a file or block device. A descriptor may name anything: what has no bytes that can be gone back to
/// is refused, and is not waited for.
///
/// # Errors
/// It is not there, may not be opened so, or is a pipe or the like.
pub(crate) fn open_bytes(path: &Path, writes: bool) -> io::Result<File> {
    use std::os::unix::fs::FileTypeExt;
    let no_wait = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let mut options = OpenOptions::new();
    options.read(true).write(writes);
    let file = options
        .custom_flags(i32::try_from(no_wait.bits()).unwrap_or(0))
        .open(path)?;
    let kind = file.metadata()?.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => Ok(file),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is neither a file nor a block device",
        )),
    }
}

impl Storage for HostFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        match sys::allocate(&self.file, range.start, range.end - range.start) {
            Err(error) if sys::is_missing(&error) => {
                let len = self.len_bytes()?;
                if len < range.end {
                    self.set_len(range.end)?;
                }
                Ok(())
            }
            other => other,
        }
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        match sys::zero_range(&self.file, range.start, range.end - range.start) {
            Err(error) if sys::is_missing(&error) => self.write_zeroes(range),
            other => other,
        }
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        match sys::punch_hole(&self.file, range.start, range.end - range.start) {
            Err(error) if sys::is_missing(&error) => self.write_zeroes(range),
            other => other,
        }
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let Some(start) = sys::seek_data(&self.file, offset)? else {
            return Ok(None);
        };
        Ok(Some(start..sys::seek_hole(&self.file, start)?))
    }

    fn claim(&self) -> io::Result<()> {
        if self.access == Access::ReadOnly {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(patiently(|| self.file.try_lock())?)
    }

    fn release(&self) {
        // It can't fail on a file that is open, and closing would do it too.
        let _ = self.file.unlock();
    }
}

/// Whether a name still leads to an open file.
pub(crate) fn is_named(file: &File, path: &Path) -> bool {
    let which = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
    let open = file.metadata().map(which).ok();
    open.is_some() && open == std::fs::metadata(path).map(which).ok()
}

/// A file of the host whose data goes past the page cache, and whose tables go through it.
///
/// What is aligned to a sector in memory, in the file and in length is data; what is not goes through
/// the cache, as does everything where the host's file system has no direct I/O. The kernel keeps the
/// two views of the file in step.
#[derive(Debug)]
pub struct DirectFile {
    cached: HostFile,
    direct: Option<Arc<File>>,
}

/// What direct I/O has to be aligned to, on every device with sectors of 512 bytes.
pub const DIRECT_ALIGNMENT: u64 = 512;

impl DirectFile {
    /// Opens a file a second time, for its data.
    pub fn of(cached: HostFile, access: Access) -> DirectFile {
        let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap_or(0);
        let writes = access == Access::ReadWrite;
        let direct = OpenOptions::new()
            .read(true)
            .write(writes)
            .custom_flags(flags)
            .open(cached.path())
            .ok()
            .filter(takes_sectors)
            .map(Arc::new);
        DirectFile { cached, direct }
    }

    fn direct(&self, bytes: &[u8], offset: u64) -> Option<&File> {
        let address = bytes.as_ptr().addr() as u64;
        let all = address | offset | bytes.len() as u64;
        let is_aligned = all.is_multiple_of(DIRECT_ALIGNMENT) && !bytes.is_empty();
        self.direct.as_deref().filter(|_| is_aligned)
    }
}

/// Whether the file system wants no coarser alignment than a sector's.
fn takes_sectors(file: &File) -> bool {
    use rustix::fs::{AtFlags, StatxFlags};
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    stat.is_ok_and(|stat| {
        let fits = |align: u32| align != 0 && u64::from(align) <= DIRECT_ALIGNMENT;
        fits(stat.stx_dio_mem_align) && fits(stat.stx_dio_offset_align)
    })
}

impl Storage for DirectFile {
    fn name(&self) -> &str {
        self.cached.name()
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.cached.len_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self.direct(buf, offset) {
            Some(direct) => direct.read_exact_at(buf, offset),
            None => self.cached.read_at(buf, offset),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match self.direct(buf, offset) {
            Some(direct) => direct.write_all_at(buf, offset),
            None => self.cached.write_at(buf, offset),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.cached.sync()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.cached.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.cached.allocate(range)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.cached.zero(range)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.cached.punch(range)
    }

    fn claim(&self) -> io::Result<()> {
        self.cached.claim()
    }

    fn release(&self) {
        self.cached.release();
    }

    fn past_cache(&self) -> Option<Arc<File>> {
        self.direct.clone()
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.cached.data_after(offset)
    }
}
