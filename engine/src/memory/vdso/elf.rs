//! Functions that a vdso offers, out of its ELF image.
//!
//! ```text
//! file header:    section headers at 0x28 (u64), their size and number at 0x3a and 0x3c (u16)
//! section header: type at 4 (u32), offset at 0x18, size at 0x20, link at 0x28 (u32)
//! symbol:         name u32, info u8, other u8, section u16, value u64, size u64
//! ```
//! Source: man 5 elf. A vdso is loaded as it stands in its file, so values are offsets.

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
const SECTION_HEADER: u64 = 64;
const SYMBOL: u64 = 24;
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

fn dynamic_symbols(image: &[u8]) -> Option<Vec<Function>> {
    if image.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = number(image, 0, 0x28, 8)?;
    let nr_sections = number(image, 0, 0x3c, 2)?;
    if number(image, 0, 0x3a, 2)? != SECTION_HEADER {
        return None;
    }
    let header = |index: u64| table.checked_add(index.checked_mul(SECTION_HEADER)?);
    let section = (0..nr_sections).find_map(|index| {
        let at = header(index)?;
        (number(image, at, 4, 4)? == SHT_DYNSYM).then_some(at)
    })?;
    let names_header = header(number(image, section, 0x28, 4)?)?;
    let names = number(image, names_header, 0x18, 8)?;
    let symbols = number(image, section, 0x18, 8)?;
    let nr_symbols = (number(image, section, 0x20, 8)? / SYMBOL).min(MAX_SYMBOLS);
    let all = (0..nr_symbols).filter_map(|index| {
        let at = symbols.checked_add(index * SYMBOL)?;
        symbol(image, at, names)
    });
    Some(all.collect())
}

fn symbol(image: &[u8], at: u64, names: u64) -> Option<Function> {
    let kind = number(image, at, 4, 1)? & 0xf;
    let section = number(image, at, 6, 2)?;
    let offset = number(image, at, 8, 8)?;
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
        len: number(image, at, 16, 8)?,
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

    proptest! {
        #[test]
        fn rubbish_never_panics(
            tail in proptest::collection::vec(any::<u8>(), 0..400),
            cut in 0usize..8192,
        ) {
            let mut bytes = b"\x7fELF\x02\x01".to_vec();
            bytes.extend(tail);
            functions(&bytes);
            if let Ok(Some(vdso)) = KernelVdso::read() {
                functions(&vdso.code()[..cut.min(vdso.code().len())]);
            }
        }
    }
}
