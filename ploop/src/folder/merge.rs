//! Deleting snapshots, by merging their only child into them.
//!
//! While a merge runs, a file beside the descriptor names the snapshot: its image holds something in
//! between, which only the child on it makes whole. The next command that changes the disk finishes
//! what was cut off.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Folder, FolderError, OnProgress, OpenOptions, sync_dir};
use crate::descriptor::{Descriptor, Guid, ImageEntry, Shot, Temporary};
use crate::disk::{Disk, Merge};
use crate::format::expanded::Unclosed;
use crate::storage::Access;
use crate::{ChainDisk, DiskError};

/// A merge that was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Begun {
    /// The snapshot that goes.
    pub id: Guid,
    /// File of its child, which goes after.
    upper: PathBuf,
    /// Nobody served the disk, and it had been closed: a top that is found open was opened for the
    /// merge, and nothing but the merge was done to it.
    pub was_closed: bool,
}

/// The line of the file that says so.
const WAS_CLOSED: &str = "was closed";

impl Folder {
    fn merge_file(&self) -> PathBuf {
        self.beside(".merge")
    }

    /// The merge that was begun and not finished, if there is one.
    pub(super) fn interrupted(&self) -> Result<Option<Begun>, FolderError> {
        let path = self.merge_file();
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(FolderError::host(&path, "read"))?,
        };
        let mut lines = text.lines();
        let mut line = || lines.next().unwrap_or_default();
        let (id, upper, was_closed) = (line(), PathBuf::from(line()), line() == WAS_CLOSED);
        // It is written in one piece before anything changes: a torn one belongs to no change.
        Ok(id.parse().ok().map(|id| Begun {
            id,
            upper,
            was_closed,
        }))
    }

    fn begin(&self, begun: &Begun) -> Result<(), FolderError> {
        let path = self.merge_file();
        let mut text = format!("{}\n{}\n", begun.id, begun.upper.display());
        if begun.was_closed {
            text += WAS_CLOSED;
            text.push('\n');
        }
        // One of a merge that goes on must not be torn.
        let new = self.beside(".merge.new");
        let file = std::fs::File::create(&new).and_then(|mut file| {
            std::io::Write::write_all(&mut file, text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&new, &path)
        });
        file.and_then(|()| sync_dir(self.dir()))
            .map_err(FolderError::host(&path, "written"))
    }

    fn end(&self) -> Result<(), FolderError> {
        let path = self.merge_file();
        std::fs::remove_file(&path).map_err(FolderError::host(&path, "removed"))
    }

    /// Finishes a merge that was cut off.
    ///
    /// # Errors
    /// As [`Folder::delete`].
    pub fn finish_interrupted(
        &mut self,
        running: Option<&dyn Disk>,
        options: &OpenOptions,
    ) -> Result<(), FolderError> {
        let Some(begun) = self.interrupted()? else {
            return self.drop_temporary(running, options);
        };
        if self.descriptor().shot(begun.id).is_ok() {
            return self.merge_child(begun.id, running, options, &mut |_, _| true);
        }
        // The descriptor counts already. The file may be left, and the new top may not be closed.
        let named = self
            .descriptor()
            .images
            .iter()
            .any(|i| i.file == begun.upper);
        let path = self.dir().join(&begun.upper);
        if !named && path.parent() == Some(self.dir()) && path.exists() {
            std::fs::remove_file(&path).map_err(FolderError::host(&path, "removed"))?;
        }
        if running.is_none() && begun.was_closed {
            self.open_disk(&writing(options))?.disk.close()?;
        }
        self.end()
    }

    /// Deletes the snapshot that a backup left which was killed.
    fn drop_temporary(
        &mut self,
        running: Option<&dyn Disk>,
        options: &OpenOptions,
    ) -> Result<(), FolderError> {
        let is_leftover = |shot: &&Shot| {
            let children = self.descriptor().children(shot.guid);
            shot.temporary == Some(Temporary::Snapshot) && children.len() == 1
        };
        let leftover = self.descriptor().shots.iter().find(is_leftover);
        match leftover.map(|shot| shot.guid) {
            Some(id) => self.merge_child(id, running, options, &mut |_, _| true),
            None => Ok(()),
        }
    }

    /// Deletes a snapshot: one without children goes, one with a single child takes the child's changes
    /// in. May be interrupted at any byte, and called again.
    ///
    /// # Errors
    /// There is no such snapshot, it has several children, its image belongs to another disk, the disk
    /// is open elsewhere, `progress` called it off, or the host refused. The disk holds what it held.
    pub fn delete(
        &mut self,
        id: Guid,
        running: Option<&dyn Disk>,
        options: &OpenOptions,
        progress: OnProgress<'_>,
    ) -> Result<(), FolderError> {
        self.must_be_mine()?;
        let was_begun = self.interrupted()?.is_some_and(|begun| begun.id == id);
        let was_there = self.descriptor().shot(id).is_ok();
        self.finish_interrupted(running, options)?;
        if was_begun || was_there && self.descriptor().shot(id).is_err() {
            return Ok(());
        }
        if id == Guid::TOP {
            return Err(self.refused("the top is what the disk holds now, not a snapshot"));
        }
        self.descriptor()
            .shot(id)
            .map_err(|source| self.wrong(source))?;
        match self.descriptor().children(id).len() {
            0 => {
                let mut next = self.descriptor().clone();
                let image = next.remove_leaf(id).map_err(|source| self.wrong(source))?;
                self.store(next)?;
                self.remove(&image)
            }
            1 => self.merge_child(id, running, options, progress),
            count => Err(self.refused(format!(
                "snapshot {id} has {count} children; delete all but one of them first"
            ))),
        }
    }

    /// Merges a snapshot, or the top where it is none, into the one that it descends from.
    ///
    /// # Errors
    /// As [`Folder::delete`]; also when there is nothing to merge into.
    pub fn merge(
        &mut self,
        id: Option<Guid>,
        running: Option<&dyn Disk>,
        options: &OpenOptions,
        progress: OnProgress<'_>,
    ) -> Result<(), FolderError> {
        let child = id.unwrap_or(Guid::TOP);
        let shot = self
            .descriptor()
            .shot(child)
            .map_err(|source| self.wrong(source))?;
        let parent = shot.parent;
        if parent == Guid::NIL {
            return Err(self.refused(format!(
                "{child} is the base: there is nothing to merge it into"
            )));
        }
        self.delete(parent, running, options, progress)
    }

    fn merge_child(
        &mut self,
        id: Guid,
        running: Option<&dyn Disk>,
        options: &OpenOptions,
        progress: OnProgress<'_>,
    ) -> Result<(), FolderError> {
        let wrong = |source| self.wrong(source);
        let child = self.descriptor().only_child(id).map_err(wrong)?;
        let lower = self.descriptor().image(id).map_err(wrong)?.clone();
        let upper = self.descriptor().image(child).map_err(wrong)?.clone();
        for image in [&lower, &upper] {
            if !self.owns(image) {
                let what = format!("{} belongs to another disk", self.path_of(image).display());
                return Err(self.refused(what));
            }
        }
        let mut next = self.descriptor().clone();
        next.merged(id).map_err(wrong)?;
        let earlier = self.interrupted()?;
        let mut was_closed = running.is_none() && child == Guid::TOP;
        if was_closed && !earlier.as_ref().is_some_and(|it| it.was_closed) {
            let top = self.open_entry(&upper, Access::ReadOnly, options)?;
            was_closed = top.was_closed();
        }
        self.prepare(&next)?;
        // Before anything is opened for it: a mark of use that is left belongs to a merge then.
        self.begin(&Begun {
            id,
            upper: upper.file.clone(),
            was_closed,
        })?;
        let mut pair = Pair {
            child,
            lower: &lower,
            upper: &upper,
            resumed: earlier.is_some(),
            has_begun: earlier.is_some(),
        };
        let merged = self.merge_pair(&mut pair, running, options, progress);
        if let Err(error) = merged {
            self.abandon();
            if !pair.has_begun {
                // The error that counts is the first one.
                let _ = self.end();
            }
            return Err(error);
        }
        self.descriptor = next;
        self.remove(&upper)?;
        self.end()
    }

    fn merge_pair(
        &self,
        pair: &mut Pair<'_>,
        running: Option<&dyn Disk>,
        options: &OpenOptions,
        progress: OnProgress<'_>,
    ) -> Result<(), FolderError> {
        let names = [pair.lower, pair.upper].map(|image| self.path_of(image).display().to_string());
        let level_in = |disk: &dyn Disk| {
            let layers = disk.layers();
            let level = layers.windows(2).position(|two| two == names);
            level.map(|below| below + 1)
        };
        if let Some((disk, level)) = running.and_then(|disk| Some((disk, level_in(disk)?))) {
            return self.merge_in(disk, level, pair, options, progress);
        }
        // The top is opened with everything that belongs to it: its mark, its bitmap. Another pair needs
        // nothing but itself.
        let disk = match pair.child == Guid::TOP {
            true => self.open_disk(options)?.disk,
            false => {
                let open = |image| self.open_entry(image, Access::ReadOnly, options);
                ChainDisk::new(vec![open(pair.lower)?, open(pair.upper)?])?
            }
        };
        let level = level_in(&disk).unwrap_or(1);
        let merged = self.merge_in(&disk, level, pair, options, progress);
        let closed = disk.close();
        merged?;
        Ok(closed?)
    }

    fn merge_in(
        &self,
        disk: &dyn Disk,
        level: usize,
        pair: &mut Pair<'_>,
        options: &OpenOptions,
        progress: OnProgress<'_>,
    ) -> Result<(), FolderError> {
        let options = OpenOptions {
            pending: None,
            unclosed: match pair.resumed {
                true => Unclosed::Recover,
                false => options.unclosed,
            },
            ..options.clone()
        };
        let lower = self.open_entry(pair.lower, Access::ReadWrite, &options)?;
        pair.has_begun = true;
        let name = self.xml().display().to_string();
        let merge = Merge {
            lower: Arc::clone(&lower),
            progress,
            commit: &mut || {
                self.commit()
                    .map_err(|error| DiskError::io(&name, "rename", 0, error))
            },
        };
        let merged = disk.merge_down(level, merge);
        if merged.is_err() {
            // The error that counts is the first one.
            let _ = lower.close();
        }
        Ok(merged?)
    }

    /// Merges like [`Folder::merge`], offline, into a new file of this name: the two old files are only
    /// read, and go at the end.
    ///
    /// # Errors
    /// As `merge`; also when there is such a file.
    pub fn merge_into_new(
        &mut self,
        id: Option<Guid>,
        file: PathBuf,
        options: &OpenOptions,
        progress: OnProgress<'_>,
    ) -> Result<(), FolderError> {
        self.must_be_mine()?;
        self.finish_interrupted(None, options)?;
        let wrong = |source| self.wrong(source);
        let child = id.unwrap_or(Guid::TOP);
        let parent = self.descriptor().shot(child).map_err(wrong)?.parent;
        if parent == Guid::NIL {
            return Err(self.refused(format!(
                "{child} is the base: there is nothing to merge it into"
            )));
        }
        let mut next: Descriptor = self.descriptor().clone();
        next.merged(parent).map_err(wrong)?;
        let lower = self.descriptor().image(parent).map_err(wrong)?.clone();
        let upper = self.descriptor().image(child).map_err(wrong)?.clone();
        for image in next.images.iter_mut().filter(|image| image.guid == child) {
            image.file.clone_from(&file);
        }
        let images = [&lower, &upper];
        let made = self
            .flatten(&images, &file, options, progress)
            .and_then(|()| self.store(next));
        if let Err(error) = made {
            self.abandon();
            let _ = std::fs::remove_file(self.dir().join(&file));
            return Err(error);
        }
        self.remove(&lower)?;
        self.remove(&upper)
    }
}

struct Pair<'a> {
    child: Guid,
    lower: &'a ImageEntry,
    upper: &'a ImageEntry,
    /// A merge that was cut off goes on.
    resumed: bool,
    /// The lower image may hold something in between.
    has_begun: bool,
}

/// The same options, for a disk that is written.
fn writing(options: &OpenOptions) -> OpenOptions {
    OpenOptions {
        access: Access::ReadWrite,
        snapshot: None,
        ..options.clone()
    }
}
