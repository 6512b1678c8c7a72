//! The records that give a task its descriptors.

use std::collections::HashSet;

use firn_sys::{fcntl, file, nr};

use super::fetch::{self, Fetch};
use super::moves::{self, Move, MoveStep};
use super::shelf::Source;
use super::store::FileStore;
use super::{owner, room};
use crate::program::{Program, Rule};

impl FileStore {
    /// Appends the records that turn the table inherited from this process into table `files_id`.
    ///
    /// Everything else is closed, so whatever needs a descriptor of [`FileStore::link_fd`] comes before.
    ///
    /// # Panics
    /// Before [`FileStore::open_all`].
    pub fn plan_table(&self, files_id: u32, program: &mut Program) {
        let table = self.table(files_id);
        let (mut moves, mut fetches) = (Vec::new(), Vec::new());
        for fd in table {
            let (target, cloexec) = (fd.fd, fd.flags & fcntl::FD_CLOEXEC != 0);
            match self.source(fd).expect("opened by open_all") {
                Source::Inherited(number) => moves.push(Move {
                    source: number.cast_unsigned(),
                    target,
                    cloexec,
                }),
                Source::With(from, source) => fetches.push(Fetch {
                    from,
                    source,
                    target,
                    cloexec,
                }),
            }
        }
        if !fetches.is_empty() {
            // Then nothing is inherited.
            return fetch::plan(&fetches, room::free_number(table), program);
        }
        for step in moves::order(&moves) {
            plan_step(step, program);
        }
    }

    /// Appends the records that set signal owners and O_ASYNC of the open files whose first table is
    /// `files_id`.
    ///
    /// They run in a task that has the table already, after it has got its user ids, which the kernel
    /// remembers, and when all tasks exist that may be owners.
    pub fn plan_owners(&self, files_id: u32, program: &mut Program) {
        let mut seen = HashSet::new();
        for fd in self.table(files_id) {
            if self.is_first(files_id, fd)
                && seen.insert((fd.r#type, fd.id))
                && let Some((fown, flags)) = self.owner(fd)
            {
                owner::plan(fd.fd.cast_signed(), &fown, flags, program);
            }
        }
    }
}

fn plan_step(step: MoveStep, program: &mut Program) {
    match step {
        MoveStep::Dup { from, to, cloexec } => {
            let flags = if cloexec { file::O_CLOEXEC } else { 0 };
            program.call(
                nr::DUP3,
                &[from.into(), to.into(), flags.into()],
                Rule::Exact(i64::from(to)),
                format!("fd {to}"),
            );
        }
        MoveStep::SetCloexec { fd, cloexec } => {
            let flags = if cloexec { fcntl::FD_CLOEXEC } else { 0 };
            program.call(
                nr::FCNTL,
                &[fd.into(), fcntl::F_SETFD.into(), flags.into()],
                Rule::Ok,
                format!("fd {fd}"),
            );
        }
        MoveStep::Close { first, last } => {
            program.call(
                nr::CLOSE_RANGE,
                &[first.into(), last.into()],
                Rule::Ok,
                "descriptors that the task did not have",
            );
        }
    }
}
