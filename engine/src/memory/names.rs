//! Names that programs give to memory without a file, for people who look at their maps.
//!
//! maps shows `[anon:NAME]`, or `[anon_shmem:NAME]` for shared memory. Kernels without the option refuse to
//! take a name; nothing but that line depends on it, so the restore goes on.
//!
//! Source: man 2 PR_SET_VMA (Linux 5.17, CONFIG_ANON_VMA_NAME; shared memory 6.2).

use firn_proto::{FirnVmaName, MmEntry};
use firn_sys::nr;

use super::range::AddressRange;
use super::smaps::Mapping;
use super::vma::Vma;
use crate::program::{Program, Rule};

const PR_SET_VMA: u32 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: u32 = 0;
const EINVAL: i32 = 22;
/// Longest name that the kernel takes.
const MAX_LEN: usize = 79;

/// A mapping with a name.
pub type Named = (AddressRange, Vec<u8>);

/// The given name in what maps shows.
pub fn given(shown: &[u8]) -> Option<&[u8]> {
    let private = shown.strip_prefix(b"[anon:");
    let inner = private.or_else(|| shown.strip_prefix(b"[anon_shmem:"))?;
    inner.strip_suffix(b"]")
}

/// The names of an address space.
pub fn to_image(mappings: &[Mapping]) -> Vec<FirnVmaName> {
    let named = mappings.iter().filter_map(|mapping| {
        Some(FirnVmaName {
            start: mapping.range.start,
            name: given(&mapping.name)?.to_vec(),
        })
    });
    named.collect()
}

/// The names of an image, with their mappings; what can't be a name of one of them is left out.
pub fn from_image(mm: &MmEntry, vmas: &[Vma]) -> Vec<Named> {
    let names = mm.firn.iter().flat_map(|firn| &firn.names);
    let named = names.filter_map(|entry| {
        let at = vmas.binary_search_by_key(&entry.start, |vma| vma.range.start);
        let is_name = entry.name.len() <= MAX_LEN && !entry.name.contains(&0);
        is_name.then_some((vmas[at.ok()?].range, entry.name.clone()))
    });
    named.collect()
}

/// Adds the calls that give the names.
pub fn plan(p: &mut Program, names: &[Named]) {
    for (range, name) in names {
        let text = p.string(name);
        let args = [
            PR_SET_VMA.into(),
            PR_SET_VMA_ANON_NAME.into(),
            range.start.into(),
            range.len().into(),
            text.into(),
        ];
        let why = format!("naming [{range}]");
        p.call(nr::PRCTL, &args, Rule::OkOr(EINVAL), why);
    }
}

#[cfg(test)]
mod tests {
    use firn_proto::FirnMmEntry;

    use super::*;
    use crate::memory::smaps;

    #[test]
    fn names_go_into_an_image_and_come_back() {
        let text = b"1000-3000 rw-p 0 00:00 0                          [anon:a heap]\n\
                     3000-4000 rw-p 0 00:00 0                          [heap]\n\
                     5000-6000 rw-s 0 00:01 9                          [anon_shmem:one]x]\n";
        let mappings = smaps::parse(text).expect("text");
        let mm = MmEntry {
            firn: Some(FirnMmEntry {
                names: to_image(&mappings),
                ..FirnMmEntry::default()
            }),
            ..MmEntry::default()
        };
        let vma = |mapping: &Mapping| {
            crate::memory::classify::describe(mapping, crate::memory::classify::Backing::Memory)
        };
        let vmas: Vec<Vma> = mappings.iter().map(vma).collect();
        let names = from_image(&mm, &vmas);
        let wanted = [
            (AddressRange::new(0x1000, 0x3000), b"a heap".to_vec()),
            (AddressRange::new(0x5000, 0x6000), b"one]x".to_vec()),
        ];
        assert_eq!(names, wanted);
        assert_eq!(from_image(&mm, &vmas[1..2]), []);
    }

    #[test]
    fn only_given_names_are_names() {
        for shown in [&b"[heap]"[..], b"[anon:x", b"/anon:x]", b""] {
            assert_eq!(given(shown), None);
        }
    }
}
