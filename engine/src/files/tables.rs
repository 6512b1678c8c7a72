//! The descriptor tables of a checkpoint, and which of them an open file is in first.
//!
//! What belongs to an open file and not to a descriptor (its owner, the targets of an epoll set) is given to
//! it once, by a task with the first table that it is in.

use std::collections::BTreeMap;

use firn_images::{ImageDir, ImageKind};
use firn_proto::FdinfoEntry;

use super::FileRestoreError;
use super::entries::{self, Entries};
use super::ids::IdMap;

/// All tables by files id.
pub(super) struct Tables {
    by_id: BTreeMap<u32, Vec<FdinfoEntry>>,
    /// Lowest files id of the tables that an open file is in, by its type and number.
    first: IdMap<(i32, u32), u32>,
}

impl Tables {
    /// Reads and checks all tables.
    ///
    /// # Errors
    /// Images that can't be read, or that contradict files.img.
    pub fn read(images: &ImageDir, known: &Entries) -> Result<Tables, FileRestoreError> {
        let mut by_id = BTreeMap::new();
        for file in images.files()? {
            if file.kind == ImageKind::Fdinfo {
                let mut reader = images.reader(ImageKind::Fdinfo, file.id)?;
                let mut table = entries::Table::default();
                while let Some(fd) = reader.next_entry()? {
                    table.add(fd, known)?;
                }
                let table = table.sorted();
                by_id.insert(u32::try_from(file.id).unwrap_or(u32::MAX), table);
            }
        }
        Ok(Tables::new(by_id))
    }

    fn new(by_id: BTreeMap<u32, Vec<FdinfoEntry>>) -> Tables {
        let mut first = IdMap::default();
        for (id, table) in &by_id {
            for fd in table {
                first.entry((fd.r#type, fd.id)).or_insert(*id);
            }
        }
        Tables { by_id, first }
    }

    /// The table with this files id, ascending by descriptor; empty if there is none.
    pub fn get(&self, files_id: u32) -> &[FdinfoEntry] {
        self.by_id.get(&files_id).map_or(&[], Vec::as_slice)
    }

    /// All tables by files id, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[FdinfoEntry])> {
        let tables = self.by_id.iter();
        tables.map(|(id, table)| (*id, table.as_slice()))
    }

    /// Whether no table before this one has the open file behind one of its entries.
    pub fn is_first(&self, files_id: u32, fd: &FdinfoEntry) -> bool {
        self.first.get(&(fd.r#type, fd.id)) == Some(&files_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_is_first_in_the_lowest_table() {
        let entry = |id, fd| FdinfoEntry {
            id,
            fd,
            ..FdinfoEntry::default()
        };
        let shared = entry(7, 3);
        let by_id = [
            (2, vec![shared.clone(), entry(8, 4)]),
            (1, vec![entry(7, 0), entry(7, 1)]),
        ];
        let tables = Tables::new(by_id.into());
        assert!(tables.is_first(1, &shared));
        assert!(!tables.is_first(2, &shared));
        assert!(tables.is_first(2, &entry(8, 4)));
        assert_eq!(tables.get(3), []);
    }
}
