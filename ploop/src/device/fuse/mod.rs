//! The disk as a file of a FUSE mount.
//!
//! Written against the kernel's protocol and not on a library: a server has to be replaceable while
//! the mount goes on, which needs the greeting and the serving in different processes, and the
//! kernel's way of handing out unanswered requests again.

mod abi;
mod bulk;
mod connection;
mod device;
mod lane;
mod pace;
mod serve;

pub use connection::{Agreement, Connection, MAX_DATA};
pub use device::FuseLoop;
pub use serve::{resend, start};
