//! The thread that works beside the tracer: it reads what /proc tells of a stopped tree, which is about half of all,
//! and then writes the memory, both on another processor than that of what only the tracer can do. It starts before
//! the tree stops, which need not wait for its beginning.
//!
//! The address spaces come first, because the programs that the tasks run bring an arena into them; the rest it reads
//! while they run.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::Scope;

use firn_sys::helpers::Seat;

use super::increment::Increment;
use super::memory_images::SpacesToWrite;
use super::{TASKS_PER_THREAD, inventory};
use crate::crew;
use crate::memory::{AddressSpace, Buffers, MemoryDumpError, PageStats};
use crate::task::outside::Outside;
use crate::task::status::StatusError;
use crate::tree::{Task, Tree};

type Spaces = Result<Vec<AddressSpace>, MemoryDumpError>;
type Outsides = Result<Vec<Outside>, StatusError>;
/// What came of writing the memory.
pub(super) type Written = Result<PageStats, MemoryDumpError>;

/// What the thread is to do.
enum Work<'scope> {
    Read(Arc<Tree>),
    Write(SpacesToWrite<'scope>, Sender<Written>),
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
                        let _ = tell.send(spaces.write());
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

    /// Lets it write the memory, and returns where its answer will come.
    pub(super) fn write(&self, spaces: SpacesToWrite<'scope>) -> Receiver<Written> {
        let (tell, written) = mpsc::channel();
        self.give(Work::Write(spaces, tell));
        written
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
        self.spaces.recv().expect("the reader does not panic")
    }

    /// The rest.
    ///
    /// # Errors
    /// A task is gone, or /proc has another form than documented.
    pub(super) fn outside(&self) -> Outsides {
        self.outside.recv().expect("the reader does not panic")
    }
}

fn read_address_spaces(tree: &Tree, increment: &Increment) -> Spaces {
    let tasks: Vec<&Task> = tree.alive().collect();
    let spaces = crew::share_out(&tasks, TASKS_PER_THREAD, |task| {
        AddressSpace::read(task.pid, task.speaker(), increment.is_tracked(task.pid))
    });
    spaces.into_iter().collect()
}
