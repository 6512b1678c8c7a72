//! A mapping as images describe it.

use firn_proto::{FirnVmaEntry, VmaEntry};
use firn_sys::mm::{advice, map, prot};

use super::range::{AddressRange, PAGE_SIZE};

/// What kind of mapping it is: the `status` bits of an image.
pub mod status {
    /// Ordinary memory.
    pub const REGULAR: u32 = 1 << 0;
    /// The page of old system calls at a fixed address.
    pub const VSYSCALL: u32 = 1 << 2;
    /// Code that the kernel lends.
    pub const VDSO: u32 = 1 << 3;
    /// The heap.
    pub const HEAP: u32 = 1 << 5;
    /// Copy-on-write of a file.
    pub const FILE_PRIVATE: u32 = 1 << 6;
    /// Shared with a file.
    pub const FILE_SHARED: u32 = 1 << 7;
    /// Shared without a file.
    pub const ANON_SHARED: u32 = 1 << 8;
    /// Private without a file.
    pub const ANON_PRIVATE: u32 = 1 << 9;
    /// A System V segment.
    pub const SYSVIPC: u32 = 1 << 10;
    /// Of a socket.
    pub const SOCKET: u32 = 1 << 11;
    /// Data of the kernel that the vdso reads.
    pub const VVAR: u32 = 1 << 12;
    /// Completion ring of asynchronous I/O.
    pub const AIORING: u32 = 1 << 13;
    /// Of a memory file.
    pub const MEMFD: u32 = 1 << 14;
    /// Shadow stack.
    pub const SHSTK: u32 = 1 << 15;
    /// Not a mapping: a guard region inside one.
    pub const GUARD: u32 = 1 << 16;
    /// Page of user probes.
    pub const UPROBES: u32 = 1 << 17;
    /// Restored by a plug-in.
    pub const EXT_PLUGIN: u32 = 1 << 27;
}

/// A mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vma {
    /// Its addresses.
    pub range: AddressRange,
    /// Offset in the file or object, in bytes.
    pub offset: u64,
    /// File id, or number of the shared memory object.
    pub shmid: u64,
    /// `PROT_*` bits.
    pub prot: u32,
    /// `MAP_*` bits.
    pub flags: u32,
    /// Bits of [`status`].
    pub status: u32,
    /// Bit n: advice n was given.
    pub advice: u64,
    /// How the file has to be open.
    pub open_flags: Option<u32>,
    /// Pages are locked when they come.
    pub lock_on_fault: bool,
    /// Sealed against changes.
    pub is_sealed: bool,
    /// A part of an io_uring ring.
    pub is_ring: bool,
}

impl Vma {
    /// Whether all of the status bits are set.
    pub fn is(&self, status: u32) -> bool {
        self.status & status == status
    }

    /// Whether any of the `MAP_*` bits is set.
    pub fn has_flag(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }

    /// Whether the advice was given.
    pub fn has_advice(&self, advice: u32) -> bool {
        self.advice & 1 << advice != 0
    }

    /// Whether it is mapped from a descriptor of a file or of a memory file.
    pub fn is_file(&self) -> bool {
        self.status & (status::FILE_PRIVATE | status::FILE_SHARED) != 0
    }

    /// Whether it is mapped from a descriptor of any kind.
    pub fn has_object(&self) -> bool {
        self.is_file() || self.status & (status::ANON_SHARED | status::SOCKET) != 0
    }

    /// Whether its pages belong to the process alone and are saved with it.
    pub fn has_own_pages(&self) -> bool {
        let private = status::FILE_PRIVATE | status::ANON_PRIVATE | status::AIORING;
        let never = status::VVAR | status::VSYSCALL | status::UPROBES | status::GUARD;
        self.status & private != 0 && self.status & never == 0 && !self.has_flag(map::DROPPABLE)
    }

    /// Whether a lazy restore may leave its pages for later.
    pub fn may_be_lazy(&self) -> bool {
        let needed = map::ANONYMOUS | map::PRIVATE;
        self.flags & needed == needed
            && !self.has_flag(map::LOCKED | map::HUGETLB)
            && self.status & (status::VDSO | status::VVAR | status::VSYSCALL | status::SHSTK) == 0
    }

    /// Size of its pages.
    pub fn page_size(&self) -> u64 {
        huge_page_size(self.flags)
    }

    /// What it is, for messages and plans.
    pub fn title(&self) -> String {
        let kind = match () {
            () if self.is(status::VDSO) => "vdso",
            () if self.is(status::VVAR) => "vvar",
            () if self.is(status::VSYSCALL) => "vsyscall",
            () if self.is(status::GUARD) => "guard region",
            () if self.is(status::AIORING) => "aio ring",
            () if self.is(status::HEAP) => "heap",
            () if self.is(status::SHSTK) => "shadow stack",
            () if self.is_ring => "io_uring ring",
            () if self.is(status::SOCKET) => "rings of a socket",
            () if self.is(status::MEMFD) => "memory file",
            () if self.is(status::FILE_PRIVATE) => "private file",
            () if self.is(status::FILE_SHARED) => "shared file",
            () if self.is(status::SYSVIPC) => "System V segment",
            () if self.is(status::ANON_SHARED) => "shared memory",
            () if self.has_flag(map::GROWSDOWN) => "stack",
            () => "memory",
        };
        let bit = |bit, letter| if self.prot & bit != 0 { letter } else { '-' };
        let (r, w, x) = (
            bit(prot::READ, 'r'),
            bit(prot::WRITE, 'w'),
            bit(prot::EXEC, 'x'),
        );
        format!("{kind} [{}] {r}{w}{x}", self.range)
    }

    /// Encodes it for an image.
    pub fn to_image(&self) -> VmaEntry {
        let extension = self.lock_on_fault || self.is_sealed || self.is_ring;
        VmaEntry {
            start: self.range.start,
            end: self.range.end,
            pgoff: self.offset,
            shmid: self.shmid,
            prot: self.prot,
            flags: self.flags,
            status: self.status,
            fd: -1,
            madv: (self.advice != 0).then_some(self.advice),
            fdflags: self.open_flags,
            firn: extension.then_some(FirnVmaEntry {
                lock_on_fault: self.lock_on_fault.then_some(true),
                sealed: self.is_sealed.then_some(true),
                io_uring: self.is_ring.then_some(true),
            }),
        }
    }

    /// Decodes an entry of an image, unchecked.
    pub fn from_image(entry: &VmaEntry) -> Vma {
        let firn = entry.firn.unwrap_or_default();
        Vma {
            range: AddressRange::new(entry.start, entry.end),
            offset: entry.pgoff,
            shmid: entry.shmid,
            prot: entry.prot,
            flags: entry.flags,
            status: entry.status,
            advice: entry.madv.unwrap_or(0),
            open_flags: entry.fdflags,
            lock_on_fault: firn.lock_on_fault.unwrap_or(false),
            is_sealed: firn.sealed.unwrap_or(false),
            is_ring: firn.io_uring.unwrap_or(false),
        }
    }
}

/// Size of the pages that `MAP_HUGETLB` and the size in `flags` ask for.
pub fn huge_page_size(flags: u32) -> u64 {
    if flags & map::HUGETLB == 0 {
        return PAGE_SIZE;
    }
    match (flags & map::HUGE_MASK) >> map::HUGE_SHIFT {
        0 => super::range::HUGE_PAGE_SIZE,
        log2 => 1 << log2,
    }
}

/// Advice that smaps shows and images keep, in the order in which it is given again.
pub const KEPT_ADVICE: [u32; 8] = [
    advice::RANDOM,
    advice::SEQUENTIAL,
    advice::DONTFORK,
    advice::MERGEABLE,
    advice::HUGEPAGE,
    advice::NOHUGEPAGE,
    advice::DONTDUMP,
    advice::WIPEONFORK,
];
