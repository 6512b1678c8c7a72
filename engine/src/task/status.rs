//! /proc/PID/status and /proc/PID/stat of one task, parsed once for all modules.
//!
//! Source: man 5 proc_pid_status, proc_pid_stat.

use std::path::PathBuf;

use firn_sys::Pid;
use firn_sys::procfs;

use super::shadow_stack::Features;
use super::threads::ThreadsDir;

/// Failure to read or understand a task's status.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The file could not be read; the task is gone or /proc is not what we expect.
    #[error("can't read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A field is missing or has another form than documented.
    #[error("{} has no usable field {field}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Name of the field.
        field: &'static str,
    },
}

/// Ids of the real, effective, saved and file system kind.
pub type FourIds = [u32; 4];

/// What /proc/PID/status says about one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Name of the thread, at most 15 bytes of anything.
    pub name: Vec<u8>,
    /// State letter: R S D T t Z X I.
    pub state: u8,
    /// umask, absent for zombies.
    pub umask: Option<u32>,
    /// The tracer's pid, or 0.
    pub tracer: i32,
    /// uids.
    pub uid: FourIds,
    /// gids.
    pub gid: FourIds,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Signals that wait for this very thread; bit n-1 is signal n.
    pub pending: u64,
    /// Inheritable, permitted, effective, bounding and ambient capabilities.
    pub caps: [u64; 5],
    /// no_new_privs attribute.
    pub no_new_privs: bool,
    /// Seccomp mode: 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Ids of the thread from our pid namespace inwards.
    pub nspid: Vec<i32>,
    /// True for a kernel thread.
    pub kthread: bool,
    /// Features of its shadow stack.
    pub shadow_stack: Features,
}

impl Status {
    /// Reads the status of a thread.
    ///
    /// # Errors
    /// The thread is gone, or /proc has another form than documented.
    pub fn read(pid: Pid, tid: Pid) -> Result<Status, StatusError> {
        let path = PathBuf::from(format!("/proc/{pid}/task/{tid}/status"));
        let text = procfs::read_record(&path).map_err(|source| StatusError::Read {
            path: path.clone(),
            source,
        })?;
        Status::parse(&text).map_err(|field| StatusError::Field { path, field })
    }

    /// Reads the status of a thread of `pid`, whose directory that is.
    ///
    /// # Errors
    /// As [`Status::read`].
    pub fn read_in(dir: &ThreadsDir, pid: Pid, tid: Pid) -> Result<Status, StatusError> {
        let path = || PathBuf::from(format!("/proc/{pid}/task/{tid}/status"));
        let text = dir.read(tid, "status").map_err(|errno| StatusError::Read {
            path: path(),
            source: errno.into(),
        })?;
        Status::parse(&text).map_err(|field| StatusError::Field {
            path: path(),
            field,
        })
    }

    fn parse(text: &[u8]) -> Result<Status, &'static str> {
        let mut lines = Lines::of(text);
        // In the order of the file, so that it is walked once.
        let name = lines.value("Name").ok_or("Name")?;
        let umask = lines
            .text("Umask")
            .and_then(|value| u32::from_str_radix(value, 8).ok());
        let state = lines.value("State").and_then(|state| state.first());
        Ok(Status {
            name: unescape(name),
            umask,
            state: *state.ok_or("State")?,
            tracer: lines.number("TracerPid").ok_or("TracerPid")?,
            uid: lines.four("Uid").ok_or("Uid")?,
            gid: lines.four("Gid").ok_or("Gid")?,
            groups: lines.numbers("Groups").ok_or("Groups")?,
            nspid: lines.numbers("NSpid").ok_or("NSpid")?,
            kthread: lines.number::<u32>("Kthread") == Some(1),
            // Whoever does not know asks for the signals themselves.
            pending: lines.hex("SigPnd").unwrap_or(u64::MAX),
            caps: [
                lines.hex("CapInh").ok_or("CapInh")?,
                lines.hex("CapPrm").ok_or("CapPrm")?,
                lines.hex("CapEff").ok_or("CapEff")?,
                lines.hex("CapBnd").ok_or("CapBnd")?,
                lines.hex("CapAmb").ok_or("CapAmb")?,
            ],
            no_new_privs: lines.number::<u32>("NoNewPrivs") == Some(1),
            seccomp: lines.number("Seccomp").unwrap_or(0),
            shadow_stack: Features::parse(
                lines.later("x86_Thread_features"),
                lines.later("x86_Thread_features_locked"),
            ),
        })
    }
}

/// The lines `key:`, tab, value of a text. Each search begins behind the line that was found last, so that
/// keys asked for in their order are found at once; any other order works, too.
struct Lines<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Lines<'a> {
    fn of(text: &'a [u8]) -> Lines<'a> {
        Lines { text, at: 0 }
    }

    fn value(&mut self, key: &str) -> Option<&'a [u8]> {
        let (before, behind) = self.text.split_at(self.at);
        let (start, value) = find(behind, key)
            .map(|(start, value)| (start + before.len(), value))
            .or_else(|| find(before, key))?;
        self.at = start;
        Some(value)
    }

    /// A value that is further down if it is there at all: most kernels write no such line.
    fn later(&self, key: &str) -> Option<&'a str> {
        let (_, value) = find(&self.text[self.at..], key)?;
        std::str::from_utf8(value).ok()
    }

    fn text(&mut self, key: &str) -> Option<&'a str> {
        std::str::from_utf8(self.value(key)?).ok().map(str::trim)
    }

    fn number<T: std::str::FromStr>(&mut self, key: &str) -> Option<T> {
        self.text(key)?.parse().ok()
    }

    fn hex(&mut self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.text(key)?, 16).ok()
    }

    fn numbers<T: std::str::FromStr>(&mut self, key: &str) -> Option<Vec<T>> {
        let values = self.text(key)?.split_whitespace();
        values.map(|value| value.parse().ok()).collect()
    }

    fn four(&mut self, key: &str) -> Option<FourIds> {
        self.numbers(key)?.try_into().ok()
    }
}

/// Where the line with that key begins, and the value behind `key:` and a tab, without the newline.
fn find<'a>(text: &'a [u8], key: &str) -> Option<(usize, &'a [u8])> {
    let mut start = 0;
    for line in procfs::lines(text) {
        if let Some(value) = line.strip_prefix(key.as_bytes())
            && let Some(value) = value.strip_prefix(b":")
        {
            return Some((start, value.strip_prefix(b"\t").unwrap_or(value)));
        }
        start += line.len() + 1;
    }
    None
}

/// The kernel writes newline and backslash in names as two characters each.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut bytes = name.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => match bytes.next() {
                Some(b'n') => out.push(b'\n'),
                Some(other) => out.push(other),
                None => out.push(b'\\'),
            },
            other => out.push(other),
        }
    }
    out
}

/// What /proc/PID/stat says about a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// State letter.
    pub state: u8,
    /// Parent.
    pub ppid: Pid,
    /// Process group.
    pub pgid: Pid,
    /// Session.
    pub sid: Pid,
    /// Signal to the parent at exit.
    pub exit_signal: i32,
    /// Raw wait status of a zombie (0 without ptrace rights).
    pub exit_code: i32,
    /// PF_* flags of the kernel.
    pub flags: u32,
    /// When it was born, in clock ticks since the machine was started.
    pub start_ticks: u64,
}

/// PF_FORKNOEXEC and friends are not ours; this one marks kernel threads.
const PF_KTHREAD: u32 = 0x0020_0000;
const PF_IO_WORKER: u32 = 0x10;

impl Stat {
    /// Reads the stat line of a process.
    ///
    /// # Errors
    /// The process is gone, or /proc has another form than documented.
    pub fn read(pid: Pid) -> Result<Stat, StatusError> {
        Stat::of_file(PathBuf::from(format!("/proc/{pid}/stat")))
    }

    /// Reads the stat line of a thread, with the thread's own exit code: that of a stopped process is how it
    /// was stopped.
    ///
    /// # Errors
    /// As [`Stat::read`].
    pub fn read_thread(pid: Pid, tid: Pid) -> Result<Stat, StatusError> {
        Stat::of_file(PathBuf::from(format!("/proc/{pid}/task/{tid}/stat")))
    }

    fn of_file(path: PathBuf) -> Result<Stat, StatusError> {
        let text = procfs::read_record(&path).map_err(|source| StatusError::Read {
            path: path.clone(),
            source,
        })?;
        Stat::parse(&text).ok_or(StatusError::Field {
            path,
            field: "line",
        })
    }

    fn parse(text: &[u8]) -> Option<Stat> {
        // The name in parentheses may hold anything, so count from its last closing one.
        let end = text.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(&text[end + 1..]).ok()?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // fields[0] is field 3 of the man page.
        let at = |nth: usize| fields.get(nth - 3).copied();
        let pid = |nth| at(nth)?.parse().ok().map(Pid::from_raw);
        Some(Stat {
            state: *at(3)?.as_bytes().first()?,
            ppid: pid(4)?,
            pgid: pid(5)?,
            sid: pid(6)?,
            flags: at(9)?.parse().ok()?,
            exit_signal: at(38)?.parse().ok()?,
            start_ticks: at(22)?.parse().ok()?,
            exit_code: at(52).and_then(|value| value.parse().ok()).unwrap_or(0),
        })
    }

    /// True for a kernel thread.
    pub fn is_kernel_thread(&self) -> bool {
        self.flags & PF_KTHREAD != 0
    }

    /// True for a thread of the process that the kernel has made to work for io_uring.
    pub fn is_io_worker(&self) -> bool {
        self.flags & PF_IO_WORKER != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &[u8] = b"Name:\ta\\nb\\\\c\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t7\n\
        TracerPid:\t0\nUid:\t0\t1\t2\t3\nGid:\t4\t5\t6\t7\nGroups:\t10 20 \nNSpid:\t7\t1\n\
        Kthread:\t0\nSigPnd:\t0000000000000200\nCapInh:\t0000000000000000\nCapPrm:\t000001fffeffffff\n\
        CapEff:\t0000000000000001\nCapBnd:\t0000000000000002\nCapAmb:\t0000000000000000\n\
        NoNewPrivs:\t1\nSeccomp:\t2\n";

    #[test]
    fn reads_every_field() {
        let status = Status::parse(STATUS).unwrap();
        assert_eq!(status.name, b"a\nb\\c");
        assert_eq!((status.state, status.umask), (b'S', Some(0o22)));
        assert_eq!((status.uid, status.gid), ([0, 1, 2, 3], [4, 5, 6, 7]));
        assert_eq!(status.groups, [10, 20]);
        assert_eq!((status.pending, status.caps[1]), (0x200, 0x1ff_feff_ffff));
        assert!(status.no_new_privs);
        assert_eq!((status.seccomp, status.nspid.as_slice()), (2, &[7, 1][..]));
        assert_eq!(status.shadow_stack, Features::default());
        let lines = b"x86_Thread_features:\tshstk \nx86_Thread_features_locked:\tshstk wrss \n";
        let status = Status::parse(&[STATUS, lines].concat()).unwrap();
        let features = status.shadow_stack;
        assert_eq!((features.on, features.locked), (1, 3));
    }

    #[test]
    fn a_missing_field_is_named() {
        assert_eq!(Status::parse(b"Name:\tx\n"), Err("State"));
    }

    #[test]
    fn the_name_may_hold_parentheses() {
        let mut fields: Vec<String> = (3..=52).map(|nth| nth.to_string()).collect();
        fields[0] = "S".to_owned();
        let text = format!("4711 (a) b (c)) {}\n", fields.join(" "));
        let stat = Stat::parse(text.as_bytes()).unwrap();
        assert_eq!(
            (stat.ppid.raw(), stat.pgid.raw(), stat.sid.raw()),
            (4, 5, 6)
        );
        assert_eq!((stat.flags, stat.exit_signal, stat.exit_code), (9, 38, 52));
        assert!(!stat.is_kernel_thread());
    }

    #[test]
    fn own_stat_and_status_agree() {
        let me = Pid::this();
        let stat = Stat::read(me).unwrap();
        let status = Status::read(me, me).unwrap();
        assert_eq!(status.nspid.last(), Some(&me.raw()));
        assert_eq!(stat.exit_signal, 17);
    }
}
