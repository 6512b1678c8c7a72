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
