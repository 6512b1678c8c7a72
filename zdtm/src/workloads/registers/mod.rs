//! Values held in registers of a thread that makes no system call.

mod bases;
mod shadow_stack;
mod spin;
mod values;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &values::GENERAL,
    &values::X87,
    &values::SSE,
    &values::AVX,
    &values::AVX512,
    &values::THREADS,
    &bases::FS_BASE,
    &bases::GS_BASE,
    &bases::ROUNDING,
    &shadow_stack::SHADOW_STACK_KEPT,
];
