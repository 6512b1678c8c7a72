//! What a dump did.

use std::path::Path;
use std::time::Duration;

use firn_images::{ImageKind, ImageWriteError, write_single};
use firn_proto::{DumpStatsEntry, StatsEntry};

use crate::memory::PageStats;

/// Result of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpReport {
    /// Processes, zombies included.
    pub tasks: usize,
    /// Threads of the living ones.
    pub threads: usize,
    /// Pages written, shared memory included.
    pub pages: u64,
    /// Pages that are as the previous images have them, and left to those.
    pub pages_in_parent: u64,
    /// Those written, in bytes.
    pub bytes: u64,
    /// From the first stopped thread until all were let go.
    pub frozen: Duration,
    /// Part of it: until all had stopped.
    pub freezing: Duration,
    /// Part of it: finding, reading and writing pages.
    pub memory_time: Duration,
    /// Bringing the images to disk.
    pub write_time: Duration,
    /// All of the dump.
    pub total: Duration,
    /// Sentences about what a restore will not bring back.
    pub warnings: Vec<String>,
}

impl DumpReport {
    /// Part of the frozen time: from when all had stopped until all were let go. This is what CRIU's
    /// statistics call frozen time, beside the freezing time, which is not part of it.
    pub fn stood_still(&self) -> Duration {
        self.frozen.saturating_sub(self.freezing)
    }

    /// Writes stats-dump into the work directory.
    pub(super) fn write_stats(
        &self,
        work_dir: &Path,
        pages: &PageStats,
        shared: &PageStats,
    ) -> Result<(), ImageWriteError> {
        let dump = DumpStatsEntry {
            freezing_time: micros(self.freezing),
            frozen_time: micros(self.stood_still()),
            memdump_time: micros(self.memory_time),
            memwrite_time: micros(self.write_time),
            pages_scanned: pages.scanned,
            pages_skipped_parent: pages.in_parent,
            pages_written: pages.written,
            irmap_resolve: Some(0),
            pages_lazy: 0,
            page_pipes: None,
            page_pipe_bufs: None,
            shpages_scanned: Some(shared.scanned),
            shpages_skipped_parent: Some(shared.in_parent),
            shpages_written: Some(shared.written),
        };
        let stats = StatsEntry {
            dump: Some(dump),
            restore: None,
        };
        write_single(work_dir, ImageKind::StatsDump, &stats)
    }
}

pub(crate) fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}
