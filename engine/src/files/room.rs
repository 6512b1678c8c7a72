//! How many descriptors there may be: in this process while files are opened, and in the tables that the
//! tasks had.

use firn_proto::{FdTypes, FdinfoEntry};
use firn_sys::{Pid, rlimit};

use super::error::FileRestoreError;
use super::ids::IdMap;
use super::shelf::{NO_LIMIT, Room};
use super::store::FileStore;

impl FileStore {
    /// Makes room for the files of the tree in this process, as much as the tables need, if that may be.
    ///
    /// # Errors
    /// A task has a descriptor whose number is not possible here.
    pub(super) fn make_room(&mut self) -> Result<Room, FileRestoreError> {
        let highest = self
            .tables()
            .filter_map(|(_, table)| table.last()?.fd.into());
        let wanted = highest.max().map_or(0, |fd: u32| u64::from(fd) + 2);
        // Where that is forbidden the old limit may still do; the first file beyond it says so.
        self.limit = rlimit::raise_descriptor_limit(wanted).ok();
        let limit = match &self.limit {
            Some(raised) => raised.limit(),
            None => rlimit::descriptor_limit(),
        };
        let limit = limit.unwrap_or(NO_LIMIT);
        for (files_id, table) in self.tables() {
            if let Some(last) = table.last().filter(|fd| u64::from(fd.fd) >= limit) {
                return Err(self.beyond(files_id, last.fd, limit));
            }
        }
        Ok(Room::within(Some(limit), self.wanted_pids.clone()))
    }

    /// Refuses a table without a free number, where tasks need one to fetch their files with.
    pub(super) fn check_free_numbers(&self) -> Result<(), FileRestoreError> {
        if !self.opened.has_keepers() {
            return Ok(());
        }
        let limit = self.limit.as_ref().and_then(|raised| raised.limit());
        let limit = limit.or_else(rlimit::descriptor_limit).unwrap_or(NO_LIMIT);
        for (files_id, table) in self.tables() {
            if u64::from(free_number(table)) >= limit {
                let highest = table.last().map_or(0, |fd| fd.fd);
                return Err(self.beyond(files_id, highest, limit));
            }
        }
        Ok(())
    }

    fn beyond(&self, files_id: u32, number: u32, limit: u64) -> FileRestoreError {
        FileRestoreError::TooManyDescriptors {
            pid: self.task_with(files_id),
            number,
            limit,
            enough: u64::from(number) + 2,
        }
    }

    /// How many ends each pipe has among these files.
    pub(super) fn nr_ends(&self, keys: &[(FdTypes, u32)]) -> IdMap<u32, usize> {
        let mut nr_ends = IdMap::default();
        for pipe_id in keys.iter().filter_map(|key| self.pipe_of(*key)) {
            *nr_ends.entry(pipe_id).or_default() += 1;
        }
        nr_ends
    }

    /// Sorts files by number, but the ends of one pipe together: so few pipes are held at any time.
    pub(super) fn sort_for_opening(&self, keys: &mut [(FdTypes, u32)]) {
        keys.sort_unstable_by_key(|(_, id)| *id);
        let mut first: IdMap<u32, u32> = IdMap::default();
        for key in keys.iter() {
            if let Some(pipe_id) = self.pipe_of(*key) {
                first.entry(pipe_id).or_insert(key.1);
            }
        }
        keys.sort_by_key(|key| {
            let pipe_id = self.pipe_of(*key);
            pipe_id.map_or(key.1, |pipe_id| first[&pipe_id])
        });
    }

    fn pipe_of(&self, (kind, id): (FdTypes, u32)) -> Option<u32> {
        Some(self.entry(kind, id)?.pipe.as_ref()?.pipe_id)
    }

    fn task_with(&self, files_id: u32) -> Option<Pid> {
        let tasks = self.tasks_with_tables();
        let with = tasks.filter(|(_, table)| *table == files_id);
        with.map(|(pid, _)| pid).min()
    }
}

/// The lowest number that a table leaves free; it is sorted.
pub(super) fn free_number(table: &[FdinfoEntry]) -> u32 {
    free_numbers(table)
        .next()
        .expect("numbers are more than files")
}

/// The numbers that a table leaves free, ascending; it is sorted.
pub(super) fn free_numbers(table: &[FdinfoEntry]) -> impl Iterator<Item = u32> {
    let mut taken = table.iter().map(|fd| fd.fd).peekable();
    (0..).filter(move |number| {
        while taken.next_if(|taken| taken < number).is_some() {}
        taken.peek() != Some(number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_gap_is_free() {
        let table = |numbers: &[u32]| -> Vec<FdinfoEntry> {
            let entry = |&fd| FdinfoEntry {
                fd,
                ..FdinfoEntry::default()
            };
            numbers.iter().map(entry).collect()
        };
        assert_eq!(free_number(&table(&[])), 0);
        assert_eq!(free_number(&table(&[0, 1, 2])), 3);
        assert_eq!(free_number(&table(&[0, 2])), 1);
        assert_eq!(free_number(&table(&[1])), 0);
    }
}
