//! What the status bits of a mapping mean.

pub(crate) const STACK: u32 = 1 << 1;
pub(crate) const VSYSCALL: u32 = 1 << 2;
pub(crate) const VDSO: u32 = 1 << 3;
pub(crate) const HEAP: u32 = 1 << 5;
pub(crate) const FILE_PRIVATE: u32 = 1 << 6;
pub(crate) const FILE_SHARED: u32 = 1 << 7;
pub(crate) const ANON_SHARED: u32 = 1 << 8;
pub(crate) const SYSVIPC: u32 = 1 << 10;
pub(crate) const SOCKET: u32 = 1 << 11;
pub(crate) const VVAR: u32 = 1 << 12;
pub(crate) const AIORING: u32 = 1 << 13;
pub(crate) const MEMFD: u32 = 1 << 14;
pub(crate) const SHSTK: u32 = 1 << 15;
pub(crate) const GUARD: u32 = 1 << 16;
pub(crate) const PLUGIN: u32 = 1 << 27;

/// Bit of `vma_entry.flags`: the mapping is a stack.
pub(crate) const GROWSDOWN: u32 = 0x100;
