//! What a restore did.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use firn_images::{ImageKind, ImageWriteError, write_single};
use firn_proto::{RestoreStatsEntry, StatsEntry};
use firn_sys::wait::Status;
use firn_sys::{Errno, Pid, wait};

use crate::dump::micros;

/// Result of a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreReport {
    /// The root task.
    pub pid: Pid,
    /// Processes, zombies included.
    pub tasks: usize,
    /// Threads of the living ones.
    pub threads: usize,
    /// Pages read from the images.
    pub pages: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Pages of children compared with their parents'.
    pub pages_compared: u64,
    /// Pages that children share with their parents again.
    pub pages_shared: u64,
    /// From the first task until all were complete.
    pub fork_time: Duration,
    /// All of the restore.
    pub total: Duration,
    /// Sentences about what is not as it was.
    pub warnings: Vec<String>,
}

impl RestoreReport {
    /// Waits until the root task ends, as its parent.
    ///
    /// # Errors
    /// ECHILD: the tree was restored as a sibling, so it is not this process's child.
    pub fn wait(&mut self) -> Result<ExitStatus, Errno> {
        loop {
            if let Status::Ended(status) = wait::wait(self.pid)? {
                return Ok(ExitStatus::from_raw(status));
            }
        }
    }

    /// Writes stats-restore into the work directory.
    pub(super) fn write_stats(&self, work_dir: &Path) -> Result<(), ImageWriteError> {
        let restore = RestoreStatsEntry {
            pages_compared: self.pages_compared,
            pages_skipped_cow: self.pages_shared,
            forking_time: micros(self.fork_time),
            restore_time: micros(self.total),
            pages_restored: Some(self.pages),
        };
        let stats = StatsEntry {
            dump: None,
            restore: Some(restore),
        };
        write_single(work_dir, ImageKind::StatsRestore, &stats)
    }
}
