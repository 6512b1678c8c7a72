//! Opening a disk for serving, and the changes of its chain while it is served.

use std::sync::Arc;

use super::config::{ServeConfig, Source, WorkerConfig};
use super::state::State;
use super::worker::WorkerError;
use crate::{Access, ChainDisk, DirectFile, Disk, DiskError, HostFile, Image, RawImage, Storage};

/// Opens the disk.
pub(super) fn open(config: &WorkerConfig, _state: &State) -> Result<Arc<dyn Disk>, WorkerError> {
    match &config.serve.source {
        Source::Raw {
            path,
            cluster_bytes,
        } => {
            let storage = storage(&config.serve, path)?;
            let image = RawImage::open(storage, access(&config.serve), *cluster_bytes)?;
            let layers: Vec<Arc<dyn Image>> = vec![Arc::new(image)];
            Ok(Arc::new(ChainDisk::new(layers)?))
        }
        Source::Descriptor { .. } => Err(WorkerError::Open("descriptor".to_owned())),
    }
}

fn access(config: &ServeConfig) -> Access {
    match config.read_only {
        true => Access::ReadOnly,
        false => Access::ReadWrite,
    }
}

fn storage(config: &ServeConfig, path: &std::path::Path) -> Result<Box<dyn Storage>, DiskError> {
    let access = access(config);
    let cached = HostFile::open(path, access)
        .map_err(|error| DiskError::io(&path.display().to_string(), "open", 0, error))?;
    Ok(match config.direct_io {
        true => Box::new(DirectFile::of(cached, access)),
        false => Box::new(cached),
    })
}

/// Enlarges the disk.
pub(super) fn grow(
    _config: &WorkerConfig,
    disk: &dyn Disk,
    size_bytes: u64,
) -> Result<(), (String, u8)> {
    disk.grow(size_bytes)
        .map_err(|error| (super::chain_of(&error), error.exit_code()))
}

/// Puts a new top on the chain.
pub(super) fn snapshot(
    config: &WorkerConfig,
    _disk: &dyn Disk,
    _id: Option<&str>,
) -> Result<String, (String, u8)> {
    let what = format!(
        "{} is a single file; snapshots need a descriptor",
        config.serve.source.path().display()
    );
    Err((what, 38))
}
