//! Where a copy comes from: a disk that is served, or one that is not.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::CopyError;
use super::ahead::{Block, ReadAhead};
use crate::Disk;
use crate::server::Client;
use crate::tracker::{Begin, ListenerSpec};

/// Bytes that one mark of a copy stands for at most. A writer that touches little of many clusters
/// would otherwise have whole clusters sent while everything stands still.
const MARK_BYTES: u64 = 64 << 10;

/// A disk that is copied.
pub trait CopySource {
    /// Size in bytes.
    fn size_bytes(&self) -> u64;
    /// Bytes of a block: what is sent at once.
    fn unit_bytes(&self) -> u32;
    /// The parts of a range that are not known to be zeroes.
    ///
    /// # Errors
    /// The disk can't be read.
    fn data_in(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>, CopyError>;
    /// Reads.
    ///
    /// # Errors
    /// The disk can't be read.
    fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<(), CopyError>;
    /// Says which blocks are fetched next, in this order, so that they can be read ahead. Their marks
    /// were taken before.
    fn expect(&mut self, _blocks: &[Block]) {}
    /// Reads a block.
    ///
    /// # Errors
    /// The disk can't be read.
    fn fetch(&mut self, block: Block) -> Result<Vec<u8>, CopyError> {
        let mut bytes = vec![0; block.len_bytes];
        self.read(&mut bytes, block.offset)?;
        Ok(bytes)
    }
    /// Has the file system on the disk write out what it caches, where there is one mounted: what is
    /// written out before the freeze need not be in it.
    ///
    /// # Errors
    /// It can't be written out.
    fn write_out(&mut self) -> Result<(), CopyError> {
        Ok(())
    }
    /// Begins to track writes.
    ///
    /// # Errors
    /// The server refused.
    fn track(&mut self) -> Result<(), CopyError>;
    /// Takes out everything that was written since it was asked last.
    ///
    /// # Errors
    /// The server left.
    fn written(&mut self) -> Result<Vec<Range<u64>>, CopyError>;
    /// Ends the tracking; the bytes still marked.
    ///
    /// # Errors
    /// The server left.
    fn untrack(&mut self) -> Result<u64, CopyError>;
    /// Writes out and freezes the file system on the disk, where there is one mounted.
    ///
    /// # Errors
    /// It can't be frozen.
    fn freeze(&mut self) -> Result<(), CopyError>;
    /// Lets it go on. A second call does nothing.
    fn thaw(&mut self);
}

/// A disk that is served.
#[derive(Debug)]
pub struct OnlineSource {
    client: Client,
    /// Freezing needs a connection of its own: that one's end thaws.
    freezer: Client,
    listener: ListenerSpec,
    size_bytes: u64,
    unit_bytes: u32,
    mountpoint: Option<PathBuf>,
    is_frozen: bool,
    ahead: ReadAhead,
}

impl OnlineSource {
    /// A served disk, over two connections to it. `mountpoint` is frozen at the end, where there is
    /// one.
    ///
    /// # Errors
    /// The server left.
    pub fn new(
        mut client: Client,
        freezer: Client,
        session: &str,
        mountpoint: Option<PathBuf>,
    ) -> Result<OnlineSource, CopyError> {
        let stat = client.stat()?;
        Ok(OnlineSource {
            client,
            freezer,
            listener: ListenerSpec {
                name: format!("copy-{session}"),
                unit_bytes: MARK_BYTES.min(stat.cluster_bytes.into()),
            },
            size_bytes: stat.size_bytes,
            unit_bytes: stat.cluster_bytes,
            mountpoint,
            is_frozen: false,
            ahead: ReadAhead::over(Vec::new(), stat.cluster_bytes),
        })
    }

    /// Reads ahead over these connections, too.
    pub fn read_ahead(mut self, connections: Vec<Client>) -> OnlineSource {
        self.ahead = ReadAhead::over(connections, self.unit_bytes);
        self
    }
}

impl CopySource for OnlineSource {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn unit_bytes(&self) -> u32 {
        self.unit_bytes
    }

    fn data_in(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>, CopyError> {
        let runs = self.client.map(range.start, range.end - range.start)?;
        let mut at = range.start;
        let mut data = Vec::new();
        for run in runs {
            if !run.is_zero {
                data.push(at..at + run.len_bytes);
            }
            at += run.len_bytes;
        }
        Ok(data)
    }

    fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<(), CopyError> {
        Ok(self.client.read(buf, offset)?)
    }

    fn expect(&mut self, blocks: &[Block]) {
        self.ahead.expect(blocks);
    }

    fn fetch(&mut self, block: Block) -> Result<Vec<u8>, CopyError> {
        if let Some(bytes) = self.ahead.fetch(block) {
            return Ok(bytes?);
        }
        let mut bytes = vec![0; block.len_bytes];
        self.read(&mut bytes, block.offset)?;
        Ok(bytes)
    }

    fn write_out(&mut self) -> Result<(), CopyError> {
        if self.mountpoint.is_some() {
            self.freezer.write_out(self.mountpoint.clone())?;
        }
        Ok(())
    }

    fn track(&mut self) -> Result<(), CopyError> {
        // One that a sender of this session left when it was killed.
        let _ = self.client.tracker_stop(&self.listener.name);
        Ok(self.client.tracker_start(&self.listener, Begin::Clean)?)
    }

    fn written(&mut self) -> Result<Vec<Range<u64>>, CopyError> {
        Ok(self.client.tracker_take(&self.listener.name, 0, u64::MAX)?)
    }

    fn untrack(&mut self) -> Result<u64, CopyError> {
        Ok(self.client.tracker_stop(&self.listener.name)?)
    }

    fn freeze(&mut self) -> Result<(), CopyError> {
        let Some(target) = self.mountpoint.clone() else {
            return Ok(self.client.flush()?);
        };
        // A file system that is frozen has flushed its device.
        let frozen = self.freezer.freeze(Some(target.clone()));
        frozen.map_err(|source| CopyError::FreezeFs {
            target: target.display().to_string(),
            source,
        })?;
        self.is_frozen = true;
        Ok(())
    }

    fn thaw(&mut self) {
        if self.is_frozen {
            self.is_frozen = false;
            // Where the server has left, the next one thaws.
            let _ = self.freezer.thaw();
        }
    }
}

/// A disk that nobody writes.
pub struct OfflineSource {
    disk: Arc<dyn Disk>,
}

impl OfflineSource {
    /// A disk that is open for reading.
    pub fn new(disk: Arc<dyn Disk>) -> OfflineSource {
        OfflineSource { disk }
    }
}

impl CopySource for OfflineSource {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn unit_bytes(&self) -> u32 {
        self.disk.cluster_bytes()
    }

    fn data_in(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>, CopyError> {
        let map = self.disk.map(range.start, range.end - range.start);
        let map = map.map_err(CopyError::Source)?;
        let data = map.iter().filter(|extent| !extent.kind.is_zero());
        Ok(data.map(|extent| extent.offset..extent.end()).collect())
    }

    fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<(), CopyError> {
        self.disk.read_at(buf, offset).map_err(CopyError::Source)
    }

    fn track(&mut self) -> Result<(), CopyError> {
        Ok(())
    }

    fn written(&mut self) -> Result<Vec<Range<u64>>, CopyError> {
        Ok(Vec::new())
    }

    fn untrack(&mut self) -> Result<u64, CopyError> {
        Ok(0)
    }

    fn freeze(&mut self) -> Result<(), CopyError> {
        Ok(())
    }

    fn thaw(&mut self) {}
}
