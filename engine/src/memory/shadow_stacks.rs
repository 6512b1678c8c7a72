//! Memory of shadow stacks: the kernel maps it by a call of its own, always readable and writable, and lets
//! nobody write to it but calls, returns, an instruction of its own and a tracer.
//!
//! So it is mapped empty with the other memory, and its pages come through /proc/PID/mem when the task is
//! traced: some kernels let only tracers write what tasks themselves may not.
//!
//! Source: linux arch/x86/kernel/shstk.c, map_shadow_stack (Linux 6.6); mm/gup.c, check_vma_flags;
//! fs/proc/base.c, proc_mem_foll_force (Linux 6.12).

use firn_sys::mm::prot;
use firn_sys::nr;

use super::vma::Vma;
use crate::program::{Program, Rule};

/// Protection that shadow stacks come with.
pub(super) const PROT_AT_FIRST: u32 = prot::READ | prot::WRITE;

/// Adds the call that maps a shadow stack, at its place and empty.
pub(super) fn map(p: &mut Program, vma: &Vma) {
    let (start, len) = (vma.range.start, vma.range.len());
    p.call(
        nr::MAP_SHADOW_STACK,
        &[start.into(), len.into(), 0.into()],
        Rule::Exact(start.cast_signed()),
        format!("map_shadow_stack of {}", vma.title()),
    );
}
