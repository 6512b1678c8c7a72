//! Jumps that are written over the beginning of a function.

use super::Abi;

/// Code of that kind at address `from` that goes on at `to`, no longer than `room` bytes; None where no jump fits.
///
/// No register changes, so that it may stand in place of any function's first instruction.
pub fn jump(abi: Abi, from: u64, to: u64, room: u64) -> Option<Vec<u8>> {
    /// `jmp rel32`, relative to the next instruction.
    const NEAR_LEN: u64 = 5;
    /// `jmp [rip+0]` and the address.
    const FAR_LEN: u64 = 14;
    let distance = to.wrapping_sub(from.wrapping_add(NEAR_LEN)).cast_signed();
    // Addresses of 32-bit code wrap around, so that every one is near.
    let is_near = abi == Abi::Ia32 || i32::try_from(distance).is_ok();
    if is_near && room >= NEAR_LEN {
        let mut code = vec![0xe9];
        code.extend(&distance.to_le_bytes()[..4]);
        return Some(code);
    }
    if abi == Abi::Ia32 || room < FAR_LEN {
        return None;
    }
    let mut code = vec![0xff, 0x25, 0, 0, 0, 0];
    code.extend(to.to_le_bytes());
    Some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_targets_take_five_bytes_and_far_ones_fourteen() {
        assert_eq!(
            jump(Abi::Native, 0x1000, 0x1005, 5),
            Some(vec![0xe9, 0, 0, 0, 0])
        );
        assert_eq!(
            jump(Abi::Native, 0x1000, 0x0ff5, 8),
            Some(vec![0xe9, 0xf0, 0xff, 0xff, 0xff])
        );
        let far = jump(Abi::Native, 0x1000, 0x7f00_0000_0000, 14).expect("fits");
        assert_eq!(far.len(), 14);
        assert_eq!(far[6..], 0x7f00_0000_0000u64.to_le_bytes());
        assert_eq!(jump(Abi::Native, 0x1000, 0x7f00_0000_0000, 13), None);
        assert_eq!(jump(Abi::Native, 0x1000, 0x2000, 4), None);
    }
    #[test]
    fn jumps_of_32_bit_code_wrap_around() {
        let code = jump(Abi::Ia32, 0x1000, 0xf7f2_0000, 5).expect("fits");
        let distance = i32::from_le_bytes(code[1..].try_into().expect("four bytes"));
        assert_eq!(
            0x1005i32.wrapping_add(distance).cast_unsigned(),
            0xf7f2_0000
        );
        assert_eq!(jump(Abi::Ia32, 0x1000, 0xf7f2_0000, 4), None);
    }
}
