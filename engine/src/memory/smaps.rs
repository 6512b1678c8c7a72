//! Parsing /proc/PID/maps and /proc/PID/smaps.
//!
//! Source: man 5 proc_pid_maps, proc_pid_smaps; linux fs/proc/task_mmu.c, show_map_vma,
//! show_smap_vma_flags.

use firn_sys::procfs;

use super::range::AddressRange;

/// One mapping as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses.
    pub range: AddressRange,
    /// `PROT_*` bits.
    pub prot: u32,
    /// Shared, not copy-on-write.
    pub is_shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Major and minor number of the file's device.
    pub device: (u32, u32),
    /// The file's inode number; 0 without file.
    pub inode: u64,
    /// Path or `[name]`, as shown; empty for nameless memory.
    pub name: Vec<u8>,
    /// Size of its pages in bytes.
    pub page_size: u64,
    /// Bytes in memory or swapped out: nothing to save when 0.
    pub resident: u64,
    /// Bytes in memory that other mappings have as well.
    pub shared: u64,
    /// Flags.
    pub flags: VmFlags,
}

/// Flags of a mapping: the two-letter codes of smaps that decide anything here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VmFlags(u32);

macro_rules! vm_flags {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        impl VmFlags {
            vm_flags!(@constants 0; $($(#[$doc])* $name,)*);
            const CODES: &'static [(&'static [u8; 2], VmFlags)] = &[$(($code, VmFlags::$name),)*];
        }
    };
    (@constants $bit:expr; $(#[$doc:meta])* $name:ident, $($rest:tt)*) => {
        $(#[$doc])*
        pub const $name: VmFlags = VmFlags(1 << ($bit));
        vm_flags!(@constants $bit + 1; $($rest)*);
    };
    (@constants $bit:expr;) => {};
}

vm_flags! {
    /// Grows downwards.
    GROWS_DOWN = b"gd",
    /// Memory of a device.
    PFN_MAP = b"pf",
    /// May be made writable; for a shared mapping: its file is open for writing.
    MAY_WRITE = b"mw",
    /// Locked in memory.
    LOCKED = b"lo",
    /// Input and output memory.
    IO = b"io",
    /// Expected to be read in order.
    SEQUENTIAL = b"sr",
    /// Expected to be read in no order.
    RANDOM = b"rr",
    /// Not given to children.
    DONT_COPY = b"dc",
    /// Not counted against the commit limit.
    NO_RESERVE = b"nr",
    /// Made of huge pages.
    HUGETLB = b"ht",
    /// Children see zeros.
    WIPE_ON_FORK = b"wf",
    /// Left out of core dumps.
    DONT_DUMP = b"dd",
    /// Huge pages wanted.
    HUGE_PAGE = b"hg",
    /// Huge pages not wanted.
    NO_HUGE_PAGE = b"nh",
    /// Equal pages are merged.
    MERGEABLE = b"mg",
    /// Missing pages go to a userfaultfd.
    UFFD_MISSING = b"um",
    /// Writes go to a userfaultfd.
    UFFD_WP = b"uw",
    /// Minor faults go to a userfaultfd.
    UFFD_MINOR = b"ui",
    /// Shadow stack.
    SHADOW_STACK = b"ss",
    /// Sealed.
    SEALED = b"sl",
    /// Pages are locked when they come.
    LOCK_ON_FAULT = b"lf",
    /// The kernel may drop the pages.
    DROPPABLE = b"dp",
}

impl VmFlags {
    /// Whether any of `flags` is set.
    pub fn has(self, flags: VmFlags) -> bool {
        self.0 & flags.0 != 0
    }

    /// These without `flags`.
    pub fn without(self, flags: VmFlags) -> VmFlags {
        VmFlags(self.0 & !flags.0)
    }

    /// Both together.
    pub const fn or(self, other: VmFlags) -> VmFlags {
        VmFlags(self.0 | other.0)
    }

    fn parse(text: &[u8]) -> VmFlags {
        let mut flags = VmFlags::default();
        for code in text
            .split(|b| *b == b' ')
            .filter_map(|c| <&[u8; 2]>::try_from(c).ok())
        {
            if let Some((_, flag)) = VmFlags::CODES.iter().find(|(known, _)| *known == code) {
                flags = flags.or(*flag);
            }
        }
        flags
    }
}

impl Mapping {
    /// The name for messages.
    pub fn title(&self) -> String {
        match self.name.as_slice() {
            b"" => format!("memory {}", self.range),
            name => format!(
                "mapping {} of {}",
                self.range,
                String::from_utf8_lossy(name)
            ),
        }
    }
}

/// A line of smaps that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("can't understand line `{line}` of the memory map")]
pub struct SmapsParseError {
    /// The line.
    pub line: String,
}

/// Parses the text of maps or smaps. Out of maps come no flags, no page size and no resident bytes.
///
/// # Errors
/// The first line that is not as the kernel writes it.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>, SmapsParseError> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in procfs::lines(text).filter(|line| !line.is_empty()) {
        let bad = || SmapsParseError {
            line: String::from_utf8_lossy(line).into_owned(),
        };
        // Details begin with a capital letter, mappings with a hexadecimal digit in lower case.
        if line[0].is_ascii_uppercase() {
            detail(mappings.last_mut().ok_or_else(bad)?, line).ok_or_else(bad)?;
        } else {
            mappings.push(header(line).ok_or_else(bad)?);
        }
    }
    Ok(mappings)
}

fn header(line: &[u8]) -> Option<Mapping> {
    let mut words = line.splitn(6, |b| *b == b' ');
    let (start, end) = split_at_byte(words.next()?, b'-')?;
    let perms: &[u8; 4] = words.next()?.try_into().ok()?;
    let offset = hex(words.next()?)?;
    let (major, minor) = split_at_byte(words.next()?, b':')?;
    let inode = decimal(words.next()?)?;
    let name = words.next().unwrap_or_default().trim_ascii_start();
    let bit = |at: usize, letter, bit| if perms[at] == letter { bit } else { 0 };
    Some(Mapping {
        range: AddressRange::new(hex(start)?, hex(end)?),
        prot: bit(0, b'r', 1) | bit(1, b'w', 2) | bit(2, b'x', 4),
        is_shared: perms[3] == b's',
        offset,
        device: (
            u32::try_from(hex(major)?).ok()?,
            u32::try_from(hex(minor)?).ok()?,
        ),
        inode,
        name: name.to_vec(),
        page_size: 0,
        resident: 0,
        shared: 0,
        flags: VmFlags::default(),
    })
}

fn detail(mapping: &mut Mapping, line: &[u8]) -> Option<()> {
    // Most lines count nothing.
    if line.ends_with(b" 0 kB") {
        return Some(());
    }
    let (key, value) = split_at_byte(line, b':')?;
    let value = value.trim_ascii();
    match key {
        b"KernelPageSize" => mapping.page_size = kib(value)?,
        b"Rss" | b"Swap" | b"Private_Hugetlb" | b"Shared_Hugetlb" => {
            mapping.resident = mapping.resident.checked_add(kib(value)?)?;
        }
        b"Shared_Clean" | b"Shared_Dirty" => {
            mapping.shared = mapping.shared.checked_add(kib(value)?)?;
        }
        b"VmFlags" => mapping.flags = VmFlags::parse(value),
        _ => {}
    }
    Some(())
}

fn split_at_byte(text: &[u8], byte: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|b| *b == byte)?;
    Some((&text[..at], &text[at + 1..]))
}

fn hex(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
}

fn decimal(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn kib(value: &[u8]) -> Option<u64> {
    decimal(value.strip_suffix(b" kB")?)?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CAPTURED: &[u8] = b"\
55acde7be000-55acde7c1000 r--p 00007000 fe:00 247030                     /usr/bin/my cat (deleted)
Size:                 12 kB
KernelPageSize:        4 kB
Rss:                   8 kB
Swap:                  4 kB
ProtectionKey:         0
VmFlags: rd mr mw me ac
7f0000000000-7f0000200000 rw-s 00000000 00:0f 1234                       /memfd:x (deleted)
KernelPageSize:     2048 kB
Rss:                   0 kB
Shared_Hugetlb:     2048 kB
VmFlags: rd wr sh mr mw me ms de ht lo
7fff79453000-7fff79474000 rw-p 00000000 00:00 0                          [stack]
KernelPageSize:        4 kB
Rss:                  12 kB
Shared_Clean:          0 kB
Shared_Dirty:          8 kB
VmFlags: rd wr mr mw me gd ac
7fff79500000-7fff79501000 ---p 00000000 00:00 0 
VmFlags: mr mw me nr zz
";

    #[test]
    fn parses_captured_text() {
        let mappings = parse(CAPTURED).expect("the kernel wrote it");
        assert_eq!(mappings.len(), 4);
        let cat = &mappings[0];
        assert_eq!(cat.range, AddressRange::new(0x55acde7be000, 0x55acde7c1000));
        assert_eq!((cat.prot, cat.is_shared, cat.offset), (1, false, 0x7000));
        assert_eq!((cat.device, cat.inode), ((0xfe, 0), 247030));
        assert_eq!(cat.name, b"/usr/bin/my cat (deleted)");
        assert_eq!((cat.page_size, cat.resident), (4096, 12 << 10));
        assert!(cat.flags.has(VmFlags::MAY_WRITE) && !cat.flags.has(VmFlags::LOCKED));
        let huge = &mappings[1];
        assert_eq!((huge.prot, huge.is_shared), (3, true));
        assert_eq!((huge.page_size, huge.resident), (2 << 20, 2 << 20));
        assert!(huge.flags.has(VmFlags::HUGETLB) && huge.flags.has(VmFlags::LOCKED));
        assert!(mappings[2].flags.has(VmFlags::GROWS_DOWN));
        assert_eq!((mappings[0].shared, mappings[2].shared), (0, 8 << 10));
        assert_eq!((mappings[3].prot, mappings[3].name.len()), (0, 0));
        assert!(mappings[3].flags.has(VmFlags::NO_RESERVE));
    }

    #[test]
    fn names_the_line_it_cannot_parse() {
        for text in [
            "Rss: 4 kB\n",
            "x\n",
            "1-2 rwxp 0 0:0 0 \nRss: many\n",
            "1-2 rwxpp 0 0:0 0\n",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn parses_its_own_map_with_and_without_details() {
        let maps = parse(&std::fs::read("/proc/self/maps").expect("maps")).expect("parses");
        let smaps = parse(&std::fs::read("/proc/self/smaps").expect("smaps")).expect("parses");
        assert!(maps.iter().any(|mapping| mapping.name == b"[stack]"));
        assert!(smaps.iter().all(|mapping| mapping.page_size >= 4096));
    }

    proptest! {
        #[test]
        fn never_panics(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&text);
        }
    }
}
