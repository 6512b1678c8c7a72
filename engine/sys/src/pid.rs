//! Process and thread ids.

use std::fmt;

/// A process or thread id as seen in the pid namespace of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pid(i32);

impl Pid {
    /// Wraps a raw id.
    pub const fn from_raw(raw: i32) -> Pid {
        Pid(raw)
    }

    /// The raw id, as calls take it.
    pub fn raw(self) -> i32 {
        self.0
    }

    /// The id as images store it.
    pub fn to_image(self) -> u32 {
        self.0.cast_unsigned()
    }

    /// The id that an image stores.
    pub fn from_image(raw: u32) -> Pid {
        Pid(raw.cast_signed())
    }

    /// The calling process.
    pub fn this() -> Pid {
        Pid(std::process::id().cast_signed())
    }

    /// The calling thread.
    pub fn this_thread() -> Pid {
        Pid(nix::unistd::gettid().as_raw())
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
