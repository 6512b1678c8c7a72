//! What stands in the way of a dump, found before anything is stopped for long.

use std::fmt;

use firn_sys::Pid;

/// One object that can't be dumped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// The task that has it.
    pub pid: Pid,
    /// The object, with its descriptor or address, such as `fd 7 (socket:[4711])`.
    pub object: String,
    /// Why it can't be dumped, one clause.
    pub reason: String,
    /// What the user can do about it, where there is something.
    pub hint: Option<String>,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "task {}: {}: {}", self.pid, self.object, self.reason)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}
