//! The build id of an ELF file, as images store it.
//!
//! ```text
//! note: name size u32 | descriptor size u32 | type u32 = 3 | "GNU\0" | descriptor, 4-byte aligned
//! ```
//!
//! The descriptor's bytes are copied into u32 words, the last one padded with zeros.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use firn_sys::file::Stat;

/// The longest build id that is believed; linkers write 16 or 20 bytes.
const MAX_BYTES: usize = 256;
/// The largest note segment and program header table that are read.
const MAX_TABLE: u64 = 1 << 20;
/// What is read of a file at once.
const HEAD_LEN: usize = 4096;
const PT_NOTE: u64 = 4;
const NT_GNU_BUILD_ID: u64 = 3;

/// Build ids seen so far, by device and inode.
#[derive(Debug, Default)]
pub(super) struct BuildIds {
    known: HashMap<(u64, u64), Vec<u32>>,
}

impl BuildIds {
    /// The build id of the file behind `path`; empty where it has none.
    pub(super) fn get(&mut self, path: &Path, stat: &Stat) -> Vec<u32> {
        let key = (stat.dev, stat.ino);
        self.known.entry(key).or_insert_with(|| read(path)).clone()
    }
}

/// Reads the build id of the file; empty where it has none.
pub(super) fn read(path: &Path) -> Vec<u32> {
    let id = File::open(path).ok().and_then(|file| find(&file));
    id.map_or(Vec::new(), |bytes| to_words(&bytes))
}

fn to_words(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks(4)
        .map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        })
        .collect()
}

/// Widths and places of what differs between 32-bit and 64-bit files.
struct Layout {
    word: usize,
    table_at: usize,
    entry_size_at: usize,
    segment_offset: usize,
    segment_size: usize,
}

const ELF32: Layout = Layout {
    word: 4,
    table_at: 28,
    entry_size_at: 42,
    segment_offset: 4,
    segment_size: 16,
};
const ELF64: Layout = Layout {
    word: 8,
    table_at: 32,
    entry_size_at: 54,
    segment_offset: 8,
    segment_size: 32,
};

fn find(file: &File) -> Option<Vec<u8>> {
    let head = Head::read(file)?;
    let header = head.bytes.get(..64)?;
    // Little-endian only: the notes of a foreign byte order identify nothing that runs here.
    let layout = match &header[..6] {
        b"\x7fELF\x01\x01" => &ELF32,
        b"\x7fELF\x02\x01" => &ELF64,
        _ => return None,
    };
    let entry_size = number(header, layout.entry_size_at, 2)?;
    let nr_entries = number(header, layout.entry_size_at + 2, 2)?;
    let table_at = number(header, layout.table_at, layout.word)?;
    let table = head.range(table_at, entry_size * nr_entries)?;
    let entry_size = usize::try_from(entry_size)
        .ok()
        .filter(|size| *size >= 32)?;
    table.chunks_exact(entry_size).find_map(|segment| {
        if number(segment, 0, 4)? != PT_NOTE {
            return None;
        }
        let offset = number(segment, layout.segment_offset, layout.word)?;
        let size = number(segment, layout.segment_size, layout.word)?;
        build_id_note(&head.range(offset, size)?)
    })
}

/// The beginning of a file, which has all that is wanted of most.
struct Head<'a> {
    file: &'a File,
    bytes: Vec<u8>,
}

impl Head<'_> {
    fn read(file: &File) -> Option<Head<'_>> {
        let mut bytes = vec![0; HEAD_LEN];
        let got = file.read_at(&mut bytes, 0).ok()?;
        bytes.truncate(got);
        Some(Head { file, bytes })
    }

    fn range(&self, offset: u64, len: u64) -> Option<Vec<u8>> {
        let len = usize::try_from(len.min(MAX_TABLE)).ok()?;
        let start = usize::try_from(offset).ok()?;
        if let Some(bytes) = self.bytes.get(start..start.checked_add(len)?) {
            return Some(bytes.to_vec());
        }
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset).ok()?;
        Some(bytes)
    }
}

fn build_id_note(mut notes: &[u8]) -> Option<Vec<u8>> {
    loop {
        let name_len = usize::try_from(number(notes, 0, 4)?).ok()?;
        let len = usize::try_from(number(notes, 4, 4)?).ok()?;
        let kind = number(notes, 8, 4)?;
        let start = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let end = start.checked_add(len)?;
        if kind == NT_GNU_BUILD_ID && len <= MAX_BYTES && notes.get(12..16)? == b"GNU\0" {
            return notes.get(start..end).map(<[u8]>::to_vec);
        }
        notes = notes.get(end.checked_next_multiple_of(4)?..)?;
    }
}

fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let mut word = [0; 8];
    word[..width].copy_from_slice(bytes.get(at..at.checked_add(width)?)?);
    Some(u64::from_le_bytes(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for value in [name.len(), desc.len()] {
            out.extend(u32::try_from(value).expect("short").to_le_bytes());
        }
        out.extend(kind.to_le_bytes());
        for part in [name, desc] {
            out.extend(part);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    #[test]
    fn the_build_id_is_found_behind_other_notes() {
        let mut notes = note(b"GNU\0", 1, &[0; 16]);
        notes.extend(note(b"GNU\0", 3, &[1, 2, 3, 4, 5, 6]));
        let id = build_id_note(&notes).expect("a build id");
        assert_eq!(to_words(&id), [0x0403_0201, 0x0605]);
        assert_eq!(build_id_note(&note(b"Go\0\0", 4, b"x")), None);
    }

    #[test]
    fn libc_has_one_and_a_text_file_has_none() {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let libc = maps.lines().find_map(|line| {
            let path = line.split_whitespace().nth(5)?;
            path.contains("libc.so").then_some(path)
        });
        if let Some(libc) = libc {
            assert_eq!(read(Path::new(libc)).len(), 5);
        }
        assert!(read(Path::new("/proc/self/maps")).is_empty());
    }

    proptest! {
        #[test]
        fn rubbish_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            build_id_note(&bytes);
        }
    }
}
