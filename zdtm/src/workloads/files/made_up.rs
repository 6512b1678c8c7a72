//! Files that the kernel makes up: of /proc, of /sys, and namespaces.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc;

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, proc, sys};

pub static OWN: Workload = Workload::new(
    "files/proc-task",
    "files of /proc of the task, a thread and a child, shared with it",
    of_tasks,
);
pub static DEAD: Workload = Workload::new(
    "files/proc-dead",
    "files of /proc of a task that is gone and of a thread that is",
    of_dead,
);
pub static OUTSIDE: Workload = Workload::new(
    "files/proc-outside",
    "a file of /proc of a task outside of the tree",
    |stage| {
        let path = format!("/proc/{}/status", sys::parent());
        let file = sys::open(path, libc::O_RDONLY)?;
        stage.ready_and_wait()?;
        drop(file);
        Ok(())
    },
)
.refused(&["outside the tree", "describes task"]);
pub static SYSTEM: Workload = Workload::new(
    "files/proc-sys",
    "files of /proc and /sys that describe the machine, read in part",
    of_system,
);
pub static NAMESPACES: Workload = Workload::new(
    "files/namespaces",
    "descriptors of all namespaces of the task",
    namespaces,
);
pub static FOREIGN_NAMESPACE: Workload = Workload::new(
    "files/namespace-foreign",
    "a descriptor keeps a namespace that no task is in",
    |stage| {
        let namespace = foreign_namespace(stage)?;
        stage.ready_and_wait()?;
        drop(namespace);
        Ok(())
    },
)
.needs(&[Need::Root])
.refused(&["uts namespace", "does not run in"]);

fn read_start(file: impl AsFd, len: usize) -> Result<String> {
    sys::seek(&file, 0, libc::SEEK_SET)?;
    let mut bytes = vec![0; len];
    let got = sys::read(file, &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..got]).into_owned())
}

fn of_tasks(stage: &Stage) -> Result<()> {
    let parent = sys::pid();
    let status = sys::open("/proc/self/status", libc::O_RDONLY)?;
    let shared = sys::dup(&status)?;
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        let text = read_start(&shared, 4096).context("the parent's, in the child")?;
        ensure!(text.contains(&format!("Pid:\t{parent}\n")), "{text}");
        Ok(())
    })?;
    let (tell, hear) = mpsc::channel();
    let (done, wait) = mpsc::channel::<()>();
    let worker = std::thread::spawn(move || {
        let _ = tell.send(sys::tid());
        let _ = wait.recv();
    });
    let tid = hear.recv()?;
    let of_thread = sys::open(format!("/proc/self/task/{tid}/comm"), libc::O_RDWR)?;
    let of_child = sys::open(format!("/proc/{}/stat", child.pid), libc::O_RDONLY)?;
    let dir = sys::open("/proc/self/fd", libc::O_RDONLY | libc::O_DIRECTORY)?;
    let path_only = sys::open("/proc/self", libc::O_PATH)?;
    ensure!(sys::read_exact(&of_child, 3)?.len() == 3);
    stage.ready_and_wait()?;
    let place = sys::seek(&of_child, 0, libc::SEEK_CUR)?;
    ensure!(place == 3, "the position was 3, is {place}");
    let text = read_start(&of_child, 64)?;
    ensure!(
        text.starts_with(&format!("{} (", child.pid)),
        "the child's stat is `{text}`"
    );
    let text = read_start(&status, 4096)?;
    ensure!(
        text.contains(&format!("Pid:\t{parent}\n")),
        "the status is `{text}`"
    );
    sys::write(&of_thread, b"renamed")?;
    let name = proc::text("self", &format!("task/{tid}/comm"))?;
    ensure!(name.trim() == "renamed", "the thread is called {name}");
    ensure!(
        !sys::read_names(&dir, 4096)?.is_empty(),
        "the directory is empty"
    );
    let link = proc::link("self", &format!("fd/{}", path_only.as_raw_fd()))?;
    ensure!(
        link == format!("/proc/{parent}").as_ref() as &std::path::Path,
        "{link:?}"
    );
    drop(done);
    ensure!(worker.join().is_ok(), "the thread panicked");
    child.finish()
}

fn expect_gone(file: &OwnedFd, what: &str) -> Result<()> {
    sys::seek(file, 0, libc::SEEK_SET)?;
    let read = sys::read(file, &mut [0; 64]);
    let errno = read.as_ref().err().and_then(io::Error::raw_os_error);
    ensure!(errno == Some(libc::ESRCH), "{what}: {read:?}");
    Ok(())
}

fn of_dead(stage: &Stage) -> Result<()> {
    let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
    let child = sys::fork()?;
    if child == 0 {
        drop(writer);
        let _ = sys::read(&reader, &mut [0]);
        sys::exit_now(0);
    }
    let status = sys::open(format!("/proc/{child}/status"), libc::O_RDONLY)?;
    let stat = sys::open(format!("/proc/{child}/stat"), libc::O_RDONLY)?;
    drop((reader, writer));
    sys::wait(child)?;
    stage.ready_and_wait()?;
    expect_gone(&status, "status")?;
    expect_gone(&stat, "stat")
}

fn of_system(stage: &Stage) -> Result<()> {
    let files = [
        "/proc/version",
        "/proc/sys/kernel/ostype",
        "/proc/cpuinfo",
        "/sys/kernel/mm/transparent_hugepage/enabled",
    ];
    let open = |path: &&str| -> Result<(String, OwnedFd, u8)> {
        let fd = sys::open(path, libc::O_RDONLY).with_context(|| (*path).to_owned())?;
        let whole = fs::read(path)?;
        sys::read_exact(&fd, 2)?;
        Ok(((*path).to_owned(), fd, whole[2]))
    };
    let open: Vec<_> = files.iter().map(open).collect::<Result<_>>()?;
    stage.ready_and_wait()?;
    for (path, fd, third) in open {
        let place = sys::seek(&fd, 0, libc::SEEK_CUR)?;
        ensure!(place == 2, "{path}: the position was 2, is {place}");
        let read = sys::read_exact(&fd, 1)?;
        ensure!(read == [third], "{path}: {read:?} follows");
    }
    Ok(())
}

fn namespaces(stage: &Stage) -> Result<()> {
    let names = ["pid", "net", "ipc", "uts", "mnt", "user", "cgroup", "time"];
    let open = |name: &&'static str| {
        let fd = sys::open(format!("/proc/self/ns/{name}"), libc::O_RDONLY);
        fd.map(|fd| (*name, fd))
    };
    let open: Vec<_> = names.iter().map(open).collect::<io::Result<_>>()?;
    stage.ready_and_wait()?;
    for (name, fd) in open {
        let own = fs::metadata(format!("/proc/self/ns/{name}"))?;
        let held = fs::File::from(fd).metadata()?;
        ensure!(own.ino() == held.ino(), "{name}: it is another namespace");
    }
    Ok(())
}

fn foreign_namespace(stage: &Stage) -> Result<OwnedFd> {
    let child = stage.child(|stage| {
        sys::unshare(libc::CLONE_NEWUTS)?;
        stage.ready_and_wait()
    })?;
    let namespace = sys::open(format!("/proc/{}/ns/uts", child.pid), libc::O_RDONLY)?;
    child.finish()?;
    Ok(namespace)
}
