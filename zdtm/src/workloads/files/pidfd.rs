//! Pidfds.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc;

use anyhow::{Context, Result, ensure};

use crate::{Stage, Workload, sys};

pub static LIVING: Workload = Workload::new(
    "files/pidfd",
    "pidfds of the task itself and a child, shared and watched",
    living,
);
pub static DEAD: Workload = Workload::new(
    "files/pidfd-dead",
    "pidfds of a zombie and of a task that is gone",
    dead,
);
pub static THREAD: Workload = Workload::new("files/pidfd-thread", "a pidfd of a thread", thread);

fn is_gone(pidfd: &OwnedFd) -> bool {
    let error = sys::pidfd_signal(pidfd, 0).err();
    error.and_then(|error| error.raw_os_error()) == Some(libc::ESRCH)
}

fn living(stage: &Stage) -> Result<()> {
    let own = sys::pidfd(sys::pid(), 0)?;
    let copy = sys::dup(&own)?;
    let parent = sys::pid();
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        let own = sys::borrow(own.as_raw_fd());
        sys::pidfd_signal(own, 0).context("the parent, in the child")
    })?;
    let of_child = sys::pidfd(child.pid, libc::O_NONBLOCK)?;
    let set = sys::epoll()?;
    let add = libc::EPOLL_CTL_ADD;
    sys::epoll_control(&set, add, of_child.as_raw_fd(), 1, 9)?;
    stage.ready_and_wait()?;
    sys::pidfd_signal(&own, 0).context("the task itself")?;
    let same = sys::same_open_file(parent, own.as_raw_fd(), child.pid, own.as_raw_fd())?;
    ensure!(same, "the child's is another open file");
    let same = sys::same_open_file(parent, own.as_raw_fd(), parent, copy.as_raw_fd())?;
    ensure!(same, "the duplicate is another open file");
    ensure!(
        sys::epoll_wait(&set, 0)?.is_empty(),
        "the child has ended too early"
    );
    sys::pidfd_signal(&of_child, libc::SIGTERM).context("the child")?;
    let events = sys::epoll_wait(&set, 5000)?;
    ensure!(events.len() == 1 && events[0].1 == 9, "no end: {events:?}");
    child.reap()
}

fn dead(stage: &Stage) -> Result<()> {
    let end = || -> Result<i32> {
        let pid = sys::fork()?;
        if pid == 0 {
            sys::exit_now(3);
        }
        Ok(pid)
    };
    let zombie = end()?;
    let of_zombie = sys::pidfd(zombie, 0)?;
    sys::wait_leaving_zombie(zombie)?;
    let gone = end()?;
    let of_gone = sys::pidfd(gone, 0)?;
    let again = sys::pidfd(gone, 0)?;
    sys::wait(gone)?;
    stage.ready_and_wait()?;
    ensure!(
        is_gone(&of_gone) && is_gone(&again),
        "the dead has come back"
    );
    ensure!(
        sys::poll(&of_gone, libc::POLLIN, 0)? != 0,
        "its end is not told"
    );
    ensure!(
        sys::poll(&of_zombie, libc::POLLIN, 0)? != 0,
        "the zombie's end is not told"
    );
    let exit = sys::wait(zombie)?;
    ensure!(exit == sys::Exit::Code(3), "the zombie: {exit}");
    ensure!(is_gone(&of_zombie), "the zombie is still there");
    Ok(())
}

fn thread(stage: &Stage) -> Result<()> {
    let (tell, hear) = mpsc::channel();
    let (done, wait) = mpsc::channel::<()>();
    let worker = std::thread::spawn(move || {
        let _ = tell.send(sys::tid());
        let _ = wait.recv();
    });
    let tid = hear.recv()?;
    const PIDFD_THREAD: i32 = libc::O_EXCL;
    let pidfd = sys::pidfd(tid, PIDFD_THREAD)?;
    stage.ready_and_wait()?;
    sys::pidfd_signal(&pidfd, 0).context("the thread")?;
    ensure!(
        sys::poll(&pidfd, libc::POLLIN, 0)? == 0,
        "the thread has ended too early"
    );
    drop(done);
    ensure!(worker.join().is_ok(), "the thread panicked");
    ensure!(
        sys::poll(&pidfd, libc::POLLIN, 5000)? != 0,
        "the thread's end is not told"
    );
    Ok(())
}
