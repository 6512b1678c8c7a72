//! Requests, cut at the clusters' borders.

use std::fs::File;
use std::sync::Arc;

use super::{ChainDisk, find, read, set_in, top_of, write};
use crate::DiskError;
use crate::disk::{Counters, Disk, Placed, Way};
use crate::format::{Image, Known, Slot};
use crate::storage::Access;

/// The part of a request that lies in one cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub cluster: u32,
    /// Byte of the disk.
    pub offset: u64,
    /// Byte of the cluster.
    pub skip: u32,
    pub len: u32,
}

type Layers = [Arc<dyn Image>];

impl ChainDisk {
    /// Cuts a range. It lies inside of the disk, so cluster numbers fit.
    pub(super) fn parts(&self, offset: u64, len: u64) -> impl Iterator<Item = Part> + use<> {
        let unit = u64::from(self.cluster);
        let end = offset + len;
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let skip = at % unit;
            let len = (unit - skip).min(end - at);
            let part = Part {
                cluster: u32::try_from(at / unit).expect("images have at most 2^32 clusters"),
                offset: at,
                skip: u32::try_from(skip).expect("smaller than a cluster"),
                len: u32::try_from(len).expect("at most a cluster"),
            };
            at += len;
            Some(part)
        })
    }

    pub(super) fn read_parts(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.within(offset, buf.len() as u64)?;
        let layers = self.chain();
        let mut rest = buf;
        for part in self.parts(offset, rest.len() as u64) {
            let (now, later) = rest.split_at_mut(length(part.len));
            let _place = read(self.lock(part.cluster));
            read_part(&layers, part, now)?;
            rest = later;
        }
        Ok(())
    }

    pub(super) fn write_parts(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        self.within(offset, buf.len() as u64)?;
        let layers = self.chain();
        writable(&layers)?;
        let mut rest = buf;
        for part in self.parts(offset, rest.len() as u64) {
            let (now, later) = rest.split_at(length(part.len));
            self.write_part(&layers, part, now)?;
            rest = later;
        }
        Ok(())
    }

    /// A range that lies in one cluster with a place, if nobody has to be waited for.
    pub(super) fn place_range(&self, offset: u64, len: u64, way: Way) -> Option<Placed<'_>> {
        self.within(offset, len).ok()?;
        let mut parts = self.parts(offset, len);
        let part = parts.next().filter(|part| u64::from(part.len) == len)?;
        let layers = self.layers.try_read().ok()?;
        let place = self.lock(part.cluster).try_read().ok()?;
        let (file, offset) = match way {
            Way::Read => known(&layers, part)?,
            Way::Write => {
                writable(&layers).ok()?;
                known(&layers[layers.len() - 1..], part)
                    .filter(|_| self.note_at_once(part.offset, len))?
            }
        };
        let _held = (layers, place);
        Some(Placed {
            file,
            offset,
            _held,
        })
    }

    /// Like [`note`](ChainDisk::note); false where it would have to wait.
    fn note_at_once(&self, offset: u64, len: u64) -> bool {
        let (Ok(bitmap), Ok(missed)) = (self.bitmap.try_read(), self.missed.try_read()) else {
            return false;
        };
        set_in(&bitmap, &missed, offset, len);
        true
    }

    fn write_part(&self, layers: &Layers, part: Part, buf: &[u8]) -> Result<(), DiskError> {
        let top = top_of(layers);
        {
            let _place = read(self.lock(part.cluster));
            if top.slot(part.cluster)? == Slot::Data {
                self.note(part.offset, part.len.into());
                return top.overwrite(part.cluster, part.skip, buf);
            }
        }
        let _alone = write(self.lock(part.cluster));
        self.note(part.offset, part.len.into());
        // Another thread may have been faster.
        match top.slot(part.cluster)? {
            Slot::Data => top.overwrite(part.cluster, part.skip, buf),
            Slot::Zero => self.store(top.as_ref(), part, buf),
            Slot::Absent => self.store_above(layers, part, buf),
        }
    }

    /// Gives the top a cluster whose other bytes are zeroes.
    fn store(&self, top: &dyn Image, part: Part, buf: &[u8]) -> Result<(), DiskError> {
        Counters::add(&self.counters.allocated_clusters, 1);
        top.store(part.cluster, part.skip, buf)
    }

    /// Gives the top a cluster whose other bytes are those of the layers below.
    fn store_above(&self, layers: &Layers, part: Part, buf: &[u8]) -> Result<(), DiskError> {
        let top = top_of(layers);
        let whole = length(part.len) == length(self.cluster);
        let below = match whole {
            true => None,
            false => find(&layers[..layers.len() - 1], part.cluster)?,
        };
        let Some((image, Slot::Data)) = below else {
            return self.store(top.as_ref(), part, buf);
        };
        let mut bytes = vec![0; length(self.cluster)];
        image.read(part.cluster, 0, &mut bytes)?;
        let skip = length(part.skip);
        bytes[skip..skip + buf.len()].copy_from_slice(buf);
        Counters::add(&self.counters.copied_clusters, 1);
        let everything = Part { skip: 0, ..part };
        self.store(top.as_ref(), everything, &bytes)
    }

    pub(super) fn zero_parts(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.within(offset, len)?;
        let layers = self.chain();
        writable(&layers)?;
        for part in self.parts(offset, len) {
            let _alone = write(self.lock(part.cluster));
            self.note(part.offset, part.len.into());
            match self.is_whole(part) {
                true => self.clear_cluster(&layers, part)?,
                false => self.zero_part(&layers, part)?,
            }
        }
        Ok(())
    }

    /// The last cluster of a disk whose size is no multiple of it is whole when its end is reached.
    fn is_whole(&self, part: Part) -> bool {
        let end = part.offset + u64::from(part.len);
        part.skip == 0 && (part.len == self.cluster || end == self.size_bytes())
    }

    fn zero_part(&self, layers: &Layers, part: Part) -> Result<(), DiskError> {
        let top = top_of(layers);
        match find(layers, part.cluster)? {
            None | Some((_, Slot::Zero | Slot::Absent)) => Ok(()),
            Some(_) if top.slot(part.cluster)? == Slot::Data => {
                top.zero(part.cluster, part.skip, part.len)
            }
            Some(_) => self.store_above(layers, part, &vec![0; length(part.len)]),
        }
    }

    /// Makes a whole cluster read as zeroes with as little space as the format allows.
    fn clear_cluster(&self, layers: &Layers, part: Part) -> Result<(), DiskError> {
        let top = top_of(layers);
        let below = find(&layers[..layers.len() - 1], part.cluster)?;
        let hides = matches!(below, Some((_, Slot::Data)));
        let slot = top.slot(part.cluster)?;
        if !hides && slot == Slot::Data {
            Counters::add(&self.counters.freed_clusters, 1);
            return top.unmap(part.cluster);
        }
        if !hides || slot == Slot::Zero || top.mark_zero(part.cluster)? {
            return Ok(());
        }
        match slot {
            Slot::Data => top.zero(part.cluster, 0, self.cluster),
            _ => self.store(top.as_ref(), part, &[]),
        }
    }

    pub(super) fn discard_parts(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.within(offset, len)?;
        let layers = self.chain();
        writable(&layers)?;
        for part in self.parts(offset, len) {
            if !self.is_whole(part) {
                continue;
            }
            let _alone = write(self.lock(part.cluster));
            // A cluster that only lower layers hold would cost space to hide: it stays.
            if top_of(&layers).slot(part.cluster)? == Slot::Data {
                self.note(part.offset, part.len.into());
                self.clear_cluster(&layers, part)?;
            }
        }
        Ok(())
    }
}

/// The file and byte where the topmost layer that knows a part has it.
fn known(layers: &Layers, part: Part) -> Option<(Arc<File>, u64)> {
    for image in layers.iter().rev() {
        match image.known(part.cluster, part.skip) {
            Known::Nothing => return None,
            Known::Absent => {}
            Known::At(file, offset) => return Some((file, offset)),
        }
    }
    None
}

fn read_part(layers: &Layers, part: Part, buf: &mut [u8]) -> Result<(), DiskError> {
    match find(layers, part.cluster)? {
        Some((image, Slot::Data)) => image.read(part.cluster, part.skip, buf),
        _ => {
            buf.fill(0);
            Ok(())
        }
    }
}

fn writable(layers: &Layers) -> Result<(), DiskError> {
    let top = top_of(layers);
    match top.access() {
        Access::ReadWrite => Ok(()),
        Access::ReadOnly => Err(DiskError::ReadOnly {
            object: top.name().to_owned(),
        }),
    }
}

/// A length inside of a cluster, for slices.
fn length(bytes: u32) -> usize {
    usize::try_from(bytes).expect("32 bits fit in an address")
}
