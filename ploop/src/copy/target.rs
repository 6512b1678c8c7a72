//! The file that a copy becomes.
//!
//! It is written as `NAME.partial` and gets its name only when everything is there and durable. Beside
//! it `NAME.partial.map` says which session it is of and which blocks have come, so that a copy that broke
//! off can be continued.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::flusher::Flusher;
use super::wire::{self, Hello};
use super::{CopyError, Sink, partial};
use crate::bitmap::Bitmap;
use crate::format::expanded::{self, ExpandedImage, Preallocation, Unclosed};
use crate::{Access, ChainDisk, Disk, HostFile, RawImage, Storage, format};

/// A longer map is nobody's.
const MAX_MAP: u64 = 64 << 20;

/// After so much the map is written anew: what a receiver that is killed loses at most.
const MAP_STEP: u64 = 256 << 20;

/// What kind of file a copy becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetFormat {
    /// ploop's own.
    Expanded,
    /// The disk's bytes.
    Raw,
}

#[derive(Serialize, Deserialize)]
struct Map {
    hello: Hello,
    format: TargetFormat,
    /// First block and the one after the last, of each run.
    blocks: Vec<(u64, u64)>,
}

/// A file that is being written.
pub struct FileTarget {
    path: PathBuf,
    partial: PathBuf,
    map: PathBuf,
    format: TargetFormat,
    max_size: u64,
    open: Option<Open>,
    written: u64,
}

/// The partial file as a disk.
struct Image {
    disk: Arc<dyn Disk>,
    /// Which file it is.
    inode: u64,
}

struct Open {
    hello: Hello,
    disk: Arc<dyn Disk>,
    inode: u64,
    /// The blocks that have come.
    blocks: Bitmap,
    /// Bytes that came since the map was written.
    unsaved: u64,
    flusher: Flusher,
}

impl FileTarget {
    /// A file that is to be made. Disks larger than `max_size` bytes are refused.
    pub fn new(path: &Path, format: TargetFormat, max_size: u64) -> FileTarget {
        let with = |suffix: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        FileTarget {
            path: path.to_owned(),
            partial: with(".partial"),
            map: with(".partial.map"),
            format,
            max_size,
            open: None,
            written: 0,
        }
    }

    /// The file as long as it is not whole.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Whether a hello has come.
    pub fn has_begun(&self) -> bool {
        self.open.is_some()
    }

    /// The file when it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> CopyError + '_ {
        move |source| CopyError::Target {
            file: self.partial.display().to_string(),
            action,
            source,
        }
    }

    fn opened(&mut self) -> Result<&mut Open, CopyError> {
        self.open.as_mut().ok_or_else(|| CopyError::Stream {
            what: "it does not begin with a hello".to_owned(),
        })
    }

    /// The map of an earlier try, if it is one of this copy.
    fn earlier(&self, hello: &Hello) -> Option<Map> {
        // A sender that is not told what is here sends no zeroes over it.
        if !hello.hears {
            return None;
        }
        let length = std::fs::metadata(&self.map).ok()?.len();
        if length > MAX_MAP {
            return None;
        }
        let map: Map = serde_json::from_slice(&std::fs::read(&self.map).ok()?).ok()?;
        let fits =
            map.hello.is_same_copy(hello) && map.format == self.format && self.partial.exists();
        fits.then_some(map)
    }

    fn create(&self, hello: &Hello) -> Result<Image, CopyError> {
        if self.path.exists() {
            let there = io::Error::from(io::ErrorKind::AlreadyExists);
            return Err(CopyError::Target {
                file: self.path.display().to_string(),
                action: "creating",
                source: there,
            });
        }
        let storage = partial::create(&self.partial).map_err(self.failed("creating"))?;
        match std::fs::remove_file(&self.map) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(self.failed("removing the old map of")(error));
            }
            _ => {}
        }
        match self.format {
            TargetFormat::Raw => storage
                .set_len(hello.size_bytes)
                .map_err(self.failed("creating"))?,
            TargetFormat::Expanded => {
                let unit = hello.unit_bytes;
                let size = hello.size_bytes.next_multiple_of(unit.into());
                expanded::create(&storage, size, unit, Preallocation::None)
                    .map_err(CopyError::TargetDisk)?;
            }
        }
        self.open_image(storage, hello)
    }

    fn open_image(&self, storage: HostFile, hello: &Hello) -> Result<Image, CopyError> {
        let inode = storage.inode().map_err(self.failed("opening"))?;
        let storage: Box<dyn Storage> = Box::new(storage);
        let image: Arc<dyn format::Image> = match self.format {
            TargetFormat::Raw => Arc::new(
                RawImage::open(storage, Access::ReadWrite, hello.unit_bytes)
                    .map_err(CopyError::TargetDisk)?,
            ),
            TargetFormat::Expanded => Arc::new(
                ExpandedImage::open(storage, Access::ReadWrite, Unclosed::Recover)
                    .map_err(CopyError::TargetDisk)?,
            ),
        };
        let disk = ChainDisk::new(vec![image]).map_err(CopyError::TargetDisk)?;
        Ok(Image {
            disk: Arc::new(disk),
            inode,
        })
    }

    /// Hashes of the blocks that have come.
    fn hashes(&self, map: &Map, disk: &dyn Disk) -> Result<HashMap<u64, u64>, CopyError> {
        let unit = u64::from(map.hello.unit_bytes);
        let count = map.hello.size_bytes.div_ceil(unit);
        let mut hashes = HashMap::new();
        let mut buf = vec![0; usize::try_from(unit).unwrap_or(0)];
        for (start, end) in &map.blocks {
            for block in *start..(*end).min(count) {
                let at = block * unit;
                let len = unit.min(map.hello.size_bytes - at);
                let buf = &mut buf[..usize::try_from(len).unwrap_or(0)];
                disk.read_at(buf, at).map_err(CopyError::TargetDisk)?;
                hashes.insert(block, wire::hash(buf, at));
            }
        }
        Ok(hashes)
    }

    /// Takes out what came after the map was written: the sender does not know of it, and takes every
    /// block that it is not told of for zeroes.
    fn forget_unknown(&self, disk: &dyn Disk, known: &Bitmap) -> Result<(), CopyError> {
        let (size, unit) = (disk.size_bytes(), known.granularity_bytes());
        let mut at = 0;
        while at < size {
            let block = known.next(at / unit);
            let end = block.map_or(size, |block| (block * unit).min(size));
            let map = disk.map(at, end - at).map_err(CopyError::TargetDisk)?;
            for extent in map.iter().filter(|extent| !extent.kind.is_zero()) {
                let zeroed = disk.write_zeroes(extent.offset, extent.len_bytes);
                zeroed.map_err(CopyError::TargetDisk)?;
            }
            at = end + unit;
        }
        Ok(())
    }

    /// Makes what has come durable, and writes down what it is.
    ///
    /// # Errors
    /// The host refused.
    pub fn save(&mut self) -> Result<(), CopyError> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        open.unsaved = 0;
        open.flusher.finish().map_err(CopyError::TargetDisk)?;
        open.disk.flush().map_err(CopyError::TargetDisk)?;
        open.flusher = Flusher::start(Arc::clone(&open.disk));
        let mut blocks: Vec<(u64, u64)> = Vec::new();
        let mut from = 0;
        while let Some(block) = open.blocks.next(from) {
            from = block + 1;
            match blocks.last_mut() {
                Some(last) if last.1 == block => last.1 = from,
                _ => blocks.push((block, from)),
            }
        }
        let map = Map {
            hello: open.hello.clone(),
            format: self.format,
            blocks,
        };
        let text = serde_json::to_vec(&map).unwrap_or_default();
        let new = self.map.with_extension("map.new");
        let written = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &self.map));
        written.map_err(self.failed("writing the map of"))
    }

    fn finish(&mut self) -> Result<(), CopyError> {
        let Some(mut open) = self.open.take() else {
            return Ok(());
        };
        open.flusher.finish().map_err(CopyError::TargetDisk)?;
        open.disk.close().map_err(CopyError::TargetDisk)?;
        let inode = open.inode;
        drop(open);
        // The image left its seat when it was closed; a name that is given has to be this file's.
        let whole = partial::open(&self.partial).map_err(self.failed("opening"))?;
        if whole.inode().ok() != Some(inode) {
            return Err(self.failed("opening")(partial::taken()));
        }
        let sync = whole.file().sync_all();
        sync.map_err(self.failed("syncing"))?;
        rename_new(&self.partial, &self.path).map_err(self.failed("renaming"))?;
        // It names a file that is no more; that it is gone is all that is wanted.
        let _ = std::fs::remove_file(&self.map);
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = File::open(dir.unwrap_or(Path::new(".")));
        let synced = dir.and_then(|dir| dir.sync_all());
        synced.map_err(self.failed("syncing the directory of"))
    }

    fn touched(&mut self, offset: u64, len: u64) -> Result<(), CopyError> {
        let open = self.opened()?;
        let end = offset.checked_add(len);
        let end = end.filter(|end| len > 0 && *end <= open.hello.size_bytes);
        let Some(end) = end else {
            let what = format!("{len} bytes at {offset} lie outside of the disk");
            return Err(CopyError::Stream { what });
        };
        open.unsaved += len;
        open.blocks.set(offset..end);
        open.flusher.took(len).map_err(CopyError::TargetDisk)?;
        self.written += len;
        Ok(())
    }

    /// Writes the map now and then.
    fn save_at_times(&mut self) -> Result<(), CopyError> {
        match self.opened()?.unsaved >= MAP_STEP {
            true => self.save(),
            false => Ok(()),
        }
    }
}

/// Gives a file a name that nobody has: one that appeared meanwhile is somebody else's.
pub(super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let (cwd, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::NOREPLACE);
    Ok(rustix::fs::renameat_with(cwd, from, cwd, to, flags)?)
}

impl Sink for FileTarget {
    fn begin(&mut self, hello: &Hello) -> Result<HashMap<u64, u64>, CopyError> {
        hello.check(self.max_size)?;
        let unit = u64::from(hello.unit_bytes);
        let blocks = Bitmap::new(hello.size_bytes, unit);
        let (image, have) = match self.earlier(hello) {
            Some(map) => {
                let storage = partial::open(&self.partial).map_err(self.failed("opening"))?;
                let image = self.open_image(storage, hello)?;
                let have = self.hashes(&map, &*image.disk)?;
                have.keys()
                    .for_each(|block| blocks.set(block * unit..block * unit + 1));
                self.forget_unknown(&*image.disk, &blocks)?;
                (image, have)
            }
            None => (self.create(hello)?, HashMap::new()),
        };
        let flusher = Flusher::start(Arc::clone(&image.disk));
        self.open = Some(Open {
            hello: hello.clone(),
            disk: image.disk,
            inode: image.inode,
            flusher,
            blocks,
            unsaved: 0,
        });
        self.save()?;
        Ok(have)
    }

    fn data(&mut self, offset: u64, bytes: Vec<u8>) -> Result<(), CopyError> {
        self.touched(offset, bytes.len() as u64)?;
        let disk = &self.opened()?.disk;
        disk.write_at(&bytes, offset)
            .map_err(CopyError::TargetDisk)?;
        self.save_at_times()
    }

    fn zero(&mut self, offset: u64, len_bytes: u64) -> Result<(), CopyError> {
        self.touched(offset, len_bytes)?;
        let disk = &self.opened()?.disk;
        disk.write_zeroes(offset, len_bytes)
            .map_err(CopyError::TargetDisk)
    }

    fn barrier(&mut self) -> Result<(), CopyError> {
        self.opened()?;
        self.save()
    }

    fn end(&mut self) -> Result<(), CopyError> {
        self.opened()?;
        self.finish()
    }

    fn sent_bytes(&self) -> u64 {
        self.written
    }
}

impl Drop for FileTarget {
    fn drop(&mut self) {
        // What has come can be continued; where even that fails the next try begins anew.
        let _ = self.save();
    }
}
