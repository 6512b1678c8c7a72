//! Another arrangement for the same disk: raw, expanded, preallocated, another version or cluster.
//!
//! Every image is written anew beside the old one, and the descriptor changes over to all of them at
//! once: whatever is cut off leaves the old disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::images::{NewImage, make, unopened};
use super::{Folder, FolderError, OnProgress, OpenOptions};
use crate::bitmap::DirtyBitmap;
use crate::descriptor::{Guid, ImageEntry, ImageType};
use crate::extent::ExtentKind;
use crate::format::expanded::{DEFAULT_CLUSTER, Preallocation};
use crate::format::{self, Format, Image, OpenImage, Slot};
use crate::storage::{Access, HostFile};
use crate::{ChainDisk, Disk, DiskError};

/// What an image is made into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The format.
    pub format: Format,
    /// Whether all space is taken at once.
    pub preallocation: Preallocation,
    /// The cluster; None keeps it, where it can be kept.
    pub cluster_bytes: Option<u32>,
}

/// What converting came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversion {
    /// The images as they were and as they are.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Bytes that were written.
    pub copied_bytes: u64,
}

impl Folder {
    /// Writes all images of the disk anew. The disk is not running.
    ///
    /// # Errors
    /// The disk is open, a raw target has snapshots, an image belongs to another disk, or the host
    /// refused. The disk is as it was.
    pub fn convert(
        &mut self,
        target: Target,
        options: &OpenOptions,
        progress: OnProgress<'_>,
    ) -> Result<Conversion, FolderError> {
        self.must_be_mine()?;
        self.finish_interrupted(None, options)?;
        let images = self.descriptor().images.clone();
        if target.format == Format::Raw && images.len() > 1 {
            let what = "raw has no snapshots; merge them first, or write one state with --output";
            return Err(self.refused(what));
        }
        if let Some(image) = images.iter().find(|image| !self.owns(image)) {
            let what = format!("{} belongs to another disk", self.path_of(image).display());
            return Err(self.refused(what));
        }
        let top = self
            .descriptor()
            .image(Guid::TOP)
            .map_err(|source| self.wrong(source))?;
        let top = self.path_of(top);
        let seat = (options.opener)(&top, Access::ReadWrite).map_err(|e| unopened(&top, e))?;
        let cluster = target
            .cluster_bytes
            .unwrap_or_else(|| self.keepable_cluster());
        let mut next = self.descriptor().clone();
        next.blocksize_sectors = cluster / 512;
        next.preallocated = target.preallocation == Preallocation::Full;
        let mut done = Conversion {
            files: Vec::new(),
            copied_bytes: 0,
        };
        for (at, image) in images.iter().enumerate() {
            let steps = (at as u64, images.len() as u64);
            let converted = self.convert_image(image, target, cluster, options, &mut |now, all| {
                progress(steps.0 * all + now, steps.1 * all)
            });
            match converted {
                Ok((file, bytes)) => {
                    next.images[at].kind = match target.format {
                        Format::Raw => ImageType::Plain,
                        _ => ImageType::Compressed,
                    };
                    next.images[at].file.clone_from(&file);
                    done.files.push((image.file.clone(), file));
                    done.copied_bytes += bytes;
                }
                Err(error) => {
                    self.drop_files(&done);
                    return Err(error);
                }
            }
        }
        let size_bytes = next.size_bytes().next_multiple_of(cluster.into());
        next.size_sectors = size_bytes / 512;
        if let Err(error) = self.store(next) {
            self.abandon();
            self.drop_files(&done);
            return Err(error);
        }
        drop(seat);
        for image in &images {
            self.remove(image)?;
        }
        Ok(done)
    }

    fn keepable_cluster(&self) -> u32 {
        let cluster = self.descriptor().cluster_bytes();
        let range = format::expanded::CLUSTER_RANGE;
        match cluster.is_power_of_two() && range.contains(&cluster) {
            true => cluster,
            false => DEFAULT_CLUSTER,
        }
    }

    fn drop_files(&self, done: &Conversion) {
        for (_, new) in &done.files {
            // What is left is a file that nobody names; checking reports it.
            let _ = std::fs::remove_file(self.dir().join(new));
        }
    }

    fn convert_image(
        &self,
        entry: &ImageEntry,
        target: Target,
        cluster: u32,
        options: &OpenOptions,
        progress: OnProgress<'_>,
    ) -> Result<(PathBuf, u64), FolderError> {
        let chain = self
            .descriptor()
            .chain(entry.guid)
            .map_err(|source| self.wrong(source))?;
        let layers = self.read_only(&chain, options)?;
        let own = layers.last().cloned().map(|image| vec![image]);
        let source = ChainDisk::new(layers)?;
        let file = self.new_file()?;
        let path = self.dir().join(&file);
        let new = NewImage {
            format: target.format,
            size_bytes: source.size_bytes().next_multiple_of(cluster.into()),
            cluster_bytes: cluster,
            preallocation: target.preallocation,
        };
        make(&path, &new)?;
        let own = own.filter(|_| chain.len() > 1);
        let copied = reopen(&path, &new)
            .and_then(|image| copy(&source, own.as_deref(), image.as_ref(), progress));
        match copied {
            Ok(bytes) => Ok((file, bytes)),
            Err(error) => {
                let _ = std::fs::remove_file(&path);
                Err(error)
            }
        }
    }

    fn read_only(
        &self,
        chain: &[&ImageEntry],
        options: &OpenOptions,
    ) -> Result<Vec<Arc<dyn Image>>, FolderError> {
        let open = |entry: &&ImageEntry| self.open_entry(entry, Access::ReadOnly, options);
        chain.iter().map(open).collect()
    }

    /// Writes what two images hold together into a new one; what neither holds stays open.
    pub(super) fn flatten(
        &self,
        images: &[&ImageEntry],
        file: &Path,
        options: &OpenOptions,
        progress: OnProgress<'_>,
    ) -> Result<(), FolderError> {
        let layers = self.read_only(images, options)?;
        let source = ChainDisk::new(layers.clone())?;
        let is_base = self
            .descriptor()
            .base()
            .is_ok_and(|base| images.contains(&base));
        let new = NewImage {
            format: self.format_of(images[0])?,
            size_bytes: source.size_bytes(),
            cluster_bytes: source.cluster_bytes(),
            preallocation: Preallocation::None,
        };
        let path = self.dir().join(file);
        make(&path, &new)?;
        let image = reopen(&path, &new)?;
        let both = match is_base {
            true => None,
            false => Some(layers.as_slice()),
        };
        copy(&source, both, image.as_ref(), progress)?;
        Ok(())
    }
}

/// Writes a disk's contents into a new one, whose bitmap of changes begins as `bitmap`.
pub(super) fn fill(
    folder: &Folder,
    source: &dyn Disk,
    bitmap: Option<DirtyBitmap>,
    progress: OnProgress<'_>,
) -> Result<u64, FolderError> {
    let options = OpenOptions::new(Access::ReadWrite);
    let top = folder.descriptor().image(Guid::TOP);
    let top = top.map_err(|source| folder.wrong(source))?;
    let image = folder.open_entry(top, Access::ReadWrite, &options)?;
    if let Some(bitmap) = bitmap {
        image.keep_bitmap(bitmap);
    }
    copy(source, None, image.as_ref(), progress)
}

fn reopen(path: &Path, new: &NewImage) -> Result<Arc<dyn Image>, FolderError> {
    let file = HostFile::open(path, Access::ReadWrite).map_err(|error| unopened(path, error))?;
    let how = OpenImage {
        raw_cluster_bytes: new.cluster_bytes,
        ..OpenImage::plain(Access::ReadWrite)
    };
    Ok(format::open(Box::new(file), new.format, &how)?)
}

/// Writes one state of a disk into a file of its own, without a descriptor: for other programs.
///
/// # Errors
/// There is such a file, the source can't be read, it was called off, or the host refused; then there is
/// no file.
pub fn export(
    source: &dyn Disk,
    path: &Path,
    target: Target,
    progress: OnProgress<'_>,
) -> Result<u64, FolderError> {
    let cluster_bytes = target.cluster_bytes.unwrap_or(source.cluster_bytes());
    let new = NewImage {
        format: target.format,
        size_bytes: source.size_bytes().next_multiple_of(cluster_bytes.into()),
        cluster_bytes,
        preallocation: target.preallocation,
    };
    make(path, &new)?;
    let copied = reopen(path, &new).and_then(|image| copy(source, None, image.as_ref(), progress));
    if copied.is_err() {
        let _ = std::fs::remove_file(path);
    }
    copied
}

/// Copies a disk into an empty image and closes it. With `own` only what these images hold is
/// taken, zeroes included; without, zeroes are left out.
fn copy(
    source: &dyn Disk,
    own: Option<&[Arc<dyn Image>]>,
    target: &dyn Image,
    progress: OnProgress<'_>,
) -> Result<u64, FolderError> {
    let unit = u64::from(target.cluster_bytes());
    let size = source.size_bytes();
    let clusters = u32::try_from(size.div_ceil(unit)).unwrap_or(u32::MAX);
    let mut buf = vec![0; usize::try_from(unit).unwrap_or_default()];
    let mut bytes = 0;
    for cluster in 0..clusters {
        if !progress(cluster.into(), clusters.into()) {
            return Err(cancelled(target).into());
        }
        let start = u64::from(cluster) * unit;
        let len = unit.min(size - start);
        let wanted = match own {
            Some(images) => holds(images, start, len)?,
            None => {
                let extents = source.map(start, len)?;
                extents.iter().any(|extent| extent.kind == ExtentKind::Data)
            }
        };
        if !wanted {
            continue;
        }
        let inside = &mut buf[..usize::try_from(len).unwrap_or_default()];
        source.read_at(inside, start)?;
        if own.is_none() && inside.iter().all(|byte| *byte == 0) {
            continue;
        }
        match target.slot(cluster)? {
            Slot::Data => target.overwrite(cluster, 0, inside)?,
            _ => target.store(cluster, 0, inside)?,
        }
        bytes += len;
    }
    target.close()?;
    Ok(bytes)
}

/// Whether any of the images knows anything of a range.
fn holds(images: &[Arc<dyn Image>], start: u64, len: u64) -> Result<bool, DiskError> {
    for image in images {
        let unit = u64::from(image.cluster_bytes());
        for cluster in start / unit..(start + len).div_ceil(unit) {
            let cluster = u32::try_from(cluster).unwrap_or(u32::MAX);
            if image.slot(cluster)? != Slot::Absent {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn cancelled(image: &dyn Image) -> DiskError {
    DiskError::Cancelled {
        object: image.name().to_owned(),
    }
}
