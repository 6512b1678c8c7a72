//! Flags of a page run.

use std::fmt;
use std::ops::BitOr;

/// Where the contents of a page run are.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageFlags(u32);

impl PageFlags {
    /// In the parent directory.
    #[doc(alias = "PE_PARENT")]
    pub const PARENT: Self = Self(1);
    /// To be loaded on demand; without `PRESENT`, from the host of the dump.
    #[doc(alias = "PE_LAZY")]
    pub const LAZY: Self = Self(2);
    /// In the pages file.
    #[doc(alias = "PE_PRESENT")]
    pub const PRESENT: Self = Self(4);

    /// Takes the bits of an image as they are.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// Gives the bits for an image.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Says whether all of `flags` are set.
    pub const fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// Says whether this is one of the combinations that mean something.
    pub const fn is_valid(self) -> bool {
        matches!(self.0, 1 | 2 | 4 | 6)
    }
}

impl BitOr for PageFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for PageFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::PARENT, "PARENT"),
            (Self::LAZY, "LAZY"),
            (Self::PRESENT, "PRESENT"),
        ];
        let mut set: Vec<String> = Vec::new();
        set.extend(
            names
                .iter()
                .filter(|(flag, _)| self.contains(*flag))
                .map(|n| n.1.to_owned()),
        );
        if self.0 & !7 != 0 {
            set.push(format!("{:#x}", self.0 & !7));
        }
        write!(f, "PageFlags({})", set.join("|"))
    }
}
