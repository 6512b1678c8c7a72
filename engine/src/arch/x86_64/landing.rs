//! Instructions that jump to themselves, which hold a thread that nobody holds any more and touch nothing.
//!
//! Two bytes are such an instruction, wherever they stand, also across others: a short jump by -2. A conditional one
//! does for ever what the flags say, which it does not change:
//!
//! | bytes | jumps | flags |
//! |---|---|---|
//! | eb fe | always | any |
//! | 71 fe, 73 fe, .. 7f fe | where flags are clear | none |
//! | 72 fe, 74 fe, .. 7e fe | where flags are set | carry, parity, zero and sign, not overflow |
//!
//! They are the same in 64-bit and in 32-bit code. Of a C library, every second page has one.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, Jcc and JMP.

use firn_sys::ptrace::GeneralRegs;

use super::abi::PLAIN_FLAGS;

/// Carry, parity, zero and sign.
const FLAGS_SET: u64 = 0x01 | 0x04 | 0x40 | 0x80;
/// The jump goes back over itself.
const BACK: u8 = 0xfe;

/// An instruction in the code of a task that jumps to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Landing {
    /// Where it stands.
    pub address: u64,
    /// The instruction.
    pub bytes: [u8; 2],
}

impl Landing {
    /// The first in code that stands at this address.
    pub fn in_code(code: &[u8], start: u64) -> Option<Landing> {
        let mut pairs = (0u64..).zip(code.windows(2));
        pairs.find_map(|(nth, pair)| Landing::at(start + nth, [pair[0], pair[1]]))
    }

    /// The one at this address, if these bytes there are one.
    pub fn at(address: u64, bytes: [u8; 2]) -> Option<Landing> {
        let is_one = matches!(bytes, [0xeb | 0x71..=0x7f, BACK]);
        is_one.then_some(Landing { address, bytes })
    }

    /// Registers of a thread that stands there.
    #[must_use]
    pub fn with(self, regs: GeneralRegs) -> GeneralRegs {
        let is_where_set = self.bytes[0].is_multiple_of(2);
        GeneralRegs {
            rip: self.address,
            eflags: PLAIN_FLAGS | if is_where_set { FLAGS_SET } else { 0 },
            ..regs
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::regs::tests::stopped;

    #[test]
    fn jumps_stand_anywhere_with_the_flags_that_they_follow() {
        let code = [0x90, 0x70, 0xfe, 0x83, 0x7e, 0xfe, 0x00];
        let landing = Landing::in_code(&code, 0x1000).unwrap();
        assert_eq!(landing.address, 0x1004);
        let regs = landing.with(stopped(0, -1));
        assert_eq!((regs.rip, regs.eflags), (0x1004, 0x202 | 0xc5));
        assert_eq!(Landing::in_code(&code[..5], 0x1000), None);
        let always = Landing::at(8, [0xeb, 0xfe]).unwrap();
        assert_eq!(always.with(stopped(0, -1)).eflags, 0x202);
        let where_clear = Landing::at(8, [0x75, 0xfe]).unwrap();
        assert_eq!(where_clear.with(stopped(0, -1)).eflags, 0x202);
    }

    #[test]
    fn other_instructions_are_none() {
        assert_eq!(Landing::at(0, [0x0f, 0x05]), None);
        assert_eq!(Landing::at(0, [0xeb, 0xfd]), None);
        assert_eq!(Landing::at(0, [0xe8, 0xfe]), None);
    }
}
