//! Makes what a target has taken durable while more comes, so that its barriers wait for little.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use crate::{Disk, DiskError};

/// So much is taken between two flushes.
const STEP_BYTES: u64 = 32 << 20;

/// Ends with the first flush that fails.
type Thread = JoinHandle<Result<(), DiskError>>;

/// A thread that flushes a disk now and then.
pub(super) struct Flusher {
    running: Option<(SyncSender<()>, Thread)>,
    taken_bytes: u64,
}

impl Flusher {
    /// Starts it.
    pub fn start(disk: Arc<dyn Disk>) -> Flusher {
        // No queue: while a flush goes on, nobody orders the next.
        let (orders, incoming) = sync_channel(0);
        let thread =
            std::thread::spawn(move || incoming.into_iter().try_for_each(|()| disk.flush()));
        Flusher {
            running: Some((orders, thread)),
            taken_bytes: 0,
        }
    }

    /// Counts what was written.
    ///
    /// # Errors
    /// An earlier flush failed.
    pub fn took(&mut self, bytes: u64) -> Result<(), DiskError> {
        self.taken_bytes += bytes;
        let Some((orders, _)) = self
            .running
            .as_ref()
            .filter(|_| self.taken_bytes >= STEP_BYTES)
        else {
            return Ok(());
        };
        match orders.try_send(()) {
            Ok(()) => self.taken_bytes = 0,
            Err(TrySendError::Full(())) => {}
            Err(TrySendError::Disconnected(())) => return self.finish(),
        }
        Ok(())
    }

    /// Ends it. What was written since the last flush is not durable.
    ///
    /// # Errors
    /// A flush failed.
    pub fn finish(&mut self) -> Result<(), DiskError> {
        let Some((orders, thread)) = self.running.take() else {
            return Ok(());
        };
        drop(orders);
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
