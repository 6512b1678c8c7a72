//! Numbers and structures of the memory calls, for programs that other tasks run.
//!
//! Source: man 2 mmap, madvise, mlock2, prctl (PR_SET_MM_MAP, Linux 3.18), mseal (6.10).

use linux_raw_sys::prctl::prctl_mm_map;

/// Page protections.
pub mod prot {
    /// Readable.
    pub const READ: u32 = 1;
    /// Writable.
    pub const WRITE: u32 = 2;
    /// Executable.
    pub const EXEC: u32 = 4;
}

/// Flags of mmap.
pub mod map {
    /// Shared.
    pub const SHARED: u32 = 0x1;
    /// Copy-on-write.
    pub const PRIVATE: u32 = 0x2;
    /// Memory that the kernel may drop (Linux 6.11).
    pub const DROPPABLE: u32 = 0x8;
    /// At exactly this address, whatever is there.
    pub const FIXED: u32 = 0x10;
    /// Not of a file.
    pub const ANONYMOUS: u32 = 0x20;
    /// Grows downwards.
    pub const GROWSDOWN: u32 = 0x100;
    /// Locked in memory.
    pub const LOCKED: u32 = 0x2000;
    /// Not counted against the commit limit.
    pub const NORESERVE: u32 = 0x4000;
    /// A thread's stack; means no huge pages.
    pub const STACK: u32 = 0x2_0000;
    /// Huge pages.
    pub const HUGETLB: u32 = 0x4_0000;
    /// At exactly this address, which must be free.
    pub const FIXED_NOREPLACE: u32 = 0x10_0000;
    /// Position of the log2 of the huge page size.
    pub const HUGE_SHIFT: u32 = 26;
    /// The six bits of the huge page size.
    pub const HUGE_MASK: u32 = 0x3f << HUGE_SHIFT;
}

/// Advice of madvise.
pub mod advice {
    /// Expect access in no order.
    pub const RANDOM: u32 = 1;
    /// Expect access in order.
    pub const SEQUENTIAL: u32 = 2;
    /// Drop the pages.
    pub const DONTNEED: u32 = 4;
    /// Do not give the range to children.
    pub const DONTFORK: u32 = 10;
    /// Look for equal pages to merge.
    pub const MERGEABLE: u32 = 12;
    /// Equal pages are not merged any more.
    pub const UNMERGEABLE: u32 = 13;
    /// Use huge pages.
    pub const HUGEPAGE: u32 = 14;
    /// Use no huge pages.
    pub const NOHUGEPAGE: u32 = 15;
    /// Leave out of core dumps.
    pub const DONTDUMP: u32 = 16;
    /// Children see zeros.
    pub const WIPEONFORK: u32 = 18;
    /// Make a guard region (Linux 6.13).
    pub const GUARD_INSTALL: u32 = 102;
}

/// Flags of mremap.
pub mod remap {
    /// The mapping may move.
    pub const MAYMOVE: u32 = 1;
    /// To exactly this address, whatever is there.
    pub const FIXED: u32 = 2;
}

/// Flag of mlock2: lock pages as they come.
pub const MLOCK_ONFAULT: u32 = 1;
/// Number of mseal, which libc does not name everywhere.
pub const SYS_MSEAL: i64 = 462;
/// prctl option: describe the address space.
pub const PR_SET_MM: i32 = libc::PR_SET_MM;
/// Sub-option: all of it, with auxv and executable, in one call.
pub const PR_SET_MM_MAP: i32 = 14;
/// prctl option: may core dumps be written and /proc be read.
pub const PR_SET_DUMPABLE: i32 = libc::PR_SET_DUMPABLE;

/// First address after user space with four-level page tables.
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// The fields of an address space that /proc/PID/stat shows, and its break.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MmFields {
    /// First address of the program text.
    pub start_code: u64,
    /// Its end.
    pub end_code: u64,
    /// First address of the initialised data.
    pub start_data: u64,
    /// Its end.
    pub end_data: u64,
    /// Where the heap begins.
    pub start_brk: u64,
    /// Where it ends now.
    pub brk: u64,
    /// Stack pointer at the start.
    pub start_stack: u64,
    /// First address of the arguments.
    pub arg_start: u64,
    /// Their end.
    pub arg_end: u64,
    /// First address of the environment.
    pub env_start: u64,
    /// Its end.
    pub env_end: u64,
}

/// Offset of the auxv pointer in `struct prctl_mm_map`, which [`MmFields::tail`] ends.
pub const MM_MAP_AUXV: usize = std::mem::offset_of!(prctl_mm_map, auxv);
/// Size of that structure.
pub const MM_MAP_SIZE: usize = size_of::<prctl_mm_map>();

const _: () = assert!(MM_MAP_SIZE == 104 && MM_MAP_AUXV == 88);

impl MmFields {
    /// The eleven addresses in the order of `struct prctl_mm_map`.
    pub fn addresses(&self) -> [u64; 11] {
        [
            self.start_code,
            self.end_code,
            self.start_data,
            self.end_data,
            self.start_brk,
            self.brk,
            self.start_stack,
            self.arg_start,
            self.arg_end,
            self.env_start,
            self.env_end,
        ]
    }

    /// The last eight bytes of `struct prctl_mm_map`: auxv size in bytes and descriptor of the
    /// executable.
    pub fn tail(auxv_size: u32, exe_fd: u32) -> u64 {
        u64::from(auxv_size) | u64::from(exe_fd) << 32
    }
}
