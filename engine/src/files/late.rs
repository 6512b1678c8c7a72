//! Files that can only be opened when the tasks exist: what describes them.
//!
//! Until then another file keeps their place, in this process and in every table. Each task waits, when
//! it has made its threads, until this process has opened the real ones; then it fetches them with
//! pidfd_getfd and puts them where the placeholders were.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{OwnedFd, RawFd};

use firn_proto::{FdTypes, FdinfoEntry, PidfdEntry, RegFileEntry};
use firn_sys::file::{self, O_CLOEXEC, O_PATH};
use firn_sys::{Pid, epoll, fcntl, nr};

use super::error::FileRestoreError;
use super::open::{self, Opener};
use super::pidfd;
use super::store::FileStore;
use crate::program::{Arg, Program, Rule, Slot};

/// A file to be opened late.
#[derive(Debug, Clone)]
pub(super) enum LateFile {
    /// The pidfd of a task of the tree.
    Pidfd(PidfdEntry),
    /// A file of /proc that describes a task.
    OfTask(RegFileEntry),
    /// An io_uring ring that its process makes.
    Ring,
}

/// All of them, by type and number.
pub(super) type LateFiles = BTreeMap<(i32, u32), LateFile>;

impl Opener<'_> {
    /// Notes a file to be opened late and returns what keeps its place.
    pub(super) fn late(
        &mut self,
        fd_type: FdTypes,
        id: u32,
        late: LateFile,
    ) -> Result<OwnedFd, FileRestoreError> {
        self.late_files.insert((fd_type.into(), id), late);
        file::open("/".as_ref(), O_PATH.cast_unsigned())
            .map_err(FileRestoreError::refused("open", "/"))
    }
}

impl FileStore {
    /// Whether some files are opened only by [`FileStore::open_late`].
    pub fn has_late(&self) -> bool {
        !self.late_files.is_empty()
    }

    /// Opens the files that describe tasks, which exist now; `tids` are the threads of the tree.
    ///
    /// # Errors
    /// A file that can't be opened, or that describes a task which is not of the tree.
    pub fn open_late(&mut self, tids: &HashSet<Pid>) -> Result<(), FileRestoreError> {
        for (&(fd_type, id), late) in &self.late_files {
            let fd_type = FdTypes::try_from(fd_type).expect("noted by its kind");
            let fd = match late {
                LateFile::Pidfd(entry) => {
                    let pid = Pid::from_raw(entry.nspid);
                    if !tids.contains(&pid) {
                        let what = format!("it is of task {pid}, which is not in the images");
                        return Err(FileRestoreError::corrupt(id, what));
                    }
                    pidfd::open_of(pid, entry)?
                }
                LateFile::OfTask(entry) => {
                    let path = open::path_of(entry, &self.options);
                    open::open_entry_at(&path, entry, entry.flags)?
                }
                LateFile::Ring => continue,
            };
            let placeholder = self.opened.number_here(&(fd_type, id));
            epoll::place(&fd, placeholder.expect("it stays here")).map_err(
                FileRestoreError::refused("place", format!("open file {id}")),
            )?;
        }
        Ok(())
    }

    /// Appends the records that fetch the late files of table `files_id` from this process.
    ///
    /// They run in a task that has the table already and still has its first rights, after
    /// [`FileStore::open_late`].
    pub fn plan_late(&self, files_id: u32, program: &mut Program) {
        let mut fetched = HashMap::new();
        let is_fetched = |fd: &&FdinfoEntry| {
            let late = self.late_files.get(&(fd.r#type, fd.id));
            late.is_some_and(|late| !matches!(late, LateFile::Ring))
        };
        let late = self.table(files_id).iter().filter(is_fetched);
        let mut coordinator = None;
        for fd in late {
            let flags = if fd.flags & fcntl::FD_CLOEXEC != 0 {
                O_CLOEXEC
            } else {
                0
            };
            let what = format!("fd {}", fd.fd);
            if let Some(&first) = fetched.get(&(fd.r#type, fd.id)) {
                put(program, u32::into(first), fd.fd, flags, &what);
                continue;
            }
            let source = self.opened.number_here(&(fd.r#type(), fd.id));
            let source = source.expect("it stays here");
            let coordinator = coordinator.get_or_insert_with(|| Coordinator::reach(program));
            coordinator.fetch(program, source, fd.fd, flags, &what);
            fetched.insert((fd.r#type, fd.id), fd.fd);
        }
        if let Some(coordinator) = coordinator {
            coordinator.let_go(program);
        }
    }
}

/// This process as a task of the tree reaches it.
pub(super) struct Coordinator(Slot);

impl Coordinator {
    /// Appends the record that reaches it.
    pub(super) fn reach(program: &mut Program) -> Coordinator {
        Coordinator(program.call_to_slot(
            nr::PIDFD_OPEN,
            &[Pid::this().to_image().into(), 0.into()],
            Rule::Ok,
            "reaching the coordinator",
        ))
    }

    /// Appends the records that fetch what has the number `source` in this process and put it in a place.
    pub(super) fn fetch(
        &self,
        program: &mut Program,
        source: RawFd,
        place: u32,
        flags: i32,
        what: &str,
    ) {
        let got = program.call_to_slot(
            nr::PIDFD_GETFD,
            &[self.0.into(), source.into(), 0.into()],
            Rule::Ok,
            format!("fetching {what}"),
        );
        put(program, got.into(), place, flags, what);
        close(program, got.into(), "closing the second number");
    }

    /// Appends the record that lets it go.
    pub(super) fn let_go(self, program: &mut Program) {
        close(program, self.0.into(), "letting the coordinator go");
    }
}

fn put(program: &mut Program, from: Arg, place: u32, flags: i32, what: &str) {
    program.call(
        nr::DUP3,
        &[from, place.into(), flags.into()],
        Rule::Exact(i64::from(place)),
        what.to_owned(),
    );
}

/// Appends the record that closes a descriptor.
pub(super) fn close(program: &mut Program, fd: Arg, why: &'static str) {
    program.call(nr::CLOSE, &[fd], Rule::Ok, why);
}
