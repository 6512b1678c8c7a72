//! Another size for the disk. The file system in it is somebody else's.

use super::{Folder, FolderError, OpenOptions};
use crate::Disk;
use crate::descriptor::Guid;
use crate::storage::Access;

impl Folder {
    /// Makes the disk larger; the size is rounded up to whole clusters and given back.
    ///
    /// # Errors
    /// It would shrink, the disk is open elsewhere, or the host refused.
    pub fn grow(
        &mut self,
        size_bytes: u64,
        running: Option<&dyn Disk>,
        options: &OpenOptions,
    ) -> Result<u64, FolderError> {
        self.must_be_mine()?;
        self.finish_interrupted(running, options)?;
        let size_bytes = self.whole(size_bytes);
        if size_bytes < self.descriptor().size_bytes() {
            return Err(self.refused("growing would make it smaller"));
        }
        let mut next = self.descriptor().clone();
        next.size_sectors = size_bytes / 512;
        // The images may be larger than the descriptor says, never smaller.
        self.prepare(&next)?;
        let grown = match running {
            Some(disk) => disk.grow(size_bytes).map_err(FolderError::from),
            None => self.open_disk(options).and_then(|opened| {
                let grown = opened.disk.grow(size_bytes);
                let closed = opened.disk.close();
                grown?;
                Ok(closed?)
            }),
        };
        self.settle_size(grown, next)?;
        Ok(size_bytes)
    }

    /// Makes the disk smaller; what lies behind the new end is lost. The file system in it must have been
    /// made smaller before, and the disk has no snapshots and is not running.
    ///
    /// # Errors
    /// There are snapshots, it would grow, the disk is open, or the host refused.
    pub fn shrink(&mut self, size_bytes: u64, options: &OpenOptions) -> Result<u64, FolderError> {
        self.must_be_mine()?;
        self.finish_interrupted(None, options)?;
        let size_bytes = self.whole(size_bytes);
        if self.descriptor().images.len() > 1 {
            return Err(
                self.refused("a disk with snapshots can't shrink; delete or merge them first")
            );
        }
        if size_bytes > self.descriptor().size_bytes() {
            return Err(self.refused("shrinking would make it larger"));
        }
        let mut next = self.descriptor().clone();
        next.size_sectors = size_bytes / 512;
        // The other way round: first the descriptor, so that it never says more than there is.
        let entry = next
            .image(Guid::TOP)
            .map_err(|source| self.wrong(source))?
            .clone();
        let image = self.open_entry(&entry, Access::ReadWrite, options)?;
        self.store(next)?;
        let shrunk = image.shrink(size_bytes);
        image.close()?;
        shrunk?;
        Ok(size_bytes)
    }

    fn whole(&self, size_bytes: u64) -> u64 {
        size_bytes.next_multiple_of(u64::from(self.descriptor().cluster_bytes()).max(1))
    }

    fn settle_size(
        &mut self,
        grown: Result<(), FolderError>,
        next: crate::descriptor::Descriptor,
    ) -> Result<(), FolderError> {
        if let Err(error) = grown {
            self.abandon();
            return Err(error);
        }
        self.commit()
            .map_err(FolderError::host(self.xml(), "renamed"))?;
        self.descriptor = next;
        Ok(())
    }
}
