//! Functions that a vdso offers, out of its ELF image.
//!
//! ```text
//!                 of 64-bit code                          of 32-bit code
//! file header:    section headers at 0x28 (u64),          at 0x20 (u32),
//!                 their size and number at 0x3a, 0x3c     at 0x2e, 0x30 (u16)
//! section header: type at 4 (u32), offset at 0x18,        type at 4, offset at 0x10,
//!                 size at 0x20, link at 0x28 (u32)        size at 0x14, link at 0x18
//! symbol:         name u32, info u8, other u8,            name, value, size u32,
//!                 section u16, value u64, size u64        info u8, other u8, section u16
//! ```
//! Source: man 5 elf. A vdso is loaded as it stands in its file, so values are offsets.

use crate::arch::Abi;

/// A function that a vdso offers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Function {
    /// Offset in the vdso.
    pub offset: u64,
    /// Length of its code.
    pub len: u64,
    /// Name.
    pub name: Vec<u8>,
}

const SHT_DYNSYM: u64 = 11;
const STT_FUNC: u64 = 2;
const STT_NOTYPE: u64 = 0;
/// A vdso has a dozen functions; more symbols than this are rubbish.
const MAX_SYMBOLS: u64 = 4096;

/// The functions of a vdso, by offset; none where the bytes are no ELF image.
pub fn functions(image: &[u8]) -> Vec<Function> {
    let mut found = dynamic_symbols(image).unwrap_or_default();
    found.sort_unstable();
    found
}

/// Where things stand in the images of one kind of code: `(offset, width)` of each.
struct Layout {
    sections: (u64, usize),
    section_size: u64,
    section_size_at: u64,
    section_count_at: u64,
    section_offset: (u64, usize),
    section_len: (u64, usize),
    section_link_at: u64,
    symbol: u64,
    symbol_info_at: u64,
    symbol_section_at: u64,
    symbol_value: (u64, usize),
    symbol_len: (u64, usize),
}

const NATIVE: Layout = Layout {
    sections: (0x28, 8),
    section_size: 64,
    section_size_at: 0x3a,
    section_count_at: 0x3c,
    section_offset: (0x18, 8),
    section_len: (0x20, 8),
    section_link_at: 0x28,
    symbol: 24,
    symbol_info_at: 4,
    symbol_section_at: 6,
    symbol_value: (8, 8),
    symbol_len: (16, 8),
};

const IA32: Layout = Layout {
    sections: (0x20, 4),
    section_size: 40,
    section_size_at: 0x2e,
    section_count_at: 0x30,
    section_offset: (0x10, 4),
    section_len: (0x14, 4),
    section_link_at: 0x18,
    symbol: 16,
    symbol_info_at: 12,
    symbol_section_at: 14,
    symbol_value: (4, 4),
    symbol_len: (8, 4),
};

/// Which kind of code a vdso is; what is no vdso at all counts as native.
pub fn abi(image: &[u8]) -> Abi {
    match image.starts_with(b"\x7fELF\x01") {
        true => Abi::Ia32,
        false => Abi::Native,
    }
}

fn dynamic_symbols(image: &[u8]) -> Option<Vec<Function>> {
    let layout = match image.get(..6)? {
        b"\x7fELF\x02\x01" => &NATIVE,
        b"\x7fELF\x01\x01" => &IA32,
        _ => return None,
    };
    let field = |at: u64, (offset, width): (u64, usize)| number(image, at, offset, width);
    let table = field(0, layout.sections)?;
    let nr_sections = number(image, 0, layout.section_count_at, 2)?;
    if number(image, 0, layout.section_size_at, 2)? != layout.section_size {
        return None;
    }
    let header = |index: u64| table.checked_add(index.checked_mul(layout.section_size)?);
    let section = (0..nr_sections).find_map(|index| {
        let at = header(index)?;
        (number(image, at, 4, 4)? == SHT_DYNSYM).then_some(at)
    })?;
    let names_header = header(number(image, section, layout.section_link_at, 4)?)?;
    let names = field(names_header, layout.section_offset)?;
    let symbols = field(section, layout.section_offset)?;
    let nr_symbols = (field(section, layout.section_len)? / layout.symbol).min(MAX_SYMBOLS);
    let all = (0..nr_symbols).filter_map(|index| {
        let at = symbols.checked_add(index * layout.symbol)?;
        symbol(image, at, names, layout)
    });
    Some(all.collect())
}

fn symbol(image: &[u8], at: u64, names: u64, layout: &Layout) -> Option<Function> {
    let field = |(offset, width): (u64, usize)| number(image, at, offset, width);
    let kind = number(image, at, layout.symbol_info_at, 1)? & 0xf;
    let section = number(image, at, layout.symbol_section_at, 2)?;
    let offset = field(layout.symbol_value)?;
    let is_defined = section != 0 && section < 0xff00;
    let is_inside = offset < u64::try_from(image.len()).ok()?;
    if !matches!(kind, STT_FUNC | STT_NOTYPE) || !is_defined || !is_inside {
        return None;
    }
    let name = names.checked_add(number(image, at, 0, 4)?)?;
    let name = image.get(usize::try_from(name).ok()?..)?;
    let end = name.iter().position(|byte| *byte == 0)?;
    Some(Function {
        offset,
        len: field(layout.symbol_len)?,
        name: name[..end].to_vec(),
    })
}

/// The little-endian number of `width` bytes at `offset` of the structure at `at`.
fn number(image: &[u8], at: u64, offset: u64, width: usize) -> Option<u64> {
    let at = usize::try_from(at.checked_add(offset)?).ok()?;
    let mut word = [0; 8];
    word[..width].copy_from_slice(image.get(at..at.checked_add(width)?)?);
    Some(u64::from_le_bytes(word))
}

#[cfg(test)]
mod tests {
    use super::super::KernelVdso;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_the_functions_of_the_running_kernel() {
        let Some(vdso) = KernelVdso::read().expect("own maps") else {
            eprintln!("skipped: this kernel gives no vdso");
            return;
        };
        let functions = functions(vdso.code());
        let clock = functions
            .iter()
            .find(|function| function.name == b"__vdso_clock_gettime")
            .expect("every vdso has a clock");
        assert!(clock.offset > 0 && clock.len > 0);
    }

    #[test]
    fn finds_the_functions_of_32_bit_code() {
        let Ok(Some(vdso)) = KernelVdso::read_ia32() else {
            eprintln!("skipped: this kernel runs no 32-bit programs");
            return;
        };
        assert_eq!(abi(vdso.code()), Abi::Ia32);
        let functions = functions(vdso.code());
        for name in [
            "__kernel_vsyscall",
            "__vdso_clock_gettime",
            "__kernel_rt_sigreturn",
        ] {
            let found = functions
                .iter()
                .find(|function| function.name == name.as_bytes());
            assert!(found.is_some_and(|function| function.offset > 0), "{name}");
        }
    }

    proptest! {
        #[test]
        fn rubbish_never_panics(
            tail in proptest::collection::vec(any::<u8>(), 0..400),
            cut in 0usize..8192,
            class in 1u8..3,
        ) {
            let mut bytes = vec![0x7f, b'E', b'L', b'F', class, 1];
            bytes.extend(tail);
            functions(&bytes);
            if let Ok(Some(vdso)) = KernelVdso::read() {
                functions(&vdso.code()[..cut.min(vdso.code().len())]);
            }
        }
    }
}
