//! The kernel's own types, as it describes them (BTF): where members are, and of what type.
//!
//! ```text
//! header   magic 0xeb9f, u8 version, u8 flags, u32 header length, then offset and length of
//!          types and of strings, both counted from the header's end
//! type     u32 name, u32 info, u32 size or type, then by kind:
//!          array   u32 element, index, count        struct, union   u32 name, type, offset in bits each
//! info     bits 0-15 number of members, 24-28 kind, 31 offsets hold the size of bit fields, too
//! ```
//!
//! Types are numbered from 1 in their order; 0 is void.
//!
//! Source: linux Documentation/bpf/btf.rst.

use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;
const HEADER_LEN: usize = 24;
const POINTER: u32 = 2;
const ARRAY: u32 = 3;
const ENUM: u32 = 6;
const ENUM64: u32 = 19;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
/// More than any kernel's description has.
const MAX_LEN: usize = 64 << 20;
/// Deeper than any chain of types is.
const MAX_DEPTH: usize = 32;

/// Number of a type.
pub(super) type TypeId = u32;

/// Where a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member {
    /// From the beginning of the structure.
    pub(super) bit_offset: u64,
    /// Bits of a bit field; 0 for an ordinary member.
    pub(super) bits: u32,
    /// Its type.
    pub(super) of: TypeId,
}

/// The types of a kernel.
#[derive(Debug)]
pub(super) struct Types {
    bytes: Vec<u8>,
    strings: usize,
    /// Where each type begins; the first is void.
    starts: Vec<usize>,
    /// Structures by name.
    named: HashMap<&'static str, TypeId>,
}

impl Types {
    /// Reads a description; `names` are those of the structures that will be asked for.
    pub(super) fn parse(bytes: Vec<u8>, names: &[&'static str]) -> Option<Types> {
        if bytes.len() > MAX_LEN || bytes.get(..2)? != MAGIC.to_le_bytes() {
            return None;
        }
        let word = |at| word_of(&bytes, at);
        let header = index(word(4)?)?.max(HEADER_LEN);
        let begin = header.checked_add(index(word(8)?)?)?;
        let end = begin.checked_add(index(word(12)?)?)?;
        let strings = header.checked_add(index(word(16)?)?)?;
        let mut starts = vec![0];
        let mut at = begin;
        while at < end {
            starts.push(at);
            let info = word(at + 4)?;
            at = at.checked_add(12 + tail_len(info)?)?;
        }
        let mut types = Types {
            bytes,
            strings,
            starts,
            named: HashMap::new(),
        };
        for id in 1..types.starts.len() {
            let id = u32::try_from(id).ok()?;
            let found = |name: &&&str| types.name(id) == Some(name.as_bytes());
            if types.kind(id) == Some(STRUCT)
                && let Some(name) = names.iter().find(found)
            {
                types.named.entry(name).or_insert(id);
            }
        }
        Some(types)
    }

    /// The structure of that name, which was among those to be asked for.
    pub(super) fn structure(&self, name: &str) -> Option<TypeId> {
        self.named.get(name).copied()
    }

    /// A member, or one of a member: `a.b`. Structures and unions without a name are looked
    /// through, and of an array the first element is meant.
    pub(super) fn member(&self, of: TypeId, path: &str) -> Option<Member> {
        let mut found = Member {
            bit_offset: 0,
            bits: 0,
            of,
        };
        for name in path.split('.') {
            let inner = self.find(found.of, name.as_bytes(), 0)?;
            found = Member {
                bit_offset: found.bit_offset + inner.bit_offset,
                ..inner
            };
        }
        Some(found)
    }

    /// What a pointer points to.
    pub(super) fn target(&self, id: TypeId) -> Option<TypeId> {
        let id = self.bare(id)?;
        (self.kind(id)? == POINTER).then(|| self.operand(id))?
    }

    /// What an array is of.
    pub(super) fn element(&self, id: TypeId) -> Option<TypeId> {
        let id = self.bare(id)?;
        let is_array = self.kind(id)? == ARRAY;
        is_array.then(|| word_of(&self.bytes, self.start(id)? + 12))?
    }

    /// Bytes of a type; of an array, those of an element.
    pub(super) fn len(&self, id: TypeId) -> Option<u64> {
        let id = self.bare(id)?;
        match self.kind(id)? {
            POINTER => Some(8),
            ARRAY => self.len(self.element(id)?),
            _ => self.operand(id).map(u64::from),
        }
    }

    /// Values of enumerators by name, in that order; None for one that no enumeration has.
    pub(super) fn constants(&self, names: &[&str]) -> Vec<Option<u64>> {
        let mut values = vec![None; names.len()];
        for start in self.starts.iter().skip(1) {
            let info = word_of(&self.bytes, start + 4).unwrap_or(0);
            let len = match kind_of(info) {
                ENUM => 8,
                ENUM64 => 12,
                _ => continue,
            };
            for nth in 0..index(info & 0xffff).unwrap_or(0) {
                let at = start + 12 + len * nth;
                let word = |nth: usize| word_of(&self.bytes, at + 4 * nth);
                let name = word(0).and_then(|name| self.string(name));
                let Some(place) = names.iter().position(|of| Some(of.as_bytes()) == name) else {
                    continue;
                };
                let high = if len == 12 { word(2) } else { Some(0) };
                let value = word(1).zip(high);
                values[place] = value.map(|(low, high)| u64::from(low) | u64::from(high) << 32);
            }
        }
        values
    }

    fn find(&self, of: TypeId, name: &[u8], depth: usize) -> Option<Member> {
        let of = self.bare(of)?;
        let of = self.element(of).map_or(Some(of), |one| self.bare(one))?;
        let start = self.start(of)?;
        let info = word_of(&self.bytes, start + 4)?;
        if !matches!(kind_of(info), STRUCT | UNION) || depth > MAX_DEPTH {
            return None;
        }
        let has_bits = info >> 31 != 0;
        for nth in 0..index(info & 0xffff)? {
            let at = start + 12 + 12 * nth;
            let place = word_of(&self.bytes, at + 8)?;
            let member = Member {
                bit_offset: u64::from(if has_bits { place & 0xff_ffff } else { place }),
                bits: if has_bits { place >> 24 } else { 0 },
                of: word_of(&self.bytes, at + 4)?,
            };
            let own = self.string(word_of(&self.bytes, at)?)?;
            if own == name {
                return Some(member);
            }
            if own.is_empty()
                && let Some(inner) = self.find(member.of, name, depth + 1)
            {
                let bit_offset = member.bit_offset + inner.bit_offset;
                return Some(Member {
                    bit_offset,
                    ..inner
                });
            }
        }
        None
    }

    /// A type without its typedefs and qualifiers.
    fn bare(&self, mut id: TypeId) -> Option<TypeId> {
        for _ in 0..MAX_DEPTH {
            // typedef, volatile, const, restrict, type tag
            if !matches!(self.kind(id)?, 8..=11 | 18) {
                return Some(id);
            }
            id = self.operand(id)?;
        }
        None
    }

    fn start(&self, id: TypeId) -> Option<usize> {
        self.starts.get(index(id)?).copied().filter(|at| *at > 0)
    }

    fn kind(&self, id: TypeId) -> Option<u32> {
        word_of(&self.bytes, self.start(id)? + 4).map(kind_of)
    }

    /// Size, or the type that this one is made of.
    fn operand(&self, id: TypeId) -> Option<u32> {
        word_of(&self.bytes, self.start(id)? + 8)
    }

    fn name(&self, id: TypeId) -> Option<&[u8]> {
        self.string(word_of(&self.bytes, self.start(id)?)?)
    }

    fn string(&self, offset: u32) -> Option<&[u8]> {
        let rest = self
            .bytes
            .get(self.strings.checked_add(index(offset)?)?..)?;
        rest.split(|byte| *byte == 0).next()
    }
}

fn kind_of(info: u32) -> u32 {
    info >> 24 & 31
}

/// Bytes behind the first twelve of a type.
fn tail_len(info: u32) -> Option<usize> {
    let count = index(info & 0xffff)?;
    Some(match kind_of(info) {
        // integer, variable, declaration tag
        1 | 14 | 17 => 4,
        ARRAY => 12,
        STRUCT | UNION | 15 | ENUM64 => 12 * count,
        // enumeration, function's parameters
        ENUM | 13 => 8 * count,
        0..=19 => 0,
        _ => return None,
    })
}

fn word_of(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn index(number: u32) -> Option<usize> {
    usize::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { u32 a; union { u32 b; struct outer *c; }; u32 bit:1; u32 other:2; }`,
    /// `enum { first = 3, last = 1 << 32 }`
    fn small() -> Vec<u8> {
        let strings = b"\0outer\0a\0b\0c\0bit\0other\0u32\0first\0last\0";
        let at = |name: &[u8]| {
            let found = strings.windows(name.len() + 2);
            let mut found = found.enumerate().filter(|(_, part)| {
                part[0] == 0 && part[part.len() - 1] == 0 && &part[1..part.len() - 1] == name
            });
            u32::try_from(found.next().expect("one of them").0 + 1).expect("small")
        };
        let types: Vec<u32> = [
            // 1: u32, 2: struct outer, 3: its union, 4: pointer to it
            vec![at(b"u32"), 1 << 24, 4, 32],
            vec![at(b"outer"), 1 << 31 | 4 << 24 | 4, 24],
            vec![at(b"a"), 1, 0],
            vec![0, 3, 64],
            vec![at(b"bit"), 1, 1 << 24 | 128],
            vec![at(b"other"), 1, 2 << 24 | 129],
            vec![0, 5 << 24 | 2, 8],
            vec![at(b"b"), 1, 0],
            vec![at(b"c"), 4, 0],
            vec![0, 2 << 24, 2],
            vec![0, ENUM << 24 | 1, 4, at(b"first"), 3],
            vec![0, ENUM64 << 24 | 1, 8, at(b"last"), 0, 1],
        ]
        .concat();
        let len = u32::try_from(4 * types.len()).expect("small");
        let strings_len = u32::try_from(strings.len()).expect("small");
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend([1, 0]);
        for word in [24, 0, len, len, strings_len] {
            bytes.extend(u32::to_le_bytes(word));
        }
        bytes.extend(types.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn members_are_found_through_unions_without_a_name() {
        let types = Types::parse(small(), &["outer"]).expect("sound");
        let outer = types.structure("outer").expect("there");
        let place = |path| {
            let member = types.member(outer, path)?;
            Some((member.bit_offset, member.bits))
        };
        assert_eq!(place("a"), Some((0, 0)));
        assert_eq!(place("b"), Some((64, 0)));
        assert_eq!(place("other"), Some((129, 2)));
        assert_eq!(place("d"), None);
        assert_eq!(place("a.b"), None);
        let pointer = types.member(outer, "c").expect("there");
        assert_eq!(types.target(pointer.of), Some(outer));
        assert_eq!(
            (types.len(pointer.of), types.len(outer)),
            (Some(8), Some(24))
        );
    }

    #[test]
    fn enumerators_are_found_by_name() {
        let types = Types::parse(small(), &[]).expect("sound");
        let values = types.constants(&["last", "none", "first"]);
        assert_eq!(values, [Some(1 << 32), None, Some(3)]);
    }

    #[test]
    fn cut_descriptions_do_no_harm() {
        let whole = small();
        for len in 0..whole.len() {
            if let Some(types) = Types::parse(whole[..len].to_vec(), &["outer"]) {
                let outer = types.structure("outer");
                let _ = outer.map(|outer| types.member(outer, "bit"));
                let _ = types.constants(&["first"]);
            }
        }
        let mut changed = whole.clone();
        for at in 0..whole.len() {
            changed[at] = 0xff;
            if let Some(types) = Types::parse(changed.clone(), &["outer"]) {
                let outer = types.structure("outer");
                let _ = outer.map(|outer| types.member(outer, "c"));
                let _ = types.constants(&["last"]);
            }
            changed[at] = whole[at];
        }
    }
}
