//! Snapshots: making one, and going back to one.

use super::images::NewImage;
use super::{Folder, FolderError, OpenOptions};
use crate::DiskError;
use crate::bitmap::DirtyBitmap;
use crate::descriptor::{Descriptor, Guid, Temporary};
use crate::disk::{BitmapChange, Disk, NewTop};
use crate::format::Format;
use crate::format::expanded::Preallocation;
use crate::storage::Access;

/// A snapshot to be made.
pub struct NewSnapshot<'a> {
    /// Its name.
    pub id: Guid,
    /// The disk, if this process has it open; its requests wait for a moment.
    pub running: Option<&'a dyn Disk>,
    /// What becomes of the dirty bitmap at the same moment.
    pub bitmap: BitmapChange,
    /// Whether it goes away by itself, should whoever makes it not delete it.
    pub temporary: Option<Temporary>,
}

impl Folder {
    /// Makes a snapshot: what the disk holds now stays under this name. Gives the old dirty bitmap back
    /// where it is replaced. A disk that is not running must have been closed.
    ///
    /// # Errors
    /// The name is taken, there is no room for one more, the disk is open elsewhere, or the host
    /// refused. The disk is as it was.
    pub fn snapshot(
        &mut self,
        new: NewSnapshot<'_>,
        options: &OpenOptions,
    ) -> Result<Option<DirtyBitmap>, FolderError> {
        self.must_be_mine()?;
        self.finish_interrupted(new.running, options)?;
        if self.descriptor().shot(new.id).is_ok() {
            return Err(self.refused(format!("there is a snapshot {} already", new.id)));
        }
        match new.running {
            Some(disk) => self.snapshot_of(disk, new, options),
            None => {
                let disk = self.open_disk(options)?.disk;
                let old = self.snapshot_of(&disk, new, options);
                disk.close()?;
                old
            }
        }
    }

    fn snapshot_of(
        &mut self,
        disk: &dyn Disk,
        new: NewSnapshot<'_>,
        options: &OpenOptions,
    ) -> Result<Option<DirtyBitmap>, FolderError> {
        let mut next = self.descriptor().clone();
        let top = next.image(Guid::TOP).map_err(|source| self.wrong(source))?;
        let file = self.new_image(&NewImage {
            format: delta_format(self.format_of(top)?),
            size_bytes: disk.size_bytes(),
            cluster_bytes: disk.cluster_bytes(),
            preallocation: Preallocation::None,
        })?;
        next.size_sectors = disk.size_bytes() / 512;
        let pushed = next
            .add_snapshot(new.id, &file)
            .and_then(|()| next.set_temporary(new.id, new.temporary))
            .map_err(|source| self.wrong(source))
            .and_then(|()| self.push(disk, &next, new.bitmap, options));
        match pushed {
            Ok(old) => {
                self.descriptor = next;
                Ok(old)
            }
            Err(error) => {
                self.abandon();
                let _ = std::fs::remove_file(self.dir().join(&file));
                Err(error)
            }
        }
    }

    fn push(
        &self,
        disk: &dyn Disk,
        next: &Descriptor,
        bitmap: BitmapChange,
        options: &OpenOptions,
    ) -> Result<Option<DirtyBitmap>, FolderError> {
        let entry = next.image(Guid::TOP).map_err(|source| self.wrong(source))?;
        let options = OpenOptions {
            pending: None,
            ..options.clone()
        };
        let image = self.open_entry(entry, Access::ReadWrite, &options)?;
        self.prepare(next)?;
        let name = self.xml().display().to_string();
        let top = NewTop {
            image,
            bitmap,
            commit: &mut || {
                self.commit()
                    .map_err(|error| DiskError::io(&name, "rename", 0, error))
            },
        };
        Ok(disk.push_top(top)?)
    }

    /// Goes back to a snapshot: the disk is what it was then, and what was written since the last
    /// snapshot is gone. The disk is not running.
    ///
    /// # Errors
    /// There is no such snapshot, the disk is open, or the host refused. The disk is as it was.
    pub fn switch(&mut self, id: Guid, options: &OpenOptions) -> Result<(), FolderError> {
        self.must_be_mine()?;
        self.finish_interrupted(None, options)?;
        let wrong = |source| self.wrong(source);
        let target = self.descriptor().image(id).map_err(wrong)?.clone();
        if id == Guid::TOP {
            return Err(self.refused("the top is what the disk holds now, not a snapshot"));
        }
        // A writer holds the seat of the old top, however it was left.
        let old_top = self.descriptor().image(Guid::TOP).map_err(wrong)?;
        let path = self.path_of(old_top);
        let seat = (options.opener)(&path, Access::ReadWrite);
        let seat = seat.map_err(|error| super::images::unopened(&path, error))?;
        let base = self.open_entry(&target, Access::ReadOnly, options)?;
        let file = self.new_image(&NewImage {
            format: delta_format(self.format_of(&target)?),
            size_bytes: base
                .size_bytes()
                .next_multiple_of(base.cluster_bytes().into()),
            cluster_bytes: base.cluster_bytes(),
            preallocation: Preallocation::None,
        })?;
        let mut next = self.descriptor().clone();
        next.size_sectors = base.size_bytes() / 512;
        let switched = next
            .switch(id, &file)
            .map_err(wrong)
            .and_then(|old| self.store(next).map(|()| old));
        match switched {
            Ok(old) => {
                drop(seat);
                self.remove(&old)
            }
            Err(error) => {
                self.abandon();
                let _ = std::fs::remove_file(self.dir().join(&file));
                Err(error)
            }
        }
    }
}

/// A delta on a raw image is expanded.
fn delta_format(below: Format) -> Format {
    match below {
        Format::Raw => Format::Expanded,
        other => other,
    }
}
