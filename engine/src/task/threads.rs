//! The threads of a process as /proc/PID/task shows them.
//!
//! All is read relative to that directory: a kernel that is asked for hundreds of threads by their full paths
//! spends more time on the beginnings of the paths than on the answers.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;

use firn_sys::{Pid, Result, file};

/// The directory of the threads of one process.
#[derive(Debug)]
pub struct ThreadsDir(OwnedFd);

impl ThreadsDir {
    /// Opens the directory of a process.
    ///
    /// # Errors
    /// ENOENT: it is gone.
    pub fn open(pid: Pid) -> Result<ThreadsDir> {
        let path = format!("/proc/{pid}/task");
        let dir = file::open(Path::new(&path), file::O_DIRECTORY.cast_unsigned())?;
        Ok(ThreadsDir(dir))
    }

    /// Tids of the threads, ascending.
    ///
    /// # Errors
    /// ENOENT or ESRCH: the process is gone.
    pub fn tids(&self) -> Result<Vec<Pid>> {
        let numbers = file::list_numbers(&self.0)?;
        Ok(numbers.into_iter().map(Pid::from_raw).collect())
    }

    /// Reads a file of a thread, such as `status`.
    ///
    /// # Errors
    /// ENOENT or ESRCH: the thread is gone. EACCES without ptrace rights, for some files.
    pub fn read(&self, tid: Pid, what: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file::read_at(&self.0, &name(tid, what), &mut bytes)?;
        Ok(bytes)
    }

    /// Reads where a link of a thread leads, such as `ns/net`.
    ///
    /// # Errors
    /// As [`ThreadsDir::read`].
    pub fn link(&self, tid: Pid, what: &str) -> Result<Vec<u8>> {
        file::read_link_at(&self.0, &name(tid, what))
    }
}

fn name(tid: Pid, what: &str) -> CString {
    CString::new(format!("{tid}/{what}")).expect("names of /proc hold no NUL")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::status::Status;

    #[test]
    fn own_threads_are_listed_and_read() {
        let me = Pid::this_thread();
        let dir = ThreadsDir::open(Pid::this()).expect("this process");
        assert!(dir.tids().expect("a list").contains(&me));
        let status = dir.read(me, "status").expect("this thread");
        assert_eq!(
            Status::read(Pid::this(), me)
                .expect("the same")
                .nspid
                .last(),
            Some(&me.raw())
        );
        assert!(status.starts_with(b"Name:"));
        let namespace = dir.link(me, "ns/net").expect("a link");
        assert!(namespace.starts_with(b"net:["));
    }

    #[test]
    fn threads_that_are_not_there_are_errors() {
        let dir = ThreadsDir::open(Pid::this()).expect("this process");
        assert!(dir.read(Pid::from_raw(i32::MAX), "status").is_err());
        assert!(ThreadsDir::open(Pid::from_raw(i32::MAX)).is_err());
    }
}
