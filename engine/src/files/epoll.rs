//! Epoll sets.
//!
//! A set watches open files, each under the number that it was added with. fdinfo lists numbers, events
//! and data; kcmp tells which open file stands behind each, which may have another number by now, or
//! none in the table of the task that made it. The image has the present number, which is all that
//! CRIU knows, and in fields of ours the old one and the file.
//!
//! At restore a task adds its targets itself where the numbers still lead to them: a set that watches a
//! signalfd tells of signals of the task that added it. The others are added by this process in a
//! descriptor table of its own, where every number can be taken.
//!
//! Whether a target that reports edges has been reported already can't be read. A set in which no event
//! waited gets none: those that adding makes are taken out, unless something may have happened since.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use firn_proto::{
    EventpollFileEntry, EventpollTfdEntry, FdTypes, FdinfoEntry, FileEntry, FirnEventpollEntry,
    FirnEventpollTfdEntry,
};
use firn_sys::{Errno, Pid, epoll, fcntl, nr, pidfd};

use super::anonymous::Anonymous;
use super::dump::{DumpState, FileTable, fd_of};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::Dumping;
use super::open::{self, Opener};
use super::open_file::{OpenFile, Trouble};
use super::sharing;
use super::shelf::Held;
use super::store::FileStore;
use crate::obstacle::Obstacle;
use crate::program::{Program, Rule};

/// Targets added at once by a thread that has two descriptors for each.
const AT_ONCE: usize = 256;

/// Sets of files to wait for.
pub(super) struct Epoll;

/// A set whose targets are not known yet, because other tables may have them.
#[derive(Debug)]
pub(super) struct Unresolved {
    pid: Pid,
    fd: i32,
    id: u32,
    object: OpenFile,
}

impl Anonymous for Epoll {
    type Record = EventpollFileEntry;
    const FD_TYPE: FdTypes = FdTypes::Eventpoll;
    const LINK: &'static str = "[eventpoll]";
    const NAME: &'static str = "an epoll set";

    fn describe(
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<EventpollFileEntry, FileDumpError> {
        let file = dumping.file;
        let lines = file.info.lines.iter().filter(|l| l.starts_with("tfd:"));
        let tfd: Option<Vec<EventpollTfdEntry>> =
            lines.map(|line| parse_target(line, dumping.id)).collect();
        if let Some(fd) = fd_of(file) {
            state.collected.epolls.push(Unresolved {
                pid: file.pid,
                fd,
                id: dumping.id,
                object: file.clone(),
            });
        }
        Ok(EventpollFileEntry {
            id: dumping.id,
            flags: file.image_flags(),
            fown: dumping.fown,
            tfd: tfd.ok_or_else(|| file.unexpected("tfd"))?,
            firn: None,
        })
    }

    fn make(set: &EventpollFileEntry, _: &mut Opener<'_>) -> Result<OwnedFd, FileRestoreError> {
        let fd = epoll::create().map_err(FileRestoreError::refused("create", "an epoll set"))?;
        open::set_flags(&fd, set.flags, "an epoll set")?;
        Ok(fd)
    }

    fn record(entry: &FileEntry) -> Option<&EventpollFileEntry> {
        entry.epfd.as_ref()
    }

    fn put(record: EventpollFileEntry, entry: &mut FileEntry) {
        entry.epfd = Some(record);
    }
}

/// Parses `tfd: 5 events: 19 data: 5  pos:0 ino:11 sdev:10`; the last three are there since Linux 4.13.
fn parse_target(line: &str, id: u32) -> Option<EventpollTfdEntry> {
    let text = line.replace(':', " ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let value = |key| {
        let at = words.iter().position(|word| *word == key)?;
        words.get(at + 1).copied()
    };
    let hex = |key| u64::from_str_radix(value(key)?, 16).ok();
    Some(EventpollTfdEntry {
        id,
        tfd: value("tfd")?.parse().ok()?,
        events: u32::try_from(hex("events")?).ok()?,
        data: hex("data")?,
        dev: hex("sdev").and_then(|dev| u32::try_from(dev).ok()),
        inode: hex("ino"),
        pos: value("pos")
            .and_then(|pos| pos.parse::<i64>().ok())
            .map(i64::cast_unsigned),
        firn: None,
    })
}

impl FileTable {
    /// Finds the targets of all sets, now that all tables are known.
    pub(super) fn resolve_epolls(&mut self) -> Result<(), FileDumpError> {
        let sets = std::mem::take(&mut self.collected.epolls);
        if sets.is_empty() {
            return Ok(());
        }
        let mut places: HashMap<u32, usize> = HashMap::new();
        for (at, entry) in self.collected.entries.iter().enumerate() {
            if entry.epfd.is_some() {
                places.insert(entry.id, at);
            }
        }
        let mut targets: HashMap<u32, Vec<(FdTypes, u32)>> = HashMap::new();
        for set in &sets {
            let Some(mut entry) = self.collected.entries[places[&set.id]].epfd.take() else {
                continue;
            };
            let found = self.resolve(set, &mut entry)?;
            self.collected.entries[places[&set.id]].epfd = Some(entry);
            targets.insert(set.id, found);
        }
        for set in &sets {
            if !reaches_signalfd(set.id, &targets, &mut HashSet::new()) {
                let idle = is_idle(set)
                    .map_err(|source| super::dump::query(&set.object, "the events", source))?;
                if let Some(entry) = &mut self.collected.entries[places[&set.id]].epfd {
                    entry.firn = idle.then_some(FirnEventpollEntry { idle: Some(true) });
                }
            }
        }
        Ok(())
    }

    /// Finds the targets of one set; notes what nobody in the tree has.
    fn resolve(
        &mut self,
        set: &Unresolved,
        entry: &mut EventpollFileEntry,
    ) -> Result<Vec<(FdTypes, u32)>, FileDumpError> {
        let mut met: HashMap<u32, u32> = HashMap::new();
        let mut found = Vec::with_capacity(entry.tfd.len());
        for tfd in &mut entry.tfd {
            let nth = met.entry(tfd.tfd).or_default();
            let target = epoll::Target {
                set: set.fd,
                number: tfd.tfd,
                nth: *nth,
            };
            *nth += 1;
            let failed = |source| FileDumpError::Compare {
                pid: set.pid,
                other: set.pid,
                source,
            };
            let table = self.table_of_task(set.pid);
            let number = tfd.tfd;
            if let Ok(at) = table.binary_search_by_key(&number, |fd| fd.fd) {
                let order = epoll::compare_target(set.pid, number.cast_signed(), set.pid, target);
                if order.map_err(failed)? == std::cmp::Ordering::Equal {
                    found.extend(key_of(&table[at]));
                    continue;
                }
            }
            let Some((id, fd_type)) = self.find_target(set.pid, target, tfd.inode)? else {
                self.obstacles.push(nobodys(set, number));
                continue;
            };
            let now = table.iter().find(|fd| key_of(fd) == Some((fd_type, id)));
            tfd.tfd = now.map_or(number, |fd| fd.fd);
            tfd.firn = Some(FirnEventpollTfdEntry {
                tfd: Some(number),
                r#type: Some(i32::from(fd_type).cast_unsigned()),
                file_id: Some(id),
            });
            found.push((fd_type, id));
        }
        Ok(found)
    }

    fn find_target(
        &self,
        of: Pid,
        target: epoll::Target,
        inode: Option<u64>,
    ) -> Result<Option<(u32, FdTypes)>, FileDumpError> {
        for (key, known) in &self.descriptions.by_key {
            if inode.is_some_and(|inode| !key.may_be(inode)) {
                continue;
            }
            let found = sharing::search(known, |other| {
                let compared = epoll::compare_target(other.pid, other.fd, of, target);
                compared.map_err(|source| FileDumpError::Compare {
                    pid: of,
                    other: other.pid,
                    source,
                })
            })?;
            if let Ok(at) = found {
                return Ok(Some((known[at].id, known[at].fd_type)));
            }
        }
        Ok(None)
    }
}

fn key_of(fd: &FdinfoEntry) -> Option<(FdTypes, u32)> {
    Some((FdTypes::try_from(fd.r#type).ok()?, fd.id))
}

fn nobodys(set: &Unresolved, number: u32) -> Obstacle {
    set.object.obstacle(Trouble::new(
        format!(
            "it watches a file that was descriptor {number} and that no task of the tree has now"
        ),
        "dump the tree that contains whoever has it, or let the task remove it from the set",
    ))
}

/// Whether asking the set for events would ask a signalfd, which knows only whoever asks: the kernel then
/// forgets that there are signals for its owner.
fn reaches_signalfd(
    id: u32,
    targets: &HashMap<u32, Vec<(FdTypes, u32)>>,
    seen: &mut HashSet<u32>,
) -> bool {
    seen.insert(id)
        && targets.get(&id).into_iter().flatten().any(|(kind, id)| {
            *kind == FdTypes::Signalfd
                || *kind == FdTypes::Eventpoll && reaches_signalfd(*id, targets, seen)
        })
}

fn is_idle(set: &Unresolved) -> firn_sys::Result<bool> {
    let duplicate = pidfd::getfd(pidfd::open_by_thread(set.pid)?, set.fd)?;
    Ok(!epoll::is_readable(duplicate)?)
}

/// One target to be added to a set again.
struct Watch {
    /// Number of the set in files.img.
    set: u32,
    /// Number to add it under.
    number: u32,
    events: u32,
    data: u64,
    target: (FdTypes, u32),
    /// A task adds it to the set, which has this number there.
    by_task: Option<u32>,
}

impl FileStore {
    /// Appends the records that fill the sets whose first table is `files_id`.
    ///
    /// They run when the table is complete, late files included.
    pub fn plan_watches(&self, files_id: u32, program: &mut Program) {
        for watch in self.watches(files_id) {
            let Some(set) = watch.by_task else { continue };
            let event = program.data(&epoll::event_bytes(watch.events, watch.data));
            program.call(
                nr::EPOLL_CTL,
                &[
                    set.into(),
                    epoll::CTL_ADD.into(),
                    watch.number.into(),
                    event.into(),
                ],
                Rule::Ok,
                format!("watching fd {} in epoll fd {set}", watch.number),
            );
        }
    }

    /// The targets of the sets whose first table this is.
    fn watches(&self, files_id: u32) -> Vec<Watch> {
        let is_set = |fd: &&FdinfoEntry| key_of(fd).is_some_and(|(k, _)| k == FdTypes::Eventpoll);
        let mut seen = HashSet::new();
        let table = self.table(files_id);
        let mut keys: BTreeMap<u32, (FdTypes, u32)> = BTreeMap::new();
        let mut watches = Vec::new();
        for fd in table.iter().filter(is_set) {
            if !self.is_first(files_id, fd) || !seen.insert(fd.id) {
                continue;
            }
            if keys.is_empty() {
                keys = table
                    .iter()
                    .filter_map(|fd| Some((fd.fd, key_of(fd)?)))
                    .collect();
            }
            for tfd in self.targets_of(fd.id) {
                let here = keys.get(&tfd.tfd).copied();
                let (number, target) = match named_target(tfd) {
                    Some((number, target)) => (number, Some(target)),
                    None => (tfd.tfd, here),
                };
                let Some(target) = target else { continue };
                let leads_there = keys.get(&number) == Some(&target);
                watches.push(Watch {
                    set: fd.id,
                    number,
                    events: tfd.events,
                    data: tfd.data,
                    target,
                    by_task: leads_there.then_some(fd.fd),
                });
            }
        }
        watches
    }

    fn targets_of(&self, set: u32) -> &[EventpollTfdEntry] {
        let entry = self.entry(FdTypes::Eventpoll, set);
        entry
            .and_then(|entry| entry.epfd.as_ref())
            .map_or(&[], |set| set.tfd.as_slice())
    }

    /// Checks that every target is among the files that are restored.
    pub(super) fn check_watches(&self) -> Result<(), FileRestoreError> {
        let ids: Vec<u32> = self.tables().map(|(id, _)| id).collect();
        for (files_id, watch) in ids
            .iter()
            .flat_map(|id| self.watches(*id).into_iter().map(move |w| (*id, w)))
        {
            if self.entry(watch.target.0, watch.target.1).is_none() {
                let what = format!(
                    "it watches fd {} of table {files_id}, which files.img does not have",
                    watch.number
                );
                return Err(FileRestoreError::corrupt(watch.set, what));
            }
        }
        Ok(())
    }

    /// Fills in what no task could, and takes out events that are none.
    pub(super) fn finish_epolls(&self) -> Result<(), FileRestoreError> {
        let ids: Vec<u32> = self.tables().map(|(id, _)| id).collect();
        let watches: Vec<Watch> = ids.iter().flat_map(|id| self.watches(*id)).collect();
        let ours: Vec<&Watch> = watches.iter().filter(|w| w.by_task.is_none()).collect();
        for some in ours.chunks(AT_ONCE) {
            self.add_watches(some)?;
        }
        self.take_new_events(&watches)
    }

    /// Adds targets that no task has under their old numbers.
    fn add_watches(&self, watches: &[&Watch]) -> Result<(), FileRestoreError> {
        let mut ours = Vec::new();
        for watch in watches {
            let set = self.opened(FdTypes::Eventpoll, watch.set)?;
            let target = self.opened(watch.target.0, watch.target.1)?;
            let (Some(set), Some(target)) = (set, target) else {
                let what = format!("the file that it watches as fd {} is missing", watch.number);
                return Err(FileRestoreError::corrupt(watch.set, what));
            };
            ours.push((set, target, *watch));
        }
        // The table is the thread's own, so it must not be this thread.
        let added = std::thread::scope(|scope| {
            let adder = scope.spawn(|| add_elsewhere(&ours));
            adder.join().expect("the thread does not panic")
        });
        added.map_err(FileRestoreError::refused(
            "watch",
            "a file under its old number",
        ))
    }

    fn take_new_events(&self, watches: &[Watch]) -> Result<(), FileRestoreError> {
        let mut count: BTreeMap<u32, usize> = BTreeMap::new();
        let mut noisy = HashSet::new();
        for watch in watches {
            *count.entry(watch.set).or_default() += 1;
            let once = watch.events & (epoll::EDGE | epoll::ONE_SHOT) != 0;
            let (kind, id) = watch.target;
            if kind == FdTypes::Signalfd
                || kind == FdTypes::Eventpoll
                || once && !self.is_quiet(kind, id)
            {
                noisy.insert(watch.set);
            }
        }
        for (set, count) in count {
            let entry = self
                .entry(FdTypes::Eventpoll, set)
                .and_then(|e| e.epfd.as_ref());
            let idle = entry.and_then(|set| set.firn?.idle) == Some(true);
            if let (true, Some(fd)) = (
                idle && !noisy.contains(&set),
                self.opened(FdTypes::Eventpoll, set)?,
            ) {
                epoll::take_ready(fd, count)
                    .map_err(FileRestoreError::refused("settle", "an epoll set"))?;
            }
        }
        Ok(())
    }

    /// Whether nothing can have happened to a file since it was restored.
    fn is_quiet(&self, kind: FdTypes, id: u32) -> bool {
        match kind {
            FdTypes::Eventfd | FdTypes::Timerfd | FdTypes::Inotify | FdTypes::Pidfd => true,
            FdTypes::Pipe | FdTypes::Fifo => !self.is_external(kind, id),
            FdTypes::Unixsk => self
                .entry(kind, id)
                .and_then(|entry| entry.usk.as_ref())
                .is_some_and(|socket| socket.peer != 0),
            _ => false,
        }
    }
}

/// The number that a target was added under and the file itself, where the image has them.
fn named_target(tfd: &EventpollTfdEntry) -> Option<(u32, (FdTypes, u32))> {
    let firn = tfd.firn.as_ref()?;
    let kind = FdTypes::try_from(firn.r#type?.cast_signed()).ok()?;
    Some((firn.tfd?, (kind, firn.file_id?)))
}

fn add_elsewhere(watches: &[(Held<'_>, Held<'_>, &Watch)]) -> Result<(), Errno> {
    epoll::own_table()?;
    let numbers = watches.iter().map(|(_, _, watch)| watch.number);
    let above = numbers.max().unwrap_or(0).cast_signed().saturating_add(1);
    // First all of them out of the way, then every number is free to be taken.
    let mut moved: HashMap<i32, OwnedFd> = HashMap::new();
    for fd in watches.iter().flat_map(|(set, target, _)| [set, target]) {
        let raw = fd.as_fd().as_raw_fd();
        if let Entry::Vacant(place) = moved.entry(raw) {
            place.insert(fcntl::duplicate_from(fd, above)?);
        }
    }
    for (set, target, watch) in watches {
        let number = watch.number.cast_signed();
        let moved = |held: &Held<'_>| &moved[&held.as_fd().as_raw_fd()];
        let (set, target) = (moved(set), moved(target));
        epoll::place(target, number)?;
        epoll::add(set, number, watch.events, watch.data)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_from_fdinfo() {
        let line = "tfd:        3 events: 80000019 data: ffffffff00000003  pos:-1 ino:11 sdev:10";
        let target = parse_target(line, 9).expect("captured from a kernel");
        assert_eq!((target.id, target.tfd, target.events), (9, 3, 0x8000_0019));
        assert_eq!(target.data, 0xffff_ffff_0000_0003);
        assert_eq!((target.inode, target.dev), (Some(0x11), Some(0x10)));
        assert_eq!(target.pos, Some(u64::MAX));
        assert_eq!(parse_target("tfd: x events: 1 data: 1", 9), None);
    }

    #[test]
    fn a_signalfd_is_seen_through_nested_sets() {
        let targets = HashMap::from([
            (1, vec![(FdTypes::Eventpoll, 2), (FdTypes::Pipe, 9)]),
            (2, vec![(FdTypes::Eventpoll, 1), (FdTypes::Signalfd, 3)]),
            (4, vec![(FdTypes::Pipe, 3)]),
        ]);
        assert!(reaches_signalfd(1, &targets, &mut HashSet::new()));
        assert!(!reaches_signalfd(4, &targets, &mut HashSet::new()));
    }
}
