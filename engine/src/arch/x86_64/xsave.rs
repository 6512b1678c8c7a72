//! Extended state: the XSAVE area between ptrace and the image.
//!
//! ```text
//! 0x000  512  legacy area: x87 and SSE, as FXSAVE writes it
//! 0x200   64  header: xstate_bv (u64), xcomp_bv (u64, 0 in the standard format), zero
//! 0x240       components, each at the offset that CPUID leaf 0xD names
//! ```
//!
//! Only the first 0x240 bytes have fixed places. Everything else, its offsets and the size of the whole,
//! comes from CPUID of the machine that runs: an image made on another machine is laid out anew.
//! Components that CRIU's schema has no field for (AMX tiles and what comes later) travel by number in
//! an extension.
//!
//! Source: Intel SDM volume 1, chapter 13; linux arch/x86/kernel/fpu/regset.c.

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

use firn_proto::{FirnXfeatureEntry, UserX86FpregsEntry, UserX86XsaveEntry};

const LEGACY_SIZE: usize = 512;
const HEADER_AT: usize = 512;
const COMPONENTS_AT: usize = 576;
/// The kernel keeps its copy of XCR0 in the legacy area's software-reserved bytes.
const SW_XCR0_AT: usize = 464;

const YMM: u32 = 2;
const BNDREGS: u32 = 3;
const BNDCSR: u32 = 4;
const OPMASK: u32 = 5;
const ZMM_HI256: u32 = 6;
const HI16_ZMM: u32 = 7;
const PKRU: u32 = 9;
/// Bits of x87 and SSE, which live in the legacy area.
const LEGACY_BITS: u64 = 0b11;

/// One component of the XSAVE area on this CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Component {
    bit: u32,
    offset: usize,
    size: usize,
}

/// The XSAVE area of this CPU: its size and where each component lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XsaveLayout {
    size: usize,
    features: u64,
    components: Vec<Component>,
}

/// Extended state that this CPU can't hold.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum XsaveError {
    /// The task used state components that this CPU or kernel does not have.
    #[error(
        "the task uses CPU state components {missing:#x} ({names}) that this machine does not have"
    )]
    MissingFeatures {
        /// Bits of XCR0 in use and absent here.
        missing: u64,
        /// Their names.
        names: String,
    },
    /// An array of the image has a size that the format does not allow.
    #[error("the image's {field} holds {got} elements, not {want}")]
    BadArray {
        /// Field of the image.
        field: &'static str,
        /// Elements found.
        got: usize,
        /// Elements expected.
        want: usize,
    },
    /// ptrace gave fewer bytes than an XSAVE area has.
    #[error("the kernel returned {0} bytes of extended state, fewer than an XSAVE area has")]
    Short(usize),
}

impl XsaveLayout {
    /// The layout of this CPU, read once: a hypervisor may take tens of microseconds for each leaf.
    pub fn of_this_cpu() -> &'static XsaveLayout {
        static LAYOUT: OnceLock<XsaveLayout> = OnceLock::new();
        LAYOUT.get_or_init(XsaveLayout::read)
    }

    fn read() -> XsaveLayout {
        let has_osxsave = __cpuid(1).ecx & (1 << 27) != 0;
        if !has_osxsave {
            return XsaveLayout {
                size: COMPONENTS_AT,
                features: LEGACY_BITS,
                components: Vec::new(),
            };
        }
        // SAFETY: OSXSAVE says that the kernel has enabled xgetbv.
        let features = unsafe { xcr0() };
        let size = to_usize(__cpuid_count(0xd, 0).ebx);
        let components = (2..63)
            .filter(|bit| features & (1 << bit) != 0)
            .map(|bit| {
                let leaf = __cpuid_count(0xd, bit);
                Component {
                    bit,
                    offset: to_usize(leaf.ebx),
                    size: to_usize(leaf.eax),
                }
            })
            .filter(|component| component.size > 0 && component.offset + component.size <= size)
            .collect();
        XsaveLayout {
            size,
            features,
            components,
        }
    }

    /// Size in bytes of the area that ptrace reads and writes here.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The enabled components (XCR0).
    pub fn features(&self) -> u64 {
        self.features
    }

    fn component(&self, bit: u32) -> Option<Component> {
        self.components
            .iter()
            .copied()
            .find(|component| component.bit == bit)
    }

    /// Converts an area read by ptrace to the image's form.
    ///
    /// # Errors
    /// [`XsaveError::Short`].
    pub fn to_image(&self, area: &[u8]) -> Result<UserX86FpregsEntry, XsaveError> {
        if area.len() < LEGACY_SIZE {
            return Err(XsaveError::Short(area.len()));
        }
        let xsave = (area.len() >= COMPONENTS_AT).then(|| self.components_to_image(area));
        Ok(UserX86FpregsEntry {
            cwd: u32::from(u16_at(area, 0)),
            swd: u32::from(u16_at(area, 2)),
            twd: u32::from(u16_at(area, 4)),
            fop: u32::from(u16_at(area, 6)),
            rip: u64_at(area, 8),
            rdp: u64_at(area, 16),
            mxcsr: u32_at(area, 24),
            mxcsr_mask: u32_at(area, 28),
            st_space: words(&area[32..160]),
            xmm_space: words(&area[160..416]),
            padding: Vec::new(),
            xsave,
        })
    }

    fn components_to_image(&self, area: &[u8]) -> UserX86XsaveEntry {
        let xstate_bv = u64_at(area, HEADER_AT);
        let bytes = |bit| {
            self.component(bit)
                .and_then(|c| area.get(c.offset..c.offset + c.size))
                .unwrap_or(&[])
        };
        let known = [YMM, BNDREGS, BNDCSR, OPMASK, ZMM_HI256, HI16_ZMM, PKRU];
        let firn = self
            .components
            .iter()
            .filter(|c| !known.contains(&c.bit) && xstate_bv & (1 << c.bit) != 0)
            .map(|c| FirnXfeatureEntry {
                bit: c.bit,
                state: bytes(c.bit).to_vec(),
            })
            .collect();
        UserX86XsaveEntry {
            xstate_bv,
            ymmh_space: words(bytes(YMM)),
            bndreg_state: quads(bytes(BNDREGS)),
            bndcsr_state: quads(bytes(BNDCSR)),
            opmask_reg: quads(bytes(OPMASK)),
            zmm_upper: quads(bytes(ZMM_HI256)),
            hi16_zmm: quads(bytes(HI16_ZMM)),
            pkru: words(bytes(PKRU)),
            cet: None,
            firn,
        }
    }

    /// Lays the image's state out for this CPU, ready for ptrace.
    ///
    /// # Errors
    /// State in use that this CPU lacks; arrays of a wrong size.
    pub fn from_image(&self, fpregs: &UserX86FpregsEntry) -> Result<Vec<u8>, XsaveError> {
        let mut area = vec![0u8; self.size];
        let low16 = |value: u32| value.to_le_bytes()[..2].to_vec();
        area[0..2].copy_from_slice(&low16(fpregs.cwd));
        area[2..4].copy_from_slice(&low16(fpregs.swd));
        area[4..6].copy_from_slice(&low16(fpregs.twd));
        area[6..8].copy_from_slice(&low16(fpregs.fop));
        area[8..16].copy_from_slice(&fpregs.rip.to_le_bytes());
        area[16..24].copy_from_slice(&fpregs.rdp.to_le_bytes());
        area[24..28].copy_from_slice(&fpregs.mxcsr.to_le_bytes());
        area[28..32].copy_from_slice(&fpregs.mxcsr_mask.to_le_bytes());
        put_words("st_space", &fpregs.st_space, &mut area[32..160])?;
        put_words("xmm_space", &fpregs.xmm_space, &mut area[160..416])?;
        area[SW_XCR0_AT..SW_XCR0_AT + 8].copy_from_slice(&self.features.to_le_bytes());
        let xstate_bv = match &fpregs.xsave {
            Some(xsave) => self.components_from_image(xsave, &mut area)?,
            None => LEGACY_BITS,
        };
        area[HEADER_AT..HEADER_AT + 8].copy_from_slice(&xstate_bv.to_le_bytes());
        Ok(area)
    }

    fn components_from_image(
        &self,
        xsave: &UserX86XsaveEntry,
        area: &mut [u8],
    ) -> Result<u64, XsaveError> {
        let missing = xsave.xstate_bv & !self.features;
        if missing != 0 {
            return Err(XsaveError::MissingFeatures {
                missing,
                names: names(missing),
            });
        }
        let arrays: [(&'static str, u32, Vec<u8>); 7] = [
            ("ymmh_space", YMM, word_bytes(&xsave.ymmh_space)),
            ("bndreg_state", BNDREGS, quad_bytes(&xsave.bndreg_state)),
            ("bndcsr_state", BNDCSR, quad_bytes(&xsave.bndcsr_state)),
            ("opmask_reg", OPMASK, quad_bytes(&xsave.opmask_reg)),
            ("zmm_upper", ZMM_HI256, quad_bytes(&xsave.zmm_upper)),
            ("hi16_zmm", HI16_ZMM, quad_bytes(&xsave.hi16_zmm)),
            ("pkru", PKRU, word_bytes(&xsave.pkru)),
        ];
        for (field, bit, bytes) in arrays {
            if xsave.xstate_bv & (1 << bit) != 0 {
                self.put_component(field, bit, &bytes, area)?;
            }
        }
        for feature in &xsave.firn {
            if feature.bit < 63 && xsave.xstate_bv & (1 << feature.bit) != 0 {
                self.put_component("firn.state", feature.bit, &feature.state, area)?;
            }
        }
        Ok(xsave.xstate_bv)
    }

    fn put_component(
        &self,
        field: &'static str,
        bit: u32,
        bytes: &[u8],
        area: &mut [u8],
    ) -> Result<(), XsaveError> {
        let want = self.component(bit).map_or(0, |c| c.size);
        match self.component(bit) {
            Some(c) if bytes.len() == c.size => {
                area[c.offset..c.offset + c.size].copy_from_slice(bytes);
                Ok(())
            }
            _ => Err(XsaveError::BadArray {
                field,
                got: bytes.len(),
                want,
            }),
        }
    }
}

/// # Safety
/// The CPU must have OSXSAVE set.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller's promise.
    unsafe { _xgetbv(0) }
}

/// Names of state components, for messages.
fn names(bits: u64) -> String {
    let name = |bit| match bit {
        0 => "x87".to_owned(),
        1 => "SSE".to_owned(),
        YMM => "AVX".to_owned(),
        BNDREGS | BNDCSR => "MPX".to_owned(),
        OPMASK | ZMM_HI256 | HI16_ZMM => "AVX-512".to_owned(),
        PKRU => "protection keys".to_owned(),
        11 | 12 => "shadow stacks".to_owned(),
        17 | 18 => "AMX".to_owned(),
        other => format!("component {other}"),
    };
    let mut all: Vec<String> = (0..64)
        .filter(|bit| bits & (1 << bit) != 0)
        .map(name)
        .collect();
    all.dedup();
    all.join(", ")
}

fn u16_at(area: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(area[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(area: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(area[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(area: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(area[at..at + 8].try_into().expect("eight bytes"))
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32_at(word, 0)).collect()
}

fn quads(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|quad| u64_at(quad, 0)).collect()
}

fn word_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn quad_bytes(quads: &[u64]) -> Vec<u8> {
    quads.iter().flat_map(|quad| quad.to_le_bytes()).collect()
}

fn put_words(field: &'static str, words: &[u32], out: &mut [u8]) -> Result<(), XsaveError> {
    let want = out.len() / 4;
    if words.len() < want {
        return Err(XsaveError::BadArray {
            field,
            got: words.len(),
            want,
        });
    }
    out.copy_from_slice(&word_bytes(&words[..want]));
    Ok(())
}

fn to_usize(value: u32) -> usize {
    usize::try_from(value).expect("usize has at least 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(layout: &XsaveLayout) -> Vec<u8> {
        let mut area: Vec<u8> = (0..layout.size())
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        area[416..HEADER_AT].fill(0);
        area[SW_XCR0_AT..SW_XCR0_AT + 8].copy_from_slice(&layout.features().to_le_bytes());
        area[HEADER_AT..COMPONENTS_AT].fill(0);
        area[HEADER_AT..HEADER_AT + 8].copy_from_slice(&layout.features().to_le_bytes());
        // Bytes between components are not state.
        let mut used = vec![false; area.len()];
        used[..COMPONENTS_AT].fill(true);
        for c in &layout.components {
            used[c.offset..c.offset + c.size].fill(true);
        }
        area.iter_mut()
            .zip(used)
            .for_each(|(byte, used)| *byte = if used { *byte } else { 0 });
        area
    }

    #[test]
    fn survives_the_image() {
        let layout = XsaveLayout::of_this_cpu();
        let area = filled(layout);
        let image = layout.to_image(&area).unwrap();
        assert_eq!(layout.from_image(&image).unwrap(), area);
    }

    #[test]
    fn refuses_state_that_this_cpu_lacks() {
        let layout = XsaveLayout::of_this_cpu();
        let mut image = layout.to_image(&filled(layout)).unwrap();
        image.xsave.as_mut().unwrap().xstate_bv |= 1 << 40;
        let error = layout.from_image(&image).unwrap_err();
        assert!(error.to_string().contains("component 40"), "{error}");
    }

    #[test]
    fn refuses_arrays_of_the_wrong_size() {
        let layout = XsaveLayout::of_this_cpu();
        let mut image = layout.to_image(&filled(layout)).unwrap();
        image.st_space.pop();
        assert_eq!(
            layout.from_image(&image).unwrap_err(),
            XsaveError::BadArray {
                field: "st_space",
                got: 31,
                want: 32
            }
        );
    }

    #[test]
    fn an_image_without_xsave_fills_the_legacy_area_only() {
        let layout = XsaveLayout::of_this_cpu();
        let mut image = layout.to_image(&filled(layout)).unwrap();
        image.xsave = None;
        let area = layout.from_image(&image).unwrap();
        assert_eq!(u64_at(&area, HEADER_AT), LEGACY_BITS);
    }
}
