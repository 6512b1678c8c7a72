//! Words that several commands take: sizes, names, formats.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use firn_ploop::format::expanded::Preallocation;
use firn_ploop::{Access, Format, folder::OpenOptions};

/// Which disk, and how to answer.
#[derive(Debug, Args)]
pub struct DiskArgs {
    /// Descriptor of the disk, or its directory
    #[arg(value_name = "DiskDescriptor.xml")]
    pub disk: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How images are arranged, in the original's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Arrangement {
    /// Grows as it is written
    #[value(alias = "ploop1")]
    Expanded,
    /// Like expanded, with all space taken at once
    Preallocated,
    /// The file's bytes are the disk's
    Raw,
    /// QEMU's format; its clusters have 64K to 2M
    Qcow2,
}

impl Arrangement {
    /// The format.
    pub fn format(self) -> Format {
        match self {
            Arrangement::Expanded | Arrangement::Preallocated => Format::Expanded,
            Arrangement::Raw => Format::Raw,
            Arrangement::Qcow2 => Format::Qcow2,
        }
    }

    /// Whether all space is taken.
    pub fn preallocation(self) -> Preallocation {
        match self {
            Arrangement::Preallocated => Preallocation::Full,
            _ => Preallocation::None,
        }
    }
}

/// A disk of which nobody else has a writable hold, as commands open it.
pub fn closed_disk() -> OpenOptions {
    OpenOptions::new(Access::ReadWrite)
}

/// A size: sectors of 512 bytes, or bytes with K, M, G, T as powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || "sectors of 512 bytes, or a number with K, M, G or T".to_owned();
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 1 << 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 1 << 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 1 << 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 1u64 << 40),
        _ => (text, 512),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number
        .checked_mul(unit)
        .ok_or_else(|| "too large".to_owned())
}

/// The size of a cluster, in the same words.
pub fn cluster(text: &str) -> Result<u32, String> {
    u32::try_from(size(text)?).map_err(|_| "too large".to_owned())
}

/// The name of a copy.
pub fn session(text: &str) -> Result<String, String> {
    match firn_ploop::copy::is_session(text) {
        true => Ok(text.to_owned()),
        false => Err("it takes 1 to 64 letters, digits and dashes".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_have_plain_names() {
        assert_eq!(session("disk-7"), Ok("disk-7".to_owned()));
        for wrong in ["", "a/b", "a b", &"x".repeat(65)] {
            assert!(session(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_sectors_or_have_a_unit() {
        assert_eq!(size("2048"), Ok(1 << 20));
        assert_eq!(size("10G"), Ok(10 << 30));
        assert_eq!(size("3t"), Ok(3 << 40));
        assert_eq!(cluster("64K"), Ok(65_536));
        for wrong in ["", "K", "-1", "1.5G", "99999999999T", "G1"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
