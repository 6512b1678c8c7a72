//! What is mapped, and what is in it.

mod anonymous;

use crate::Workload;

pub static ALL: &[&Workload] = &[
    &anonymous::PATTERNS,
    &anonymous::PROTECTIONS,
    &anonymous::SPARSE,
    &anonymous::MANY,
    &anonymous::LARGE,
    &anonymous::ZERO_PAGES,
];
