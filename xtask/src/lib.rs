//! Development tasks that are also used by tests.

pub mod proto;
