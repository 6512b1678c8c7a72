//! Which parts of a disk hold what.

/// What a part of a disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that stand in some layer.
    Data,
    /// Known to be zeroes, by a mark of the format.
    Zero,
    /// In no layer; reads as zeroes.
    Unallocated,
}

impl ExtentKind {
    /// Whether it reads as zeroes without a look at the bytes.
    pub fn is_zero(self) -> bool {
        self != ExtentKind::Data
    }
}

/// A run of bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len_bytes: u64,
    /// What they are.
    pub kind: ExtentKind,
}

impl Extent {
    /// The byte after the last.
    pub fn end(&self) -> u64 {
        self.offset + self.len_bytes
    }
}

/// Appends a run, joining it with the last one where they touch and are of one kind.
pub(crate) fn push(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        Some(last) if last.kind == next.kind && last.end() == next.offset => {
            last.len_bytes += next.len_bytes;
        }
        _ => extents.push(next),
    }
}
