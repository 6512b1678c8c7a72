//! Opening a disk for serving, and the changes of its chain while it is served.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use super::chain_of;
use super::config::{ServeConfig, Source, WorkerConfig};
use super::pending::PendingFile;
use super::worker::WorkerError;
use crate::descriptor::Guid;
use crate::folder::{Backup, BackupReport, Folder, FolderError, NewSnapshot, OpenOptions, Opener};
use crate::format::Format;
use crate::{
    Access, BitmapChange, ChainDisk, DirectFile, Disk, DiskError, HostFile, OpenImage, PendingLog,
    Storage, Unclosed, format,
};

/// What a refusal comes to: a message and an exit status.
pub(super) type Refusal = (String, u8);

/// How this server opens files and images.
pub(super) fn options(config: &WorkerConfig, pending: &Arc<PendingFile>) -> OpenOptions {
    let serve = &config.serve;
    let access = match serve.read_only {
        true => Access::ReadOnly,
        false => Access::ReadWrite,
    };
    let log: Arc<dyn PendingLog> = Arc::clone(pending) as _;
    OpenOptions {
        // The last worker did not close it: what it changed is in the log of pending changes.
        unclosed: match config.restarted || serve.recover {
            true => Unclosed::Recover,
            false => Unclosed::Refuse,
        },
        opener: opener(serve.direct_io),
        pending: (access == Access::ReadWrite).then_some(log),
        ..OpenOptions::new(access)
    }
}

fn opener(direct_io: bool) -> Arc<Opener> {
    Arc::new(move |path: &Path, access| {
        let cached = HostFile::open(path, access)?;
        let storage: Box<dyn Storage> = match direct_io {
            true => Box::new(DirectFile::of(cached, access)),
            false => Box::new(cached),
        };
        Ok(storage)
    })
}

/// Opens the disk.
pub(super) fn open(
    config: &ServeConfig,
    options: &OpenOptions,
) -> Result<Arc<dyn Disk>, WorkerError> {
    match &config.source {
        Source::File {
            path,
            cluster_bytes,
        } => {
            let name = path.display().to_string();
            let storage = (options.opener)(path, options.access)
                .map_err(|error| DiskError::io(&name, "open", 0, error))?;
            let format = Format::detect(&*storage)?;
            let how = OpenImage {
                access: options.access,
                unclosed: options.unclosed,
                raw_cluster_bytes: *cluster_bytes,
                pending: options.pending.clone(),
            };
            let image = format::open(storage, format, &how)?;
            Ok(Arc::new(ChainDisk::new(vec![image])?))
        }
        Source::Descriptor { path, snapshot } => {
            let folder = Folder::view(path)?;
            let snapshot = snapshot.as_deref().map(parse_guid).transpose();
            let options = OpenOptions {
                snapshot: snapshot.map_err(|(message, _)| WorkerError::Config(message))?,
                ..options.clone()
            };
            let opened = folder.open_disk(&options)?;
            for note in opened.notes {
                eprintln!("{note}");
            }
            Ok(Arc::new(opened.disk))
        }
    }
}

fn parse_guid(text: &str) -> Result<Guid, Refusal> {
    text.parse()
        .map_err(|error: crate::descriptor::GuidError| (error.to_string(), 38))
}

fn refused(error: FolderError) -> Refusal {
    (chain_of(&error), error.exit_code())
}

/// The descriptor of a served disk, held against other commands.
pub(super) fn folder(config: &ServeConfig) -> Result<Folder, Refusal> {
    match &config.source {
        Source::Descriptor {
            path,
            snapshot: None,
        } => Folder::open(path).map_err(refused),
        Source::Descriptor { .. } => Err(("it is a snapshot, which does not change".into(), 38)),
        Source::File { path, .. } => {
            let path = path.display();
            Err((format!("{path} has no descriptor, which this needs"), 38))
        }
    }
}

/// Enlarges the disk.
pub(super) fn grow(
    config: &ServeConfig,
    disk: &dyn Disk,
    options: &OpenOptions,
    size_bytes: u64,
) -> Result<(), Refusal> {
    match &config.source {
        Source::Descriptor { .. } => folder(config)?
            .grow(size_bytes, Some(disk), options)
            .map(drop)
            .map_err(refused),
        Source::File { .. } => disk
            .grow(size_bytes)
            .map_err(|error| (chain_of(&error), error.exit_code())),
    }
}

/// Puts a new top on the chain.
pub(super) fn snapshot(
    config: &ServeConfig,
    disk: &dyn Disk,
    options: &OpenOptions,
    id: Option<&str>,
) -> Result<String, Refusal> {
    let id = match id {
        Some(text) => parse_guid(text)?,
        None => Guid::random().map_err(|error| (error.to_string(), 6))?,
    };
    let new = NewSnapshot {
        id,
        running: Some(disk),
        bitmap: BitmapChange::Keep,
        temporary: None,
    };
    folder(config)?.snapshot(new, options).map_err(refused)?;
    Ok(id.to_string())
}

/// Takes a snapshot off the chain, merging it into its child where it has one.
pub(super) fn delete(
    config: &ServeConfig,
    disk: &dyn Disk,
    options: &OpenOptions,
    id: &str,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), Refusal> {
    let id = parse_guid(id)?;
    let mut folder = folder(config)?;
    folder
        .delete(id, Some(disk), options, progress)
        .map_err(refused)
}

/// Writes a backup of the disk as it is at one moment.
pub(super) fn backup(
    config: &ServeConfig,
    disk: &dyn Disk,
    options: &OpenOptions,
    kind: Backup,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<BackupReport, Refusal> {
    folder(config)?
        .backup(kind, Some(disk), options, out, progress)
        .map_err(refused)
}

/// Merges a delta into its parent; None is the top.
pub(super) fn merge(
    config: &ServeConfig,
    disk: &dyn Disk,
    options: &OpenOptions,
    id: Option<&str>,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), Refusal> {
    let id = id.map(parse_guid).transpose()?;
    let mut folder = folder(config)?;
    folder
        .merge(id, Some(disk), options, progress)
        .map_err(refused)
}
