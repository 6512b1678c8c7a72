//! The thread that works beside the tracer: it reads what /proc tells of a stopped tree, which is about half of all,
//! and then writes the memory, both on another processor than that of what only the tracer can do. It starts before
//! the tree stops, which need not wait for its beginning.
//!
//! The address spaces come first, because the programs that the tasks run bring an arena into them; the rest it reads
//! while they run.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::Scope;
use std::time::Duration;

use firn_sys::helpers::Seat;
use firn_sys::lookout::Lookout;

use super::increment::Increment;
use super::memory_images::SpacesToWrite;
use super::{REPORT_INTERVAL, TASKS_PER_THREAD, inventory};
use crate::crew;
use crate::memory::{AddressSpace, Buffers, MemoryDumpError, PageStats};
use crate::task::outside::Outside;
use crate::task::status::StatusError;
use crate::tree::{Task, Tree};

/// For what takes no longer than a wake-up does in a small tree.
static LOOKOUT: Lookout = Lookout::new();
/// As long as it is looked out for.
const SOON: Duration = Duration::from_micros(300);

type Spaces = Result<Vec<AddressSpace>, MemoryDumpError>;
type Outsides = Result<Vec<Outside>, StatusError>;
/// What came of writing the memory.
pub(super) type Written = Result<PageStats, MemoryDumpError>;

/// What the thread is to do.
enum Work<'scope> {
    Read(Arc<Tree>),
    Write(Shared<SpacesToWrite<'scope>>, Sender<Written>),
}

/// Work of which only one does all: whoever takes it first.
type Shared<T> = Arc<Mutex<Option<T>>>;

fn take<T>(work: &Shared<T>) -> Option<T> {
    work.lock().unwrap_or_else(|e| e.into_inner()).take()
}

/// Memory that the thread is to write.
pub(super) struct Given<'scope> {
    spaces: Shared<SpacesToWrite<'scope>>,
    written: Receiver<Written>,
}

impl<'scope> Given<'scope> {
    /// Takes it back if the thread has not begun, as where all processors are busy.
    pub(super) fn take_back(&self) -> Option<SpacesToWrite<'scope>> {
        take(&self.spaces)
    }

    /// What the thread tells when it is done; calls `meanwhile` now and then.
    ///
    /// # Errors
    /// As [`SpacesToWrite::write`].
    pub(super) fn written(&self, mut meanwhile: impl FnMut()) -> Written {
        let mut written = soon(&self.written);
        loop {
            match written.map_or_else(|| self.written.recv_timeout(REPORT_INTERVAL), Ok) {
                Ok(pages) => return pages,
                Err(RecvTimeoutError::Timeout) => meanwhile(),
                Err(RecvTimeoutError::Disconnected) => unreachable!("the reader does not panic"),
            }
            written = None;
        }
    }
}

/// The thread, and what it waits for and tells. Dropped, it lets the thread end early.
pub(super) struct Reader<'scope> {
    seat: Arc<Seat>,
    work: Sender<Work<'scope>>,
    spaces: Receiver<Spaces>,
    outside: Receiver<Outsides>,
}

impl<'scope> Reader<'scope> {
    /// Starts the thread.
    pub(super) fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        increment: &'env Increment,
        buffers: Arc<Buffers>,
    ) -> Reader<'scope> {
        let (work, todo) = mpsc::channel();
        let (tell_spaces, spaces) = mpsc::sync_channel(1);
        let (tell_outside, outside) = mpsc::sync_channel(1);
        let seat = Arc::new(Seat::default());
        let its = Arc::clone(&seat);
        scope.spawn(move || {
            // Both take long, and the tree still runs.
            inventory::know_host();
            buffers.make_one();
            its.take();
            // Where nobody is at the other end, the dump has failed.
            while let Ok(work) = todo.recv() {
                match work {
                    Work::Read(tree) => {
                        let _ = tell_spaces.send(read_address_spaces(&tree, increment));
                        let _ = tell_outside.send(Outside::read_all(&tree));
                    }
                    Work::Write(spaces, tell) => {
                        if let Some(spaces) = take(&spaces) {
                            let _ = tell.send(spaces.write());
                        }
                        // Nothing comes after it, and nobody has to wait for the end of this thread.
                        break;
                    }
                }
                its.take();
            }
        });
        Reader {
            seat,
            work,
            spaces,
            outside,
        }
    }

    /// Lets it read: the tree stands still, and nothing may be mapped into it before the [`Reader::spaces`] are there.
    pub(super) fn begin(&self, tree: Arc<Tree>) {
        self.give(Work::Read(tree));
    }

    /// Lets it write the memory.
    pub(super) fn write(&self, spaces: SpacesToWrite<'scope>) -> Given<'scope> {
        let (tell, written) = mpsc::channel();
        let spaces = Arc::new(Mutex::new(Some(spaces)));
        self.give(Work::Write(Arc::clone(&spaces), tell));
        Given { spaces, written }
    }

    fn give(&self, work: Work<'scope>) {
        // Had it panicked, that is seen when its answer is asked for.
        let _ = self.seat.wake_apart(|| self.work.send(work));
    }

    /// The address spaces.
    ///
    /// # Errors
    /// As [`AddressSpace::read`].
    pub(super) fn spaces(&self) -> Spaces {
        receive(&self.spaces)
    }

    /// The rest.
    ///
    /// # Errors
    /// A task is gone, or /proc has another form than documented.
    pub(super) fn outside(&self) -> Outsides {
        receive(&self.outside)
    }
}

/// Receives what comes soon, as it does from a small tree; None means that it takes longer.
fn soon<T>(from: &Receiver<T>) -> Option<T> {
    LOOKOUT.watch(SOON, || from.try_recv().ok())
}

fn receive<T>(from: &Receiver<T>) -> T {
    let received = soon(from).map_or_else(|| from.recv(), Ok);
    received.expect("the reader does not panic")
}

fn read_address_spaces(tree: &Tree, increment: &Increment) -> Spaces {
    let tasks: Vec<&Task> = tree.alive().collect();
    let spaces = crew::share_out(&tasks, TASKS_PER_THREAD, |task| {
        AddressSpace::read(task.pid, task.speaker(), increment.is_tracked(task.pid))
    });
    spaces.into_iter().collect()
}
