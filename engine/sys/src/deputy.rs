//! A child that takes over when this process is killed.
//!
//! ```text
//! this process   notes how far it has come, and dismisses the deputy when all is done
//!  └─ deputy     a session of its own, so that signals for our group or terminal do not reach it; sleeps until
//!                nobody has the other end of its pipe any more, reads the last note, and acts
//! ```
//!
//! Notes lie in the pipe, so none can be half made, and the deputy does not wake up for them.
//!
//! Source: man 2 fork, poll (POLLHUP); linux fs/pipe.c, pipe_release.

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{self, AssertUnwindSafe};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{ForkResult, fork};

use crate::{Errno, Pid, Result, helpers, pipe, session, task, wait, worker};

/// What is noted when there is nothing to do for a deputy any more.
const DISMISSED: u8 = 0;

/// The child, seen from the process that may be killed. Dropping it dismisses it.
#[derive(Debug)]
pub struct Deputy {
    pid: Pid,
    notes: Option<OwnedFd>,
}

impl Deputy {
    /// Makes a deputy that does `act` with the last note, None where there is none, after the death of this process,
    /// on a copy of what is in its memory and behind its descriptors now.
    ///
    /// # Errors
    /// EBUSY when this process has threads that are no [`helpers`], which may hold locks that would never be free in
    /// the deputy. EAGAIN, ENOMEM of fork(2); EMFILE.
    ///
    /// # Preconditions
    /// No helper is at work, and `act` wants none.
    pub fn appoint(act: impl FnOnce(Option<u8>)) -> Result<Deputy> {
        if worker::nr_threads().is_none_or(|nr| nr > 1 + helpers::nr_alive()) {
            return Err(Errno::EBUSY);
        }
        let (news, notes) = pipe::create()?;
        // SAFETY: all other threads wait for something to do, without a lock that the child takes; fork sees to those
        // of the allocator. The child never returns from here.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Deputy {
                pid: Pid::from_raw(child.as_raw()),
                notes: Some(notes),
            }),
            ForkResult::Child => {
                drop(notes);
                let done = panic::catch_unwind(AssertUnwindSafe(|| stand_by(&news, act)));
                // SAFETY: ends this process without the destructors of what belongs to the other one.
                unsafe { libc::_exit(i32::from(done.is_err())) }
            }
        }
    }

    /// Notes how far this process has come.
    ///
    /// # Panics
    /// If the note is 0, which is the dismissal.
    pub fn note(&self, note: u8) {
        assert_ne!(note, DISMISSED, "a note");
        self.write(note);
    }

    /// Ends the deputy, since all is done. It goes while this process goes on.
    pub fn dismiss(&mut self) {
        self.write(DISMISSED);
        if self.notes.take().is_some() {
            // Others may have the end of the pipe, too.
            let _ = task::kill(self.pid, libc::SIGKILL);
        }
    }

    fn write(&self, note: u8) {
        if let Some(notes) = &self.notes {
            // Should it be dead, there is nobody to tell.
            let _ = pipe::write(notes, &[note]);
        }
    }
}

impl Drop for Deputy {
    fn drop(&mut self) {
        self.dismiss();
        while matches!(
            wait::wait(self.pid),
            Ok(wait::Status::Stopped { .. } | wait::Status::Continued)
        ) {}
    }
}

/// Waits for the end of the other process, and acts unless all was done.
fn stand_by(news: &OwnedFd, act: impl FnOnce(Option<u8>)) {
    // One that leads a group has a terminal and a group of its own already.
    let _ = session::start();
    // Notes do not wake it up, only the end.
    let mut end = [PollFd::new(news.as_fd(), PollFlags::empty())];
    while poll(&mut end, PollTimeout::NONE).is_err() {}
    let mut last = None;
    let mut room = [0; 16];
    while let Ok(len @ 1..) = rustix::io::read(news, &mut room) {
        last = Some(room[len - 1]);
    }
    if last != Some(DISMISSED) {
        act(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// What the deputy of a process has seen that dies after these notes, or comes to its end.
    fn last_note(notes: &[u8], ends_well: bool) -> String {
        let (seen, see) = pipe::create().expect("a pipe");
        // SAFETY: the child takes no lock but those of the allocator, and never returns.
        let child = match unsafe { fork() }.expect("a child") {
            ForkResult::Child => {
                let tell = |last: Option<u8>| {
                    let _ = pipe::write(&see, format!("{last:?}").as_bytes());
                };
                if let Ok(deputy) = Deputy::appoint(tell) {
                    notes.iter().for_each(|note| deputy.note(*note));
                    // The pipe ends with the process.
                    std::mem::forget((!ends_well).then_some(deputy));
                }
                // SAFETY: takes a number.
                unsafe { libc::_exit(7) }
            }
            ForkResult::Parent { child } => Pid::from_raw(child.as_raw()),
        };
        drop(see);
        let mut text = String::new();
        // It ends when the child and its deputy have.
        std::fs::File::from(seen)
            .read_to_string(&mut text)
            .expect("a text");
        assert_eq!(wait::wait(child), Ok(wait::Status::Ended(7 << 8)));
        text
    }

    #[test]
    fn the_last_note_counts() {
        assert_eq!(last_note(&[], false), "None");
        assert_eq!(last_note(&[1, 2, 7], false), "Some(7)");
    }

    #[test]
    fn nothing_is_done_after_the_end() {
        assert_eq!(last_note(&[1, 2], true), "");
    }
}
