//! Live migration of process trees and containers between hosts.
//!
//! Will hold the session, the transports, memory and disk rounds, and the commit protocol. Nothing is
//! implemented yet, so the crate exports nothing.
#![forbid(unsafe_code)]
