//! Protobuf records, one at a time.

/// What is wrong with an encoded message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireFault {
    /// The message ends inside a record.
    #[error("the message ends inside a field")]
    Truncated,
    /// A varint has more than 64 bits.
    #[error("a varint is longer than ten bytes")]
    Varint,
    /// A record has number 0 or a wire type that messages of images do not have.
    #[error("{0:#x} is no field tag")]
    Tag(u64),
    /// Messages are nested deeper than any image has them.
    #[error("messages are nested more than {MAX_DEPTH} deep")]
    Depth,
}

/// Deepest nesting of messages that is followed.
pub(crate) const MAX_DEPTH: u32 = 64;

/// A record: the number of a field and its value.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record<'a> {
    pub(crate) number: u32,
    pub(crate) value: WireValue<'a>,
    /// Tag and value as they stand.
    pub(crate) raw: &'a [u8],
    /// Where in the message the record begins.
    pub(crate) offset: usize,
}

/// A value by its wire type.
#[derive(Debug, Clone, Copy)]
pub(crate) enum WireValue<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
}

/// Splits a message into records, up to the first fault.
///
/// A fault comes with its offset in the message.
pub(crate) fn records(message: &[u8]) -> Records<'_> {
    Records { message, at: 0 }
}

/// See [`records`].
#[derive(Debug)]
pub(crate) struct Records<'a> {
    message: &'a [u8],
    at: usize,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, (usize, WireFault)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.message.len() {
            return None;
        }
        let offset = self.at;
        let record = self.record().map_err(|fault| (offset, fault));
        if record.is_err() {
            self.at = self.message.len();
        }
        Some(record)
    }
}

impl<'a> Records<'a> {
    fn record(&mut self) -> Result<Record<'a>, WireFault> {
        let offset = self.at;
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3)
            .ok()
            .filter(|n| (1..1 << 29).contains(n));
        let number = number.ok_or(WireFault::Tag(tag))?;
        let value = match tag & 7 {
            0 => WireValue::Varint(self.varint()?),
            1 => WireValue::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let len = usize::try_from(self.varint()?).map_err(|_| WireFault::Truncated)?;
                WireValue::Bytes(self.take(len)?)
            }
            5 => WireValue::Fixed32(u32::from_le_bytes(self.array()?)),
            _ => return Err(WireFault::Tag(tag)),
        };
        Ok(Record {
            number,
            value,
            raw: &self.message[offset..self.at],
            offset,
        })
    }

    fn varint(&mut self) -> Result<u64, WireFault> {
        let (value, len) = read_varint(&self.message[self.at..])?;
        self.at += len;
        Ok(value)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], WireFault> {
        let rest = &self.message[self.at..];
        let taken = rest.get(..len).ok_or(WireFault::Truncated)?;
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireFault> {
        let bytes = self.take(N)?;
        Ok(bytes.try_into().expect("as many bytes as asked for"))
    }
}

/// Reads a varint, and tells how many bytes it had.
pub(crate) fn read_varint(bytes: &[u8]) -> Result<(u64, usize), WireFault> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        if index == 9 && bits > 1 {
            return Err(WireFault::Varint);
        }
        value |= bits << (7 * index);
        if byte & 0x80 == 0 {
            return Ok((value, index + 1));
        }
    }
    Err(if bytes.len() < 10 {
        WireFault::Truncated
    } else {
        WireFault::Varint
    })
}

/// Writes a varint.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(low_byte(value) | 0x80);
        value >>= 7;
    }
    out.push(low_byte(value));
}

fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0] & 0x7f
}

/// Writes the tag of a field.
pub(crate) fn put_tag(out: &mut Vec<u8>, number: u32, wire_type: u8) {
    put_varint(out, u64::from(number) << 3 | u64::from(wire_type));
}

/// Writes a field of bytes.
pub(crate) fn put_bytes(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    put_tag(out, number, 2);
    put_varint(out, u64::try_from(bytes.len()).expect("usize fits"));
    out.extend_from_slice(bytes);
}

/// Maps small negative numbers to small unsigned ones.
pub(crate) fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

/// Undoes [`zigzag`].
pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn varints_come_back(value: u64) {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            prop_assert_eq!(read_varint(&bytes), Ok((value, bytes.len())));
        }

        #[test]
        fn zigzag_comes_back(value: i64) {
            prop_assert_eq!(unzigzag(zigzag(value)), value);
        }

        #[test]
        fn any_bytes_are_split_without_panic(bytes: Vec<u8>) {
            let total: usize = records(&bytes).flatten().map(|r| r.raw.len()).sum();
            prop_assert!(total <= bytes.len());
        }
    }

    #[test]
    fn faults_are_told_apart() {
        let fault = |bytes: &[u8]| records(bytes).find_map(Result::err);
        assert_eq!(fault(&[0x08]), Some((0, WireFault::Truncated)));
        assert_eq!(
            fault(&[0x08, 1, 0x12, 5, 0]),
            Some((2, WireFault::Truncated))
        );
        assert_eq!(fault(&[0x03]), Some((0, WireFault::Tag(3))));
        assert_eq!(fault(&[0x00, 0x00]), Some((0, WireFault::Tag(0))));
        assert_eq!(
            fault(&[&[0x08][..], &[0xff; 10]].concat()),
            Some((0, WireFault::Varint))
        );
    }
}
