//! Open files of an operation, of which there may be more than one process may have.
//!
//! A shelf holds its files in this process as long as they are few. When they take up its share of the limit
//! (RLIMIT_NOFILE), all of them go to a child that only keeps them ([`Keeper`]), and the place is free for
//! others. Whoever needs one afterwards fetches it from there: this process for a moment, a task for good.
//! So a restore takes no more descriptors in any process than the tasks themselves have, however many the
//! tree has together.

use std::collections::HashSet;
use std::hash::Hash;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use firn_proto::FdTypes;
use firn_sys::keeper::Keeper;
use firn_sys::{Errno, Pid};

use super::ids::IdMap;

/// One of so many descriptors that a process may have is on a shelf.
const SHARE: u64 = 2;
/// More descriptors than the kernel lets a process have, whatever its limit (the largest `fs.nr_open`).
pub(super) const NO_LIMIT: u64 = 1 << 30;

/// Files of files.img that are open, by type and number.
pub(super) type OpenedFiles = Shelf<(FdTypes, u32)>;

/// Open files by key.
#[derive(Debug)]
pub(super) struct Shelf<K> {
    here: IdMap<K, OwnedFd>,
    away: IdMap<K, Away>,
    keepers: Vec<Keeper>,
    room: Room,
}

/// How many files a shelf holds in this process, and which pids its children must not take.
#[derive(Debug, Clone, Default)]
pub(super) struct Room {
    /// None: any number.
    pub(super) nr_here: Option<usize>,
    /// From this number on little is left of what the process may have; descriptors get the lowest.
    pub(super) crowded_from: Option<RawFd>,
    /// Pids that the tree is going to have.
    pub(super) wanted_pids: Arc<HashSet<Pid>>,
}

/// Where a file is kept.
#[derive(Debug, Clone, Copy)]
struct Away {
    keeper: usize,
    /// Its number there.
    number: RawFd,
}

/// A file of a shelf, open in this process at least for the moment.
#[derive(Debug)]
pub(super) enum Held<'a> {
    /// It is here.
    Here(BorrowedFd<'a>),
    /// It was fetched.
    Fetched(OwnedFd),
}

/// Where a task finds a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// In the table that it inherits, under this number.
    Inherited(RawFd),
    /// With another process, under this number.
    With(Pid, RawFd),
}

/// Why a file could not be kept elsewhere.
#[derive(Debug, thiserror::Error)]
pub enum ShelfError {
    /// Nobody could be made to keep it.
    #[error("cannot make a process that keeps open files")]
    Keeper(#[source] Errno),
    /// Its keeper did not give it back.
    #[error("cannot fetch an open file from its keeper")]
    Fetch(#[source] Errno),
}

impl Room {
    /// The room that a process with that limit of descriptors has; the others are for connections under way, mapped
    /// files and what else an operation needs.
    pub(super) fn within(limit: Option<u64>, wanted_pids: Arc<HashSet<Pid>>) -> Room {
        let limit = limit.unwrap_or(NO_LIMIT);
        Room {
            nr_here: usize::try_from(limit / SHARE).ok(),
            crowded_from: i32::try_from(limit / 4 * 3).ok(),
            wanted_pids,
        }
    }

    /// Whether so many files are enough before another one, which has this number.
    fn is_full(&self, nr_files: usize, number: RawFd) -> bool {
        let Some(most) = self.nr_here else {
            return false;
        };
        let is_crowded = self.crowded_from.is_some_and(|from| number >= from);
        // A keeper takes a descriptor itself, so it is worth it for many only.
        nr_files >= most || is_crowded && nr_files >= most.div_ceil(4)
    }

    /// A part of this room for another shelf: one file in `parts`.
    pub(super) fn part(&self, parts: usize) -> Room {
        Room {
            nr_here: self.nr_here.map(|nr| (nr / parts).max(1)),
            ..self.clone()
        }
    }
}

impl<K> Default for Shelf<K> {
    fn default() -> Self {
        Shelf::new(Room::default())
    }
}

impl<K> Shelf<K> {
    /// An empty shelf.
    pub(super) fn new(room: Room) -> Shelf<K> {
        Shelf {
            here: IdMap::default(),
            away: IdMap::default(),
            keepers: Vec::new(),
            room,
        }
    }

    /// Whether some files are kept by others than this process.
    pub(super) fn has_keepers(&self) -> bool {
        !self.keepers.is_empty()
    }
}

impl<K: Copy + Eq + Hash> Shelf<K> {
    /// Puts a file on the shelf, in the place of what has the key.
    ///
    /// # Errors
    /// The shelf is full and nobody can be made to keep its files.
    pub(super) fn insert(&mut self, key: K, fd: OwnedFd) -> Result<(), ShelfError> {
        if self.room.is_full(self.here.len(), fd.as_raw_fd()) {
            self.give_away(|_| true)?;
        }
        self.away.remove(&key);
        self.here.insert(key, fd);
        Ok(())
    }

    /// Keys of all files, in no order.
    pub(super) fn keys(&self) -> impl Iterator<Item = K> {
        self.here.keys().chain(self.away.keys()).copied()
    }

    /// The number of a file in this process, if it is here.
    pub(super) fn number_here(&self, key: &K) -> Option<RawFd> {
        self.here.get(key).map(AsRawFd::as_raw_fd)
    }

    /// Whether there is a file.
    pub(super) fn contains(&self, key: &K) -> bool {
        self.here.contains_key(key) || self.away.contains_key(key)
    }

    /// A file.
    ///
    /// # Errors
    /// It is kept elsewhere and can't be fetched.
    pub(super) fn get(&self, key: &K) -> Result<Option<Held<'_>>, ShelfError> {
        if let Some(fd) = self.here.get(key) {
            return Ok(Some(Held::Here(fd.as_fd())));
        }
        self.fetch(key).map(|fetched| fetched.map(Held::Fetched))
    }

    /// Takes a file off the shelf. Where it was kept elsewhere, its keeper has a duplicate until the end.
    ///
    /// # Errors
    /// As [`Shelf::get`].
    pub(super) fn remove(&mut self, key: &K) -> Result<Option<OwnedFd>, ShelfError> {
        if let Some(fd) = self.here.remove(key) {
            return Ok(Some(fd));
        }
        let fetched = self.fetch(key)?;
        self.away.remove(key);
        Ok(fetched)
    }

    fn fetch(&self, key: &K) -> Result<Option<OwnedFd>, ShelfError> {
        let Some(away) = self.away.get(key) else {
            return Ok(None);
        };
        let fetched = self.keepers[away.keeper].get(away.number);
        fetched.map(Some).map_err(ShelfError::Fetch)
    }

    /// Where a task finds a file: all are with others than its parents, or none is.
    pub(super) fn source(&self, key: &K) -> Option<Source> {
        let here = self.here.get(key).map(AsRawFd::as_raw_fd);
        let away = self.away.get(key).map(|away| {
            let keeper = self.keepers[away.keeper].pid();
            Source::With(keeper, away.number)
        });
        match here {
            Some(number) if self.has_keepers() => Some(Source::With(Pid::this(), number)),
            Some(number) => Some(Source::Inherited(number)),
            None => away,
        }
    }

    /// Ends the filling of the shelf. Where files went to others, all the rest does too, so that the tasks
    /// inherit few; except those that `stay`, which come back.
    ///
    /// # Errors
    /// As [`Shelf::insert`] and [`Shelf::get`].
    pub(super) fn settle(&mut self, stay: impl Fn(&K) -> bool) -> Result<(), ShelfError> {
        if !self.has_keepers() {
            return Ok(());
        }
        self.give_away(|key| !stay(key))?;
        let back: Vec<K> = self.away.keys().copied().filter(|key| stay(key)).collect();
        for key in back {
            if let Some(fd) = self.remove(&key)? {
                self.here.insert(key, fd);
            }
        }
        Ok(())
    }

    /// Gives files to a new keeper.
    fn give_away(&mut self, goes: impl Fn(&K) -> bool) -> Result<(), ShelfError> {
        let going: Vec<K> = self.here.keys().copied().filter(|key| goes(key)).collect();
        if going.is_empty() {
            return Ok(());
        }
        let fds: Vec<BorrowedFd<'_>> = going.iter().map(|key| self.here[key].as_fd()).collect();
        let keeper = make_keeper(&fds, &self.room.wanted_pids).map_err(ShelfError::Keeper)?;
        for key in going {
            let fd = self.here.remove(&key).expect("listed above");
            let number = fd.as_raw_fd();
            let keeper = self.keepers.len();
            self.away.insert(key, Away { keeper, number });
        }
        self.keepers.push(keeper);
        Ok(())
    }
}

/// Makes a keeper whose pid no task is going to need.
fn make_keeper(fds: &[BorrowedFd<'_>], wanted: &HashSet<Pid>) -> firn_sys::Result<Keeper> {
    // Those with a wanted pid live until there is another one, or it would come again.
    let mut in_the_way = Vec::new();
    loop {
        let keeper = Keeper::of(fds)?;
        if !wanted.contains(&keeper.pid()) {
            return Ok(keeper);
        }
        in_the_way.push(keeper);
    }
}

impl AsFd for Held<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Held::Here(fd) => *fd,
            Held::Fetched(fd) => fd.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firn_sys::eventfd;

    fn shelf_of(nr: u32, nr_here: usize) -> Shelf<u32> {
        let mut shelf = Shelf::new(Room {
            nr_here: Some(nr_here),
            ..Room::default()
        });
        for key in 0..nr {
            let fd = eventfd::create(u64::from(key) + 1, false).expect("an eventfd");
            shelf.insert(key, fd).expect("room with a keeper");
        }
        shelf
    }

    fn value(held: &Held<'_>) -> u64 {
        let fd = held.as_fd().try_clone_to_owned().expect("room");
        let mut bytes = [0; 8];
        let mut file = std::fs::File::from(fd);
        std::io::Read::read_exact(&mut file, &mut bytes).expect("an eventfd");
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn more_files_than_have_room_are_found_again() {
        let mut shelf = shelf_of(10, 3);
        assert_eq!((shelf.keepers.len(), shelf.here.len()), (3, 1));
        for key in 0..10 {
            let held = shelf.get(&key).expect("fetched").expect("on the shelf");
            assert_eq!(value(&held), u64::from(key) + 1);
        }
        assert!(shelf.remove(&4).expect("fetched").is_some());
        assert!(!shelf.contains(&4));
        assert!(shelf.get(&4).expect("nothing to fetch").is_none());
    }

    #[test]
    fn others_may_leave_less_room() {
        let room = Room {
            nr_here: Some(160),
            crowded_from: Some(1000),
            ..Room::default()
        };
        assert!(!room.is_full(159, 999) && room.is_full(160, 5));
        assert!(!room.is_full(39, 1000) && room.is_full(40, 1000));
        assert!(!Room::default().is_full(1_000_000, 1_000_000));
    }

    #[test]
    fn tasks_inherit_all_or_nothing() {
        let few = shelf_of(3, 3);
        assert!(matches!(few.source(&2), Some(Source::Inherited(_))));
        let mut many = shelf_of(5, 3);
        many.settle(|key| *key == 1).expect("fetched");
        let here = many.here[&1].as_raw_fd();
        assert_eq!(many.source(&1), Some(Source::With(Pid::this(), here)));
        for key in [0, 2, 3, 4] {
            let keeper =
                matches!(many.source(&key), Some(Source::With(pid, _)) if pid != Pid::this());
            assert!(keeper, "file {key}");
        }
        assert_eq!(many.source(&9), None);
    }

    #[test]
    fn a_keeper_takes_no_wanted_pid() {
        let keeper = Keeper::of(&[]).expect("a child");
        let next: HashSet<Pid> = (1..4)
            .map(|nr| Pid::from_raw(keeper.pid().raw() + nr))
            .collect();
        let other = make_keeper(&[], &next).expect("a child");
        assert!(!next.contains(&other.pid()));
    }
}
