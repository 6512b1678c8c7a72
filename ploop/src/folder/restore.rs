//! From backups to a disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::convert::fill;
use super::images::unopened;
use super::{Folder, FolderError, NewDisk, OnProgress, create};
use crate::bitmap::DirtyBitmap;
use crate::descriptor::Guid;
use crate::format::expanded::{ExpandedImage, Unclosed};
use crate::storage::{Access, HostFile};
use crate::{ChainDisk, Disk, DiskError, Image};

/// A backup that was opened.
struct Layer {
    image: Arc<ExpandedImage>,
    next: Guid,
    since: Option<Guid>,
}

/// Makes a disk in `dir` of a full backup and the incremental ones that followed it, in their order.
/// Its next incremental backup follows the last of them.
///
/// # Errors
/// A file is no backup, is damaged or does not follow the one before it; there is a disk in `dir`
/// already; it was called off, or the host refused. Then there is no disk.
pub fn restore_backup(
    backups: &[PathBuf],
    dir: &Path,
    progress: OnProgress<'_>,
) -> Result<Folder, FolderError> {
    let layers: Vec<Layer> = backups
        .iter()
        .map(|path| open(path))
        .collect::<Result<_, _>>()?;
    must_follow(&layers)?;
    let Some(last) = layers.last() else {
        return Err(FolderError::refused(dir, "no backup was named"));
    };
    let bitmap = DirtyBitmap::new(
        last.next.bytes(),
        last.image.size_bytes(),
        super::backup::GRANULARITY,
    );
    let images = layers
        .iter()
        .map(|layer| Arc::clone(&layer.image) as Arc<dyn Image>);
    let source = ChainDisk::new(images.collect())?;
    let new = NewDisk {
        cluster_bytes: source.cluster_bytes(),
        ..NewDisk::new(source.size_bytes())
    };
    let is_new_dir = !dir.exists();
    let made = create(dir, &new)?;
    match fill(&made, &source, Some(bitmap), progress) {
        Ok(_) => Ok(made),
        Err(error) => {
            made.take_back(is_new_dir);
            Err(error)
        }
    }
}

fn open(path: &Path) -> Result<Layer, FolderError> {
    let file = HostFile::open(path, Access::ReadOnly).map_err(|error| unopened(path, error))?;
    let image = ExpandedImage::open(Box::new(file), Access::ReadOnly, Unclosed::Refuse)?;
    let ids = image.bitmap_ids()?;
    let mut names = ids.into_iter().map(Guid::from_bytes);
    match names.next() {
        Some(next) => Ok(Layer {
            image: Arc::new(image),
            next,
            since: names.next(),
        }),
        None => Err(FolderError::refused(
            path,
            "it is no backup, or was cut off",
        )),
    }
}

fn must_follow(layers: &[Layer]) -> Result<(), FolderError> {
    let mut before: Option<&Layer> = None;
    for layer in layers {
        let what = match (before, layer.since) {
            (None, None) => None,
            (None, Some(_)) => Some("it is incremental: begin with the full backup".to_owned()),
            (Some(_), None) => Some("it is a full backup: begin with it".to_owned()),
            (Some(before), Some(since)) if since != before.next => {
                Some(format!("it does not follow {}", before.image.name()))
            }
            (Some(before), Some(_)) if before.image.size_bytes() > layer.image.size_bytes() => {
                Some(format!(
                    "its disk is smaller than that of {}",
                    before.image.name()
                ))
            }
            _ => None,
        };
        if let Some(what) = what {
            return Err(DiskError::refused(layer.image.name(), what).into());
        }
        before = Some(layer);
    }
    Ok(())
}
