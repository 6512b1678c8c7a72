//! Changed entries of the top image's table that are not in its file yet, in a memfd that outlives a
//! worker.
//!
//! ```text
//! 0..8 base | 8..16 first | 16..24 next | 4096.. entries: cluster (4 bytes), entry (4)
//! ```
//!
//! Entry number `n` stands at place `n - base`; those from `first` to `next` count. Each call ends with
//! one write of eight bytes that makes it count, so that a worker that is killed leaves whole entries.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use crate::PendingLog;

const BASE: u64 = 0;
const FIRST: u64 = 8;
const NEXT: u64 = 16;
const ENTRIES: u64 = 4096;

#[derive(Debug, Clone, Copy)]
struct Marks {
    base: u64,
    first: u64,
    next: u64,
}

/// The log.
#[derive(Debug)]
pub struct PendingFile {
    file: File,
    marks: Mutex<Marks>,
}

impl PendingFile {
    /// A new, empty memfd.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn create() -> io::Result<File> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file: File = rustix::fs::memfd_create("firn-ploop-pending", flags)?.into();
        file.set_len(ENTRIES)?;
        Ok(file)
    }

    /// Goes on with what an earlier worker left.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn open(file: File) -> io::Result<PendingFile> {
        let number = |at| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at)?;
            io::Result::Ok(u64::from_le_bytes(bytes))
        };
        let marks = Marks {
            base: number(BASE)?,
            first: number(FIRST)?,
            next: number(NEXT)?,
        };
        Ok(PendingFile {
            file,
            marks: Mutex::new(marks),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writing to a memfd fails for want of memory only. Then the entry would be lost with this process:
    /// better that it ends now, before anything was acknowledged.
    fn write(&self, bytes: &[u8], at: u64) {
        if let Err(error) = self.file.write_all_at(bytes, at) {
            eprintln!("the log of pending changes can't be written: {error}");
            std::process::abort();
        }
    }
}

fn place(marks: &Marks, number: u64) -> u64 {
    ENTRIES + (number - marks.base) * 8
}

impl PendingLog for PendingFile {
    fn record(&self, cluster: u32, entry: u32) {
        let mut marks = self.lock();
        if marks.first == marks.next && marks.base != marks.next {
            // Nothing counts: begin at the first place again.
            self.write(&marks.next.to_le_bytes(), BASE);
            marks.base = marks.next;
        }
        let row = [cluster.to_le_bytes(), entry.to_le_bytes()].concat();
        self.write(&row, place(&marks, marks.next));
        marks.next += 1;
        self.write(&marks.next.to_le_bytes(), NEXT);
    }

    fn position(&self) -> u64 {
        self.lock().next
    }

    fn forget(&self, until: u64) {
        let mut marks = self.lock();
        marks.first = until.clamp(marks.first, marks.next);
        self.write(&marks.first.to_le_bytes(), FIRST);
    }

    fn entries(&self) -> Vec<(u32, u32)> {
        let marks = *self.lock();
        let row = |number| {
            let mut row = [0; 8];
            self.file
                .read_exact_at(&mut row, place(&marks, number))
                .ok()?;
            let number =
                |at: usize| u32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]]);
            Some((number(0), number(4)))
        };
        (marks.first..marks.next).filter_map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_forgotten_outlives_the_process() {
        let file = PendingFile::create().unwrap();
        let log = PendingFile::open(file.try_clone().unwrap()).unwrap();
        log.record(5, 1);
        log.record(6, 2);
        let position = log.position();
        log.record(5, 0);
        log.forget(position);
        let again = PendingFile::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(again.entries(), [(5, 0)]);
        again.forget(again.position());
        again.record(7, 3);
        let third = PendingFile::open(file).unwrap();
        assert_eq!((third.entries(), third.position()), (vec![(7, 3)], 4));
    }
}
