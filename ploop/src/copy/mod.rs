//! Copying a disk while it is written.
//!
//! Pass 1 sends every cluster that is not known to be zeroes; then rounds send what was written
//! meanwhile, as long as that gets less; then writing is stopped and the rest follows. The tracker
//! has to be empty afterwards, else the copy fails.
//!
//! | step | what holds after it |
//! |---|---|
//! | tracker on | every write from here on leaves a mark |
//! | pass 1 | the target has each cluster as it was at some moment |
//! | rounds | few marks are left |
//! | barrier | what was sent is durable at the target, and the target said so |
//! | a few more rounds | what was written during the barrier is sent, too |
//! | freeze | nobody writes |
//! | last rounds | the target equals the source |
//! | tracker off | and no mark was left: nobody wrote after the freeze |
//! | end mark | the target gives the file its name |
//!
//! Before each pass the file system on the disk writes out what it caches: the rest is what reaches the
//! disk only with the freeze, while everybody waits.
//!
//! The stream is described in [`wire`]; the original's own is read, too ([`receive`]).

mod ahead;
mod flusher;
mod legacy;
mod partial;
mod rate;
mod receive;
mod send;
mod sink;
mod source;
mod target;
pub mod wire;

use std::io;

pub use ahead::Block;
pub use rate::Rate;
pub use receive::{ReceiveOptions, ReceiveProgress, ReceiveReport, receive};
pub use send::{CopyOptions, CopyPhase, CopyProgress, CopyReport, Round, Stop, copy};
pub use sink::{Sink, StreamSink};
pub use source::{CopySource, OfflineSource, OnlineSource};
pub use target::{FileTarget, TargetFormat};
pub use wire::is_session;

use crate::DiskError;
use crate::server::ControlError;

/// Why a copy did not come to its end. The source goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The disk that is read.
    #[error("the source can't be read")]
    Source(#[source] DiskError),
    /// The server of the disk that is read refused something.
    #[error("the source's server refused")]
    Refused(#[source] ControlError),
    /// The server of the disk that is read left, or made no sense.
    #[error("the source's server did not answer")]
    Control(#[source] ControlError),
    /// The pipe, or the feedback.
    #[error("{what} broke off; the partial file can be continued with --session {session}")]
    Pipe {
        /// Which one.
        what: &'static str,
        /// The session to name.
        session: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The receiver's end of the pipe, or of the way back.
    #[error("{what} broke off; {partial} is kept")]
    Line {
        /// Which one.
        what: &'static str,
        /// The file with what came.
        partial: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The stream breaks its rules.
    #[error("the stream is broken: {what}")]
    Stream {
        /// How.
        what: String,
    },
    /// The stream ended before its end mark.
    #[error("the stream ended before its end mark; {partial} is kept")]
    CutOff {
        /// The file with what came.
        partial: String,
    },
    /// The other side gave up.
    #[error("the receiver failed: {message}")]
    Receiver {
        /// What it said.
        message: String,
    },
    /// The file that is written.
    #[error("{file}: {action} failed")]
    Target {
        /// The file.
        file: String,
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The image that is written.
    #[error("the target can't be written")]
    TargetDisk(#[source] DiskError),
    /// The file system on the disk could not be frozen.
    #[error("the file system at {target} can't be frozen")]
    FreezeFs {
        /// Where it is mounted.
        target: String,
        /// What the server said.
        #[source]
        source: ControlError,
    },
    /// What should have stopped all writes did not work.
    #[error("writing could not be stopped: {what}")]
    Freeze {
        /// Why.
        what: String,
    },
    /// Somebody wrote after everything was stopped.
    #[error(
        "the disk is still written after it was frozen ({bytes} bytes); stop the writer with -F"
    )]
    StillWritten {
        /// How much.
        bytes: u64,
    },
}

impl From<ControlError> for CopyError {
    fn from(error: ControlError) -> CopyError {
        match error {
            ControlError::Refused { .. } => CopyError::Refused(error),
            _ => CopyError::Control(error),
        }
    }
}

impl CopyError {
    /// The exit status that the original command line gives for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            CopyError::Source(error) | CopyError::TargetDisk(error) => error.exit_code(),
            CopyError::Refused(error) | CopyError::Control(error) => error.exit_code(),
            CopyError::FreezeFs { source, .. } => source.exit_code(),
            CopyError::Pipe { .. } | CopyError::Line { .. } | CopyError::Target { .. } => 7,
            CopyError::Stream { .. } | CopyError::Receiver { .. } => 13,
            CopyError::CutOff { .. } => 6,
            CopyError::Freeze { .. } => 12,
            CopyError::StillWritten { .. } => 14,
        }
    }
}

/// Whether a block holds nothing but zeroes.
fn is_zero(block: &[u8]) -> bool {
    let (words, tail) = block.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && tail.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests;
