//! The thread that reads what /proc tells of a stopped tree, which is about half of all, beside what only the tracer
//! can do, and on another processor. It starts before the tree stops, which need not wait for its beginning.
//!
//! The address spaces come first, because the programs that the tasks run bring an arena into them; the rest it reads
//! while they run.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{Scope, ScopedJoinHandle};

use firn_sys::helpers::Seat;

use super::TASKS_PER_THREAD;
use super::increment::Increment;
use crate::crew;
use crate::memory::{AddressSpace, MemoryDumpError};
use crate::task::outside::Outside;
use crate::task::status::StatusError;
use crate::tree::{Task, Tree};

type Spaces = Result<Vec<AddressSpace>, MemoryDumpError>;

/// The thread, and what it waits for and tells. Dropped, it lets the thread end early.
pub(super) struct Reader<'scope> {
    seat: Arc<Seat>,
    trees: Sender<Arc<Tree>>,
    spaces: Receiver<Spaces>,
    thread: ScopedJoinHandle<'scope, Option<Result<Vec<Outside>, StatusError>>>,
}

impl<'scope> Reader<'scope> {
    /// Starts the thread.
    pub(super) fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        increment: &'env Increment,
    ) -> Reader<'scope> {
        let (trees, stopped) = mpsc::channel::<Arc<Tree>>();
        let (tell, spaces) = mpsc::sync_channel(1);
        let seat = Arc::new(Seat::default());
        let its = Arc::clone(&seat);
        let thread = scope.spawn(move || {
            its.take();
            // Where nobody is at the other end, the dump has failed.
            let tree = stopped.recv().ok()?;
            tell.send(read_address_spaces(&tree, increment)).ok()?;
            Some(Outside::read_all(&tree))
        });
        Reader {
            seat,
            trees,
            spaces,
            thread,
        }
    }

    /// Lets it read: the tree stands still, and nothing may be mapped into it before the [`Reader::spaces`] are there.
    pub(super) fn begin(&self, tree: Arc<Tree>) {
        // Had it panicked, that is seen when its answer is asked for.
        let _ = self.seat.wake_apart(|| self.trees.send(tree));
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
    pub(super) fn outside(self) -> Result<Vec<Outside>, StatusError> {
        let outside = self.thread.join().expect("the reader does not panic");
        outside.expect("the address spaces were asked for")
    }
}

fn read_address_spaces(tree: &Tree, increment: &Increment) -> Spaces {
    let tasks: Vec<&Task> = tree.alive().collect();
    let spaces = crew::share_out(&tasks, TASKS_PER_THREAD, |task| {
        AddressSpace::read(task.pid, task.speaker(), increment.is_tracked(task.pid))
    });
    spaces.into_iter().collect()
}
