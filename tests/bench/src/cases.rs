//! The cases, and the ratios that each one aims at.

use clap::ValueEnum;
use serde::Serialize;

use crate::kernel;
use crate::workload::{
    DESCRIPTORS, FILES, LARGE_TREE, MAPPINGS, PIPES, PROCESSES, SHARED, THREADS, Workload,
};

/// Name of our own rows.
pub const FIRN: &str = "firn";
/// Name of the peer's rows.
pub const CRIU: &str = "criu";
/// Name of the peer's rows when it finds its kernel cache.
pub const CRIU_CACHED: &str = "criu cached";
/// Name of our rows with a quarter of the case's objects.
pub const QUARTER: &str = "firn, 1/4";
/// What four times as many objects may cost: linear time, and half as much again for caches that overflow.
const LINEAR: f64 = 6.0;
/// Name of the rows that the bare loops fill.
pub const FLOOR: &str = "floor";

/// One case, by the letter used on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
pub enum Case {
    /// An idle process.
    A,
    /// Random anonymous memory.
    B,
    /// A tree of processes.
    C,
    /// Many threads.
    D,
    /// Many files and pipes.
    E,
    /// As many descriptors as one process may have.
    F,
    /// Many processes with the same open files.
    G,
    /// As many mappings as one process may have.
    H,
    /// A large tree of processes.
    I,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Wall time of the dump command, in ms.
    Dump,
    /// Frozen time as the engine's stats-dump says, in ms.
    Frozen,
    /// Longest pause that a spinning task saw during a dump that left it running, in ms.
    Pause,
    /// Wall time of the restore command, in ms.
    Restore,
    /// Larger peak resident size of the two commands, in MiB.
    PeakRss,
}

/// A ratio of medians that firn must not exceed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Aim {
    /// Of what.
    pub metric: Metric,
    /// Against whose median of the same metric.
    pub against: &'static str,
    /// The largest good ratio.
    pub at_most: f64,
}

impl Metric {
    /// All, in the order of the columns.
    pub const ALL: [Self; 5] = [
        Self::Dump,
        Self::Frozen,
        Self::Pause,
        Self::Restore,
        Self::PeakRss,
    ];

    /// Column title.
    pub fn title(self) -> &'static str {
        match self {
            Self::Dump => "dump ms",
            Self::Frozen => "frozen ms",
            Self::Pause => "pause ms",
            Self::Restore => "restore ms",
            Self::PeakRss => "peak MiB",
        }
    }
}

impl Case {
    /// The process that is dumped.
    pub fn workload(self) -> Workload {
        match self {
            Self::A => Workload::Idle,
            Self::B => Workload::Memory,
            Self::C | Self::I => Workload::Tree,
            Self::D => Workload::Threads,
            Self::E | Self::F => Workload::Files,
            Self::G => Workload::Shared,
            Self::H => Workload::Mappings,
        }
    }

    /// Number of objects that the workload is made of: MiB, processes, threads, descriptors or mappings.
    pub fn size(self, memory_mib: usize) -> usize {
        // What a process of its own has besides.
        const OTHERS: usize = 100;
        match self {
            Self::A => 1,
            Self::B => memory_mib,
            Self::C => PROCESSES,
            Self::D => THREADS,
            Self::E => FILES + 2 * PIPES,
            Self::F => {
                let limit = kernel::descriptor_limit().unwrap_or(DESCRIPTORS);
                DESCRIPTORS.min(limit.saturating_sub(OTHERS))
            }
            Self::G => SHARED,
            Self::H => {
                let text = std::fs::read_to_string("/proc/sys/vm/max_map_count");
                let limit = text.ok().and_then(|text| text.trim().parse().ok());
                MAPPINGS.min(limit.unwrap_or(usize::MAX).saturating_sub(OTHERS))
            }
            Self::I => LARGE_TREE,
        }
    }

    /// Whether a quarter of the objects is measured, too, to see that time grows as they do.
    pub fn is_scaled(self) -> bool {
        matches!(self, Self::F | Self::G | Self::H | Self::I)
    }

    /// One line that says what the case is.
    pub fn title(self, memory_mib: usize) -> String {
        let size = self.size(memory_mib);
        match self {
            Self::A => "(a) an idle process".to_owned(),
            Self::B => format!("(b) {memory_mib} MiB of touched random anonymous memory"),
            Self::C => format!("(c) a tree of {PROCESSES} processes"),
            Self::D => format!("(d) {THREADS} threads"),
            Self::E => format!("(e) {FILES} files and {PIPES} pipes"),
            Self::F => format!("(f) one process with {size} descriptors"),
            Self::G => format!("(g) {PROCESSES} processes that share {size} descriptors"),
            Self::H => format!("(h) one process with {size} mappings"),
            Self::I => format!("(i) a tree of {size} processes"),
        }
    }

    /// The ratios that this case aims at.
    pub fn aims(self) -> Vec<Aim> {
        let aim = |metric, against, at_most| Aim {
            metric,
            against,
            at_most,
        };
        match self {
            Self::A => vec![
                aim(Metric::Dump, CRIU, 0.35),
                aim(Metric::Frozen, CRIU, 0.5),
                aim(Metric::Restore, CRIU, 0.35),
                aim(Metric::Dump, CRIU_CACHED, 0.6),
                aim(Metric::Frozen, CRIU_CACHED, 0.5),
                aim(Metric::Restore, CRIU_CACHED, 0.6),
            ],
            Self::B => vec![
                aim(Metric::Dump, CRIU, 0.6),
                aim(Metric::Restore, CRIU, 0.5),
                aim(Metric::Dump, FLOOR, 1.0),
                aim(Metric::Restore, FLOOR, 1.0),
            ],
            Self::C | Self::D | Self::E => [Metric::Dump, Metric::Frozen, Metric::Restore]
                .map(|m| aim(m, CRIU, 0.35))
                .to_vec(),
            Self::F | Self::G | Self::H | Self::I => {
                let aims = [Metric::Dump, Metric::Frozen, Metric::Restore]
                    .map(|m| [aim(m, CRIU, 0.35), aim(m, QUARTER, LINEAR)]);
                aims.concat()
            }
        }
    }

    /// The largest good peak resident size of firn in MiB, where the case has one.
    pub fn peak_limit_mib(self) -> Option<f64> {
        (self == Self::B).then_some(64.0)
    }
}
