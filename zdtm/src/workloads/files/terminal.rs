//! The controlling terminal of a shell's job, whose other end is outside of the tree.

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, sys};

pub static CONSOLE: Workload = Workload::new(
    "files/console",
    "the console of the machine, open twice and shared with a child",
    console,
)
.needs(&[Need::Root, Need::Console]);
pub static TERMINAL: Workload = Workload::new(
    "files/terminal",
    "a job of a shell: the session and its terminal are outside of the tree",
    terminal,
)
.shell_job();

fn terminal(stage: &Stage) -> Result<()> {
    // A job in the background may only set its terminal when the signal for it is ignored.
    sys::set_action(libc::SIGTTOU, libc::SIG_IGN, 0)?;
    let input = sys::borrow(0);
    let copy = sys::dup(input)?;
    let child = stage.child(|stage| {
        let before = sys::group_and_session();
        stage.ready_and_wait()?;
        let after = sys::group_and_session();
        ensure!(
            before == after,
            "(group, session) were {before:?}, are {after:?}"
        );
        sys::open("/dev/tty", libc::O_RDWR)
            .context("opening /dev/tty")
            .map(drop)
    })?;
    let ids = sys::group_and_session();
    stage.ready_and_wait()?;
    let now = sys::group_and_session();
    ensure!(now == ids, "(group, session) were {ids:?}, are {now:?}");
    let name = crate::proc::link("self", "fd/0")?;
    let session = sys::session_of_terminal(input)
        .with_context(|| format!("standard input is {name:?}, no terminal"))?;
    ensure!(
        session == ids.1,
        "the terminal belongs to session {session}, not {}",
        ids.1
    );
    let same = sys::same_open_file(sys::pid(), 0, sys::pid(), {
        std::os::fd::AsRawFd::as_raw_fd(&copy)
    })?;
    ensure!(same, "the duplicate is an open file of its own now");
    let mut settings = sys::terminal_settings(input)?;
    settings.c_lflag ^= libc::ECHO;
    sys::set_terminal(&copy, &settings).context("setting the terminal")?;
    ensure!(
        sys::terminal_settings(input)?.c_lflag == settings.c_lflag,
        "the setting does not hold"
    );
    ensure!(
        sys::write(sys::open("/dev/tty", libc::O_RDWR)?, b"x")? == 1,
        "/dev/tty takes nothing"
    );
    child.finish()
}

fn console(stage: &Stage) -> Result<()> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
    let open = || sys::open("/dev/console", flags).context("opening it");
    let (first, second) = (open()?, open()?);
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        sys::terminal_settings(&first)
            .context("in the child")
            .map(drop)
    })?;
    let before = sys::terminal_settings(&first)?;
    stage.ready_and_wait()?;
    for fd in [&first, &second] {
        let after = sys::terminal_settings(fd)?;
        ensure!(
            (after.c_iflag, after.c_lflag, after.c_cc)
                == (before.c_iflag, before.c_lflag, before.c_cc),
            "the settings have changed"
        );
        let found = sys::fcntl(fd, libc::F_GETFL, 0)?;
        ensure!(found & libc::O_NONBLOCK != 0, "its flags are {found:o}");
    }
    child.finish()
}
