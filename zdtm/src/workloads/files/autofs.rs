//! Mounts that an automounter serves, and the pipe through which the kernel asks it.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::{Child, Need, Stage, Workload, sys};

pub static SERVED: Workload = Workload::new(
    "files/autofs",
    "an automounter that goes on mounting what is visited",
    served,
)
.needs(&[Need::Root, Need::FileSystem("autofs")]);
pub static TWO: Workload = Workload::new(
    "files/autofs-two",
    "two automounters of two groups, one of which has two mounts",
    two,
)
.needs(&[Need::Root, Need::FileSystem("autofs")]);
pub static DIRECT: Workload = Workload::new(
    "files/autofs-direct",
    "a direct mount that has been visited, one that has not, and an offset mount",
    direct,
)
.needs(&[Need::Root, Need::FileSystem("autofs")]);
pub static COVERED: Workload = Workload::new(
    "files/autofs-covered",
    "a direct mount under what was mounted for a visit, which is refused",
    |stage| {
        let mount = Served::of_kind(stage.path("mnt"), "direct")?;
        mount.visit_itself("visited")?;
        stage.ready_and_wait()?;
        let text = fs::read_to_string(mount.path.join("file"))?;
        ensure!(text == "visited", "{text:?}");
        sys::unmount(&mount.target)?;
        mount.visit_itself("again")?;
        Ok(sys::unmount(&mount.target)?)
    },
)
.needs(&[Need::Root, Need::FileSystem("autofs")])
.refused(&["hidden by a mount", "mnt"]);
pub static WAITED_FOR: Workload = Workload::new(
    "files/autofs-waited-for",
    "a request that the automounter has not read, which is refused",
    |stage| {
        let mount = Served::new(stage.path("mnt"))?;
        // Its shell ends at once, and leaves it to somebody outside of the tree.
        let mut shell = Command::new("sh");
        let path = mount.path.join("one/file");
        let script = r#"cat "$1" > /dev/null 2>&1 < /dev/null &"#;
        let visit = shell.args(["-c", script, "sh"]).arg(path).process_group(0);
        ensure!(visit.status()?.success(), "the shell");
        mount.await_request()?;
        stage.ready_and_wait()?;
        mount.serve("one")
    },
)
.needs(&[Need::Root, Need::FileSystem("autofs")])
.refused(&["somebody waits", "autofs"]);

/// How long a request may take to come, in milliseconds.
const PATIENCE: i32 = 60_000;
const TMPFS: &CStr = c"tmpfs";

/// A mount with its automounter. Dropping it takes it away.
struct Served {
    path: PathBuf,
    target: CString,
    pipe: OwnedFd,
    /// The root of the mount, through which requests are answered.
    root: OwnedFd,
}

impl Served {
    fn new(path: PathBuf) -> Result<Served> {
        Served::of_kind(path, "indirect")
    }

    /// Indirect mounts are asked for what is in them, direct and offset ones for themselves.
    fn of_kind(path: PathBuf, kind: &str) -> Result<Served> {
        fs::create_dir(&path)?;
        let (pipe, writer) = sys::pipe(libc::O_CLOEXEC)?;
        let target = sys::c_path(&path)?;
        let options = format!(
            "fd={},pgrp={},minproto=5,maxproto=5,{kind}",
            writer.as_raw_fd(),
            sys::group_and_session().0
        );
        let options = CString::new(options)?;
        sys::mount_with(Some(c"zdtm"), &target, Some(c"autofs"), 0, Some(&options))
            .context("mounting")?;
        let root = sys::open(&path, libc::O_RDONLY | libc::O_DIRECTORY)?;
        Ok(Served {
            path,
            target,
            pipe,
            root,
        })
    }

    fn await_request(&self) -> Result<()> {
        let ready = sys::poll(&self.pipe, libc::POLLIN, PATIENCE)?;
        ensure!(ready & libc::POLLIN != 0, "nobody asks for anything");
        Ok(())
    }

    /// Waits until somebody visits what is not there yet, which must have that name, and mounts it.
    fn serve(&self, name: &str) -> Result<()> {
        const TOKEN: usize = 8;
        const NAME: usize = 44;
        self.await_request()?;
        let mut packet = [0; 512];
        let len = sys::read(&self.pipe, &mut packet)?;
        ensure!(len > NAME, "a packet of {len} bytes");
        let asked = CStr::from_bytes_until_nul(&packet[NAME..len])?;
        ensure!(asked.to_bytes() == name.as_bytes(), "asked for {asked:?}");
        let place = self.path.join(name);
        fs::create_dir(&place)?;
        sys::mount(Some(TMPFS), &sys::c_path(&place)?, Some(TMPFS), 0)?;
        fs::write(place.join("file"), name)?;
        let token = u32::from_ne_bytes(packet[TOKEN..TOKEN + 4].try_into()?);
        Ok(sys::autofs_ready(&self.root, token)?)
    }

    /// Waits until somebody visits a direct mount, and mounts what is to be there over it.
    fn serve_itself(&self, text: &str) -> Result<()> {
        const TOKEN: usize = 8;
        self.await_request()?;
        let mut packet = [0; 512];
        let len = sys::read(&self.pipe, &mut packet)?;
        ensure!(len > TOKEN + 4, "a packet of {len} bytes");
        sys::mount(Some(TMPFS), &self.target, Some(TMPFS), 0)?;
        fs::write(self.path.join("file"), text)?;
        let token = u32::from_ne_bytes(packet[TOKEN..TOKEN + 4].try_into()?);
        Ok(sys::autofs_ready(&self.root, token)?)
    }

    /// Has a program visit a direct mount.
    fn visit_itself(&self, text: &str) -> Result<()> {
        thread::scope(|scope| {
            let serving = scope.spawn(|| self.serve_itself(text));
            let mut cat = Command::new("cat");
            let visit = cat.arg(self.path.join("file")).process_group(0).output();
            serving.join().expect("it does not panic")?;
            let visit = visit?;
            ensure!(visit.stdout == text.as_bytes(), "the visit: {visit:?}");
            Ok(())
        })
    }

    /// Looks whether the mount knows its automounter, and only once.
    fn check(&self) -> Result<()> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let path = format!(" {} ", self.path.display());
        let mut lines = mounts.lines().filter(|line| line.contains(&path));
        let Some(line) = lines.next() else {
            bail!("it is not mounted");
        };
        let group = format!(",pgrp={},", sys::group_and_session().0);
        ensure!(
            line.contains(&group),
            "the automounter is another one: {line}"
        );
        ensure!(lines.next().is_none(), "it is mounted twice");
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = sys::unmount(&self.target);
    }
}

/// A task of another group that visits `mnt/x`, which has been visited before, and `mnt/y`, which has not.
fn visitor(stage: &Stage, mnt: &'static str) -> Result<Child> {
    stage.child(move |stage| {
        sys::setpgid(0, 0)?;
        stage.ready_and_wait()?;
        for name in ["x", "y"] {
            let text = fs::read_to_string(stage.path(mnt).join(name).join("file"))?;
            ensure!(text == name, "{text:?} in {name}");
        }
        Ok(())
    })
}

/// Has a program visit `x`, which mounts it.
fn visit_x(mount: &Served) -> Result<()> {
    while_serving(mount, "x", || {
        let mut cat = Command::new("cat");
        let visit = cat.arg(mount.path.join("x/file")).process_group(0);
        ensure!(visit.output()?.stdout == b"x", "the first visit");
        Ok(())
    })
}

/// Does something that needs a mount, whose automounter is this task.
fn while_serving<T>(mount: &Served, name: &str, act: impl FnOnce() -> Result<T>) -> Result<T> {
    thread::scope(|scope| {
        let serving = scope.spawn(|| mount.serve(name));
        let result = act();
        serving.join().expect("it does not panic")?;
        result
    })
}

fn served(stage: &Stage) -> Result<()> {
    let mount = Served::new(stage.path("mnt"))?;
    let control = sys::open("/dev/autofs", libc::O_RDONLY)?;
    visit_x(&mount)?;
    let visiting = visitor(stage, "mnt")?;
    stage.ready_and_wait()?;
    mount.check()?;
    ensure!(sys::autofs_version(&control)? == 1, "/dev/autofs");
    while_serving(&mount, "y", || visiting.finish())
}

fn direct(stage: &Stage) -> Result<()> {
    let make = |name: &str, kind| Served::of_kind(stage.path(name), kind);
    let (visited, fresh) = (make("visited", "direct")?, make("fresh", "direct")?);
    let offset = make("offset", "offset")?;
    visited.visit_itself("visited")?;
    // As after its timeout.
    sys::unmount(&visited.target)?;
    stage.ready_and_wait()?;
    for mount in [&visited, &fresh, &offset] {
        mount.check()?;
    }
    for (mount, text) in [(&visited, "again"), (&fresh, "first"), (&offset, "offset")] {
        mount.visit_itself(text)?;
        sys::unmount(&mount.target)?;
    }
    Ok(())
}

fn two(stage: &Stage) -> Result<()> {
    let mounts = [Served::new(stage.path("a"))?, Served::new(stage.path("b"))?];
    let other = stage.child(|stage| {
        sys::setpgid(0, 0)?;
        let mount = Served::new(stage.path("c"))?;
        visit_x(&mount)?;
        stage.ready_and_wait()?;
        mount.check()?;
        mount.serve("y")?;
        // Its visitor has yet to read.
        std::mem::forget(mount);
        Ok(())
    })?;
    mounts.iter().try_for_each(visit_x)?;
    let [of_a, of_b, of_c] = ["a", "b", "c"].map(|mnt| visitor(stage, mnt));
    stage.ready_and_wait()?;
    for (mount, visiting) in mounts.iter().zip([of_a, of_b]) {
        mount.check()?;
        while_serving(mount, "y", || visiting?.finish())?;
    }
    sys::kill(other.pid, libc::SIGTERM)?;
    of_c?.finish()?;
    sys::unmount(&sys::c_path(&stage.path("c"))?)?;
    other.reap()
}
