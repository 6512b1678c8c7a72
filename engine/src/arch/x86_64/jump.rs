//! Jumps that are written over the beginning of a function.

/// Code at address `from` that goes on at `to`, no longer than `room` bytes; None where no jump fits.
///
/// No register changes, so that it may stand in place of any function's first instruction.
pub fn jump(from: u64, to: u64, room: u64) -> Option<Vec<u8>> {
    /// `jmp rel32`, relative to the next instruction.
    const NEAR_LEN: u64 = 5;
    /// `jmp [rip+0]` and the address.
    const FAR_LEN: u64 = 14;
    let distance = to.wrapping_sub(from.wrapping_add(NEAR_LEN)).cast_signed();
    if let (Ok(near), true) = (i32::try_from(distance), room >= NEAR_LEN) {
        let mut code = vec![0xe9];
        code.extend(near.to_le_bytes());
        return Some(code);
    }
    if room < FAR_LEN {
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
        assert_eq!(jump(0x1000, 0x1005, 5), Some(vec![0xe9, 0, 0, 0, 0]));
        assert_eq!(
            jump(0x1000, 0x0ff5, 8),
            Some(vec![0xe9, 0xf0, 0xff, 0xff, 0xff])
        );
        let far = jump(0x1000, 0x7f00_0000_0000, 14).expect("fits");
        assert_eq!(far.len(), 14);
        assert_eq!(far[6..], 0x7f00_0000_0000u64.to_le_bytes());
        assert_eq!(jump(0x1000, 0x7f00_0000_0000, 13), None);
        assert_eq!(jump(0x1000, 0x2000, 4), None);
    }
}
