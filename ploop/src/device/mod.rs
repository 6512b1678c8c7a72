//! The disk as a block device.
//!
//! | device | needs | where it is used |
//! |---|---|---|
//! | [`fuse`] + [`loopdev`] | FUSE, loop | everywhere; survives the death of its server |
//! | [`nbd`] | nothing for the server, a client for a device | for other programs, over a Unix socket |

mod export;
pub mod fuse;
pub mod loopdev;
pub mod nbd;

pub use export::Export;
