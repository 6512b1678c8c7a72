//! A dump that builds upon an earlier one of the same tree, and the tracking of writes for the next.

use std::collections::HashMap;
use std::sync::Arc;

use firn_images::{ImageDir, ImageSetWriter};
use firn_sys::{Pid, probe};

use super::{DumpError, DumpOptions, Leave};
use crate::files::FileTable;
use crate::memory::{self, AddressRange, AddressSpace, Tracker, Trackers};
use crate::tree::Tree;

/// What is known of an earlier dump.
pub(super) struct Increment {
    trackers: Arc<dyn Trackers>,
    /// What has kept track since some dump.
    tracker: Option<Tracker>,
    /// The images of that dump, where they are the previous ones.
    parent: Option<ImageDir>,
    tracks_on: bool,
}

/// Memory to be tracked from now on, by task.
pub(super) type Trackable = HashMap<Pid, Vec<AddressRange>>;

impl Increment {
    /// Looks for the tracker and makes the new images an increment to the previous ones, where there are any.
    pub(super) fn begin(
        options: &DumpOptions,
        images: &ImageSetWriter,
        warnings: &mut Vec<String>,
    ) -> Result<Increment, DumpError> {
        let tracks_on = options.track_mem && options.leave != Leave::Killed;
        if tracks_on {
            probe::write_tracking().map_err(DumpError::NoTracking)?;
        } else if options.track_mem {
            warnings.push("no memory is tracked: the tasks are killed".to_owned());
        }
        let tracker = options.trackers.find(options.pid);
        let mut parent = None;
        if let Some(path) = &options.prev_images_dir {
            let dir = images.set_parent(path)?;
            let since = tracker.as_ref().map(|tracker| tracker.since.as_str());
            let made_by = dir
                .inventory()
                .ok()
                .and_then(|inventory| inventory.dump_criu_run_id);
            match since {
                Some(since) if made_by.as_deref() == Some(since) => parent = Some(dir),
                _ => warnings.push(
                    "all memory is dumped: nothing has tracked which pages changed since the \
                     previous images"
                        .to_owned(),
                ),
            }
        }
        Ok(Increment {
            trackers: options.trackers.clone(),
            tracker,
            parent,
            tracks_on,
        })
    }

    /// Whether writes to the memory of a task are tracked, by us.
    pub(super) fn is_tracked(&self, pid: Pid) -> bool {
        self.tracker
            .as_ref()
            .is_some_and(|tracker| tracker.knows(pid))
    }

    /// The images that have what the task has not written to since.
    pub(super) fn parent_of(&self, pid: Pid) -> Option<&ImageDir> {
        self.parent.as_ref().filter(|_| self.is_tracked(pid))
    }

    /// What is to be tracked, if anything.
    pub(super) fn trackable(&self, spaces: &[AddressSpace], files: &FileTable) -> Trackable {
        if !self.tracks_on {
            return Trackable::new();
        }
        let spaces = spaces.iter();
        let spaces = spaces.filter(|space| !files.has_ring(space.pid()));
        spaces
            .map(|space| (space.pid(), space.trackable()))
            .collect()
    }

    /// Tracks writes from now on, instead of what was tracked before; `since` is this dump.
    ///
    /// **Preconditions**: the tree stands still, and its memory was saved.
    pub(super) fn arm(
        &mut self,
        tree: &Tree,
        trackable: &Trackable,
        since: &str,
    ) -> Result<Option<Tracker>, DumpError> {
        if !self.tracks_on {
            return Ok(None);
        }
        // What was written to since the earlier dump is forgotten now: nobody may build upon that any more.
        let root = tree.root().pid;
        let forgotten = self.trackers.forget(root);
        forgotten.map_err(|source| DumpError::Tracker { root, source })?;
        let old = self.tracker.take();
        Ok(Some(memory::arm(tree, trackable, old, since.to_owned())?))
    }

    /// Gives the tracker to who keeps it. A failure means that the next dump is a full one.
    pub(super) fn keep(&self, tracker: Option<Tracker>, warnings: &mut Vec<String>) {
        let Some(tracker) = tracker else { return };
        if let Err(error) = self.trackers.keep(tracker) {
            warnings.push(format!("memory is not tracked: {error}"));
        }
    }
}
