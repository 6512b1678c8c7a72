//! What the processor and the kernel can do.

use super::{PAGE, Region};

const AT_HWCAP2: u64 = 26;
const HWCAP2_FSGSBASE: u64 = 2;

/// Tells whether user space may use the FSGSBASE instructions.
pub fn has_fsgsbase() -> bool {
    // SAFETY: getauxval reads a table the kernel left; no pointers.
    unsafe { libc::getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE != 0 }
}

/// Tells whether the kernel knows `MADV_GUARD_INSTALL`.
pub fn has_guard_regions() -> bool {
    Region::anon(PAGE).is_ok_and(|page| {
        let known = page.advise(super::MADV_GUARD_INSTALL).is_ok();
        page.unmap().is_ok() && known
    })
}

const ARCH_SET_GS: i64 = 0x1001;
const ARCH_GET_FS: i64 = 0x1003;
const ARCH_GET_GS: i64 = 0x1004;

fn read_base(which: i64) -> std::io::Result<u64> {
    let mut base = 0u64;
    // SAFETY: the kernel writes one word, which lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, which, &raw mut base) };
    super::check_long(result).map(|_| base)
}

/// Reads this thread's FS base.
pub fn fs_base() -> std::io::Result<u64> {
    read_base(ARCH_GET_FS)
}

/// Reads this thread's GS base.
pub fn gs_base() -> std::io::Result<u64> {
    read_base(ARCH_GET_GS)
}

/// Sets this thread's GS base, which nothing in a 64-bit glibc program uses.
pub fn set_gs_base(base: u64) -> std::io::Result<()> {
    let base = i64::try_from(base).map_err(std::io::Error::other)?;
    super::call_plain(libc::SYS_arch_prctl, [ARCH_SET_GS, base, 0, 0, 0, 0]).map(drop)
}
