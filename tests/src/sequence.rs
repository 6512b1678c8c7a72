//! Bytes of which none looks like its neighbours, so that one too many or too few shows.

/// Bytes of the sequence from an offset on.
pub fn sequence(start: u64, len: usize) -> Vec<u8> {
    let end = start + u64::try_from(len).expect("lengths fit into 64 bits");
    (start..end).map(byte).collect()
}

fn byte(at: u64) -> u8 {
    let word = (at / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (at / 8);
    let shift = usize::try_from(at % 8).expect("less than eight");
    word.to_le_bytes()[shift]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_cut_gives_the_same_bytes() {
        let whole = sequence(0, 1000);
        assert_eq!(sequence(100, 17), whole[100..117]);
        assert_eq!(sequence(999, 1), whole[999..]);
        assert_ne!(sequence(1, 999), whole[..999]);
    }
}
