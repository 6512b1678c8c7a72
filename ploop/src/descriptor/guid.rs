//! Names of images and snapshots: UUIDs in braces, in lower case.

use std::fmt;
use std::io::Read;
use std::str::FromStr;

/// A UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guid([u8; 16]);

/// A word that is no UUID in braces.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no UUID in braces, like {{01234567-89ab-cdef-0123-456789abcdef}}")]
pub struct GuidError(String);

impl Guid {
    /// Parent of the base.
    pub const NIL: Guid = Guid([0; 16]);
    /// The delta that is written; always the same.
    pub const TOP: Guid = Guid([
        0x5f, 0xba, 0xab, 0xe3, 0x69, 0x58, 0x40, 0xff, 0x92, 0xa7, 0x86, 0x0e, 0x32, 0x9a, 0xab,
        0x41,
    ]);

    /// A new, random one.
    ///
    /// # Errors
    /// The host has no random bytes.
    pub fn random() -> std::io::Result<Guid> {
        let mut bytes = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        // Version 4, variant 1.
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Guid(bytes))
    }

    /// From 16 bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Guid {
        Guid(bytes)
    }

    /// The 16 bytes.
    pub fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{{")?;
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                write!(out, "-")?;
            }
            write!(out, "{byte:02x}")?;
        }
        write!(out, "}}")
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl FromStr for Guid {
    type Err = GuidError;

    fn from_str(text: &str) -> Result<Guid, GuidError> {
        let wrong = || GuidError(text.chars().take(80).collect());
        let inner = text
            .strip_prefix('{')
            .and_then(|rest| rest.strip_suffix('}'));
        let inner = inner.filter(|inner| inner.len() == 36).ok_or_else(wrong)?;
        let mut digits = Vec::with_capacity(32);
        for (at, letter) in inner.chars().enumerate() {
            match (matches!(at, 8 | 13 | 18 | 23), letter, letter.to_digit(16)) {
                (true, '-', _) => {}
                (false, _, Some(digit)) => digits.push(u8::try_from(digit).map_err(|_| wrong())?),
                _ => return Err(wrong()),
            }
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Guid(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_is_read_and_written() {
        let text = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
        assert_eq!(text.parse(), Ok(Guid::TOP));
        assert_eq!(Guid::TOP.to_string(), text);
        assert_eq!(text.to_uppercase().parse(), Ok(Guid::TOP));
        let random = Guid::random().unwrap();
        assert_eq!(random.to_string().parse(), Ok(random));
        assert_ne!(random, Guid::random().unwrap());
        for wrong in [
            "",
            "{}",
            "5fbaabe3-6958-40ff-92a7-860e329aab41",
            "{5fbaabe3_6958-40ff-92a7-860e329aab41}",
            "{ü}",
        ] {
            assert!(wrong.parse::<Guid>().is_err(), "{wrong}");
        }
    }
}
