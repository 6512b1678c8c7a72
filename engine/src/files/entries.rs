//! files.img, and whether the tables refer to what it holds.

use firn_images::{ImageDir, ImageKind};
use firn_proto::{FdTypes, FdinfoEntry, FileEntry, RegFileEntry};

use super::error::FileRestoreError;
use super::ids::{IdMap, IdSet};
use super::kind;

/// Entries of files.img by type and number.
#[derive(Debug, Default)]
pub(super) struct Entries {
    /// Entries are large, so they are not moved about.
    by_id: IdMap<(FdTypes, u32), Box<FileEntry>>,
}

impl Entries {
    /// All entries, in no order.
    pub(super) fn all(&self) -> impl Iterator<Item = &FileEntry> {
        self.by_id.values().map(Box::as_ref)
    }

    /// Types and numbers of all entries, in no order.
    pub(super) fn keys(&self) -> impl Iterator<Item = (FdTypes, u32)> {
        self.by_id.keys().copied()
    }

    /// The entry of that type and number.
    pub(super) fn get(&self, fd_type: FdTypes, id: u32) -> Option<&FileEntry> {
        self.by_id.get(&(fd_type, id)).map(Box::as_ref)
    }

    /// Reads files.img.
    pub(super) fn read(images: &ImageDir) -> Result<Entries, FileRestoreError> {
        let mut entries = Entries::default();
        let Some(mut reader) = images.reader_if_there(ImageKind::Files, 0)? else {
            return Ok(entries);
        };
        while let Some(entry) = reader.next_entry::<FileEntry>()?.map(Box::new) {
            let id = entry.id;
            let fd_type = type_of(entry.r#type, id)?;
            let regular = entry.reg.as_ref().map(|reg| reg.id);
            let inner = regular.or(entry.pidfd.map(|pidfd| pidfd.id));
            if inner.is_some_and(|inner| inner != id) {
                return Err(FileRestoreError::corrupt(id, "its two numbers differ"));
            }
            if entries.by_id.insert((fd_type, id), entry).is_some() {
                return Err(FileRestoreError::corrupt(id, "it is there twice"));
            }
        }
        Ok(entries)
    }

    /// Entries of files that were opened by a name which is gone, with that name.
    pub(super) fn removed_names(&self) -> impl Iterator<Item = (&RegFileEntry, &[u8])> {
        self.regular().filter_map(|entry| {
            let removed = entry.firn.as_ref()?.removed_name.as_ref()?;
            Some((entry, removed.as_slice()))
        })
    }

    /// Entries that are opened by path.
    pub(super) fn regular(&self) -> impl Iterator<Item = &RegFileEntry> {
        self.all().filter_map(|entry| entry.reg.as_ref())
    }
}

fn type_of(raw: i32, id: u32) -> Result<FdTypes, FileRestoreError> {
    FdTypes::try_from(raw)
        .map_err(|_| FileRestoreError::corrupt(id, format!("there is no kind {raw}")))
}

/// A descriptor table that is being read: nothing wrong gets into it, so that it does not grow without end.
#[derive(Debug, Default)]
pub(super) struct Table {
    fds: Vec<FdinfoEntry>,
    numbers: IdSet<u32>,
}

impl Table {
    /// Adds a descriptor, which has to lead to an entry of a kind that is restored.
    pub(super) fn add(
        &mut self,
        fd: FdinfoEntry,
        entries: &Entries,
    ) -> Result<(), FileRestoreError> {
        let fd_type = type_of(fd.r#type, fd.id)?;
        if kind::of_type(fd_type).is_none() {
            return Err(unsupported(fd_type, fd.id));
        }
        if entries.get(fd_type, fd.id).is_none() {
            return Err(FileRestoreError::corrupt(
                fd.id,
                "a table has it and files.img does not",
            ));
        }
        if i32::try_from(fd.fd).is_err() {
            let what = format!("descriptor number {} is not possible", fd.fd);
            return Err(FileRestoreError::corrupt(fd.id, what));
        }
        if !self.numbers.insert(fd.fd) {
            let what = format!("descriptor {} stands in its table twice", fd.fd);
            return Err(FileRestoreError::corrupt(fd.id, what));
        }
        self.fds.push(fd);
        Ok(())
    }

    /// All descriptors, ascending.
    pub(super) fn sorted(mut self) -> Vec<FdinfoEntry> {
        self.fds.sort_unstable_by_key(|fd| fd.fd);
        self.fds
    }
}

/// An entry of a kind that is not restored.
pub(super) fn unsupported(fd_type: FdTypes, id: u32) -> FileRestoreError {
    FileRestoreError::Unsupported {
        id,
        kind: fd_type.as_str_name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_tables_are_refused() {
        let mut entries = Entries::default();
        let key = (FdTypes::Reg, 7);
        entries.by_id.insert(key, Box::default());
        let fd = |fd, id| FdinfoEntry {
            id,
            fd,
            r#type: FdTypes::Reg.into(),
            ..FdinfoEntry::default()
        };
        let said = |fds: &[FdinfoEntry]| {
            let mut table = Table::default();
            let added = fds
                .iter()
                .try_for_each(|fd| table.add(fd.clone(), &entries));
            added
                .map_err(|error| error.to_string())
                .map(|()| table.sorted())
        };
        assert_eq!(said(&[fd(3, 7), fd(0, 7)]), Ok(vec![fd(0, 7), fd(3, 7)]));
        for (table, what) in [
            (
                [fd(0, 7), fd(0, 7)],
                "descriptor 0 stands in its table twice",
            ),
            ([fd(0, 7), fd(u32::MAX, 7)], "is not possible"),
            ([fd(0, 7), fd(1, 8)], "files.img does not"),
        ] {
            let error = said(&table).expect_err("it can't be made");
            assert!(error.contains(what), "{error}");
        }
    }
}
