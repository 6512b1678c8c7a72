//! How an operation tells its caller where it is.

use std::fmt;

/// A step of a dump or a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Looking at the running tree.
    Survey,
    /// Stopping it.
    Freeze,
    /// Asking the tasks.
    Inspect,
    /// Open files.
    Files,
    /// Copying memory.
    Memory,
    /// Writing the small images.
    Describe,
    /// Bringing the images to disk.
    Seal,
    /// Reading and checking images.
    Load,
    /// Making the tasks.
    Fork,
    /// Filling memory.
    Fill,
    /// Letting the tasks go.
    Resume,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Survey => "surveying",
            Phase::Freeze => "freezing",
            Phase::Inspect => "inspecting",
            Phase::Files => "files",
            Phase::Memory => "memory",
            Phase::Describe => "describing",
            Phase::Seal => "sealing",
            Phase::Load => "loading",
            Phase::Fork => "forking",
            Phase::Fill => "filling memory",
            Phase::Resume => "resuming",
        })
    }
}

/// Where an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Present step.
    pub phase: Phase,
    /// Bytes of memory copied so far.
    pub done_bytes: u64,
    /// Bytes to copy in all; 0 while it is not known.
    pub total_bytes: u64,
    /// Tasks of the tree; 0 while it is not known.
    pub tasks: usize,
}

type Callback = Box<dyn FnMut(Progress) + Send>;

/// Remembers where the operation is and calls back.
pub(crate) struct Reporter {
    callback: Option<Callback>,
    present: Progress,
}

impl Reporter {
    /// Reports to nobody.
    pub(crate) fn none() -> Reporter {
        let present = Progress {
            phase: Phase::Survey,
            done_bytes: 0,
            total_bytes: 0,
            tasks: 0,
        };
        Reporter {
            callback: None,
            present,
        }
    }

    /// Reports to `callback`.
    pub(crate) fn new(callback: impl FnMut(Progress) + Send + 'static) -> Reporter {
        Reporter {
            callback: Some(Box::new(callback)),
            ..Reporter::none()
        }
    }

    pub(crate) fn phase(&mut self, phase: Phase) {
        tracing::debug!(%phase);
        self.present.phase = phase;
        self.tell();
    }

    pub(crate) fn tasks(&mut self, tasks: usize) {
        self.present.tasks = tasks;
    }

    pub(crate) fn bytes(&mut self, done: u64, total: u64) {
        self.present.done_bytes = done;
        self.present.total_bytes = total;
        self.tell();
    }

    fn tell(&mut self) {
        if let Some(callback) = &mut self.callback {
            callback(self.present);
        }
    }
}
