//! A dump that leaves the task running leaves it exactly as it was.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use firn_engine::arch::XsaveLayout;
use firn_engine::{Dump, Leave, Pid};
use firn_sys::ptrace::{self, SignalQueue};
use firn_sys::wait;

/// Everything about a sleeping task that a dump could disturb.
#[derive(Debug, PartialEq, Eq)]
struct Snapshot {
    registers: Vec<u64>,
    xstate: Vec<u8>,
    mask: u64,
    pending: (Vec<[u8; 128]>, Vec<[u8; 128]>),
    maps: String,
    descriptors: BTreeMap<String, (String, String)>,
    threads: usize,
}

struct Victim(Child);

impl Victim {
    /// perl's `sleep` without a number is pause(2), which goes on in the same call after any stop.
    fn start(script: &str) -> Victim {
        // Whoever runs the tests may have left descriptors open that are no business of the victim's.
        let script = format!("use POSIX; POSIX::close($_) for 3..1023; {script}");
        let child = Command::new("setsid")
            .args(["perl", "-e", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("perl and setsid are installed");
        let victim = Victim(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !fs::read_to_string(format!("/proc/{}/wchan", victim.pid()))
            .is_ok_and(|place| place.contains("pause"))
        {
            assert!(Instant::now() < deadline, "the victim never slept");
            std::thread::sleep(Duration::from_millis(5));
        }
        victim
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).unwrap())
    }

    fn snapshot(&self) -> Snapshot {
        let pid = self.pid();
        ptrace::seize(pid, 0).unwrap();
        ptrace::interrupt(pid).unwrap();
        wait::wait(pid).unwrap();
        let regs = ptrace::general_regs(pid).unwrap();
        let registers = vec![
            regs.rax,
            regs.orig_rax,
            regs.rip,
            regs.rsp,
            regs.rbp,
            regs.rbx,
            regs.rcx,
            regs.rdx,
            regs.rsi,
            regs.rdi,
            regs.r8,
            regs.r9,
            regs.r10,
            regs.r11,
            regs.r12,
            regs.r13,
            regs.r14,
            regs.r15,
            regs.eflags,
            regs.fs_base,
            regs.gs_base,
            regs.cs,
            regs.ss,
        ];
        let size = XsaveLayout::of_this_cpu().size();
        let snapshot = Snapshot {
            registers,
            xstate: ptrace::xstate(pid, size).unwrap(),
            mask: ptrace::signal_mask(pid).unwrap(),
            pending: (
                ptrace::pending_signals(pid, SignalQueue::Thread).unwrap(),
                ptrace::pending_signals(pid, SignalQueue::Process).unwrap(),
            ),
            maps: fs::read_to_string(format!("/proc/{pid}/maps")).unwrap(),
            descriptors: descriptors(pid),
            threads: fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(),
        };
        ptrace::detach(pid, 0).unwrap();
        snapshot
    }
}

fn descriptors(pid: Pid) -> BTreeMap<String, (String, String)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    entries
        .map(|entry| {
            let entry = entry.unwrap();
            let number = entry.file_name().into_string().unwrap();
            let target = fs::read_link(entry.path()).unwrap().display().to_string();
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
            (number, (target, info))
        })
        .collect()
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn registers_signals_memory_and_descriptors_stay() {
    let victim = Victim::start("$| = 1; open my $f, '<', '/etc/passwd'; <$f>; sleep");
    let before = victim.snapshot();
    for _ in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let report = Dump::new(victim.pid())
            .images_dir(dir.path())
            .leave(Leave::Running)
            .run()
            .unwrap();
        assert_eq!((report.tasks, report.threads), (1, 1));
        assert_eq!(victim.snapshot(), before);
    }
}

#[test]
fn pending_and_blocked_signals_stay() {
    let block = "sigprocmask(SIG_BLOCK, POSIX::SigSet->new(SIGUSR1, SIGUSR2)); \
                 kill 'USR1', $$; sleep";
    let victim = Victim::start(block);
    let before = victim.snapshot();
    assert_eq!(before.pending.1.len(), 1, "SIGUSR1 is pending");
    let dir = tempfile::tempdir().unwrap();
    Dump::new(victim.pid())
        .images_dir(dir.path())
        .leave(Leave::Running)
        .run()
        .unwrap();
    assert_eq!(victim.snapshot(), before);
}

#[test]
fn a_failed_dump_leaves_task_and_directory_as_they_were() {
    let victim = Victim::start(
        // Two userfaultfds.
        "pipe(R, W); syscall(323, 0); syscall(323, 0); sleep",
    );
    let before = victim.snapshot();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("mine.txt"), "keep").unwrap();
    let error = Dump::new(victim.pid())
        .images_dir(dir.path())
        .run()
        .unwrap_err();
    assert_eq!(error.obstacles().len(), 2, "{:?}", error.obstacles());
    assert_eq!(victim.snapshot(), before);
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1);
}
