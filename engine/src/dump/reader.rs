//! The thread that reads what /proc tells of a stopped tree, which is about half of all, beside what only the tracer
//! can do. It starts before the tree stops, which need not wait for its beginning.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{Scope, ScopedJoinHandle};

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
    trees: Sender<Arc<Tree>>,
    answered: Sender<()>,
    outside: Receiver<Result<Vec<Outside>, StatusError>>,
    thread: ScopedJoinHandle<'scope, Option<Spaces>>,
}

impl<'scope> Reader<'scope> {
    /// Starts the thread.
    pub(super) fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        increment: &'env Increment,
    ) -> Reader<'scope> {
        let (trees, stopped) = mpsc::channel::<Arc<Tree>>();
        let (answered, have_answered) = mpsc::channel();
        let (tell, outside) = mpsc::sync_channel(1);
        let thread = scope.spawn(move || {
            // Where nobody is at the other end, the dump has failed.
            let tree = stopped.recv().ok()?;
            tell.send(Outside::read_all(&tree)).ok()?;
            have_answered.recv().ok()?;
            Some(read_address_spaces(&tree, increment))
        });
        Reader {
            trees,
            answered,
            outside,
            thread,
        }
    }

    /// Lets it read all but the address spaces: the tree stands still.
    pub(super) fn begin(&self, tree: Arc<Tree>) {
        // Had it panicked, that is seen when its answer is asked for.
        let _ = self.trees.send(tree);
    }

    /// Lets it read the address spaces: before, they would show the arena in which the tasks run programs.
    pub(super) fn go_on(&self) {
        let _ = self.answered.send(());
    }

    /// What it has read first.
    ///
    /// # Errors
    /// A task is gone, or /proc has another form than documented.
    pub(super) fn outside(&self) -> Result<Vec<Outside>, StatusError> {
        self.outside.recv().expect("the reader does not panic")
    }

    /// The address spaces.
    ///
    /// # Errors
    /// As [`AddressSpace::read`].
    pub(super) fn spaces(self) -> Spaces {
        let spaces = self.thread.join().expect("the reader does not panic");
        spaces.expect("the programs have ended")
    }
}

fn read_address_spaces(tree: &Tree, increment: &Increment) -> Spaces {
    let tasks: Vec<&Task> = tree.alive().collect();
    let spaces = crew::share_out(&tasks, TASKS_PER_THREAD, |task| {
        AddressSpace::read(task.pid, task.speaker(), increment.is_tracked(task.pid))
    });
    spaces.into_iter().collect()
}
