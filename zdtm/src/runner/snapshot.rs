//! A tree as /proc shows it from outside, flattened into comparable lines.

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::compare::lasting_flags;
use crate::proc;

/// What one line is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The process.
    pub pid: i32,
    /// The kind of state: `tree`, `maps`, `fd`, ...
    pub aspect: &'static str,
    /// Which one of that kind: an address, a descriptor, a thread.
    pub detail: String,
}

/// A tree at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The first process.
    pub root: i32,
    /// All that was seen.
    pub lines: BTreeMap<Key, String>,
    /// Every process with its threads.
    pub tasks: Vec<(i32, Vec<i32>)>,
    names: Names,
    /// One of so many descriptors is looked at.
    one_in: usize,
}

/// Descriptors of a tree that are looked at; of more of them only a part is, in each process another one. A workload
/// with so many looks at all of them itself.
const MOST_DESCRIPTORS: usize = 50_000;

/// Kernel objects without a lasting number are numbered by first appearance, so that who shares what
/// can be compared, and the inode numbers, which are new after a restore, cannot disturb.
#[derive(Debug, Clone, Default)]
struct Names(HashMap<String, usize>);

impl Names {
    fn lasting(&mut self, link: &str) -> String {
        let Some((kind, _)) = link.split_once(":[") else {
            return link.to_owned();
        };
        let next = self.0.len();
        let number = *self.0.entry(link.to_owned()).or_insert(next);
        format!("{kind}:#{number}")
    }
}

impl Snapshot {
    /// Looks at the tree below `root`. What ends meanwhile is left out, wholly or in part.
    pub fn take(root: i32) -> io::Result<Snapshot> {
        let mut snapshot = Snapshot::empty(root);
        let tree = proc::tree(root)?;
        let count =
            |pid: &i32| proc::numbers(&format!("/proc/{pid}/fd")).map_or(0, |fds| fds.len());
        let nr_descriptors: usize = tree.iter().map(count).sum();
        snapshot.one_in = nr_descriptors / MOST_DESCRIPTORS + 1;
        for pid in tree {
            unless_gone(snapshot.add_process(pid))?;
        }
        Ok(snapshot)
    }

    /// A snapshot with nothing in it yet.
    pub(super) fn empty(root: i32) -> Snapshot {
        Snapshot {
            root,
            ..Snapshot::default()
        }
    }

    /// The state of a process: `T`, `Z`, or `alive` for all others.
    pub fn state_of(&self, pid: i32) -> Option<&str> {
        let key = Key {
            pid,
            aspect: "state",
            detail: String::new(),
        };
        self.lines.get(&key).map(String::as_str)
    }

    fn add(&mut self, pid: i32, aspect: &'static str, detail: impl ToString, value: String) {
        self.lines.insert(
            Key {
                pid,
                aspect,
                detail: detail.to_string(),
            },
            value,
        );
    }

    fn add_process(&mut self, pid: i32) -> io::Result<()> {
        let stat = proc::stat(pid)?;
        let threads = proc::threads(pid)?;
        self.add(pid, "tree", "parent", stat[4].clone());
        self.add(pid, "tree", "threads", format!("{threads:?}"));
        self.add(pid, "ids", "group", stat[5].clone());
        self.add(pid, "ids", "session", stat[6].clone());
        self.add(pid, "ids", "exit signal", stat[38].clone());
        // Running and sleeping come and go; stopped and dead stay.
        let state = if matches!(stat[3].as_str(), "T" | "Z") {
            &stat[3]
        } else {
            "alive"
        };
        self.add(pid, "state", "", state.to_owned());
        let is_dead = stat[3] == "Z";
        if is_dead {
            self.add(pid, "exit", "status", stat[52].clone());
            self.add(pid, "comm", pid, stat[2].clone());
        }
        // Where only the main thread is dead, the others have all that it had.
        let living: &[i32] = if is_dead { &threads[1..] } else { &threads };
        self.tasks.push((pid, threads.clone()));
        if let Some(&speaker) = living.first() {
            self.add_mm(pid, speaker, &proc::stat(speaker)?)?;
            self.add_files(pid, speaker)?;
            for &tid in living {
                unless_gone(self.add_thread(pid, tid))?;
            }
        }
        Ok(())
    }

    fn add_mm(&mut self, pid: i32, speaker: i32, stat: &[String]) -> io::Result<()> {
        let fields = [26, 27, 28, 45, 46, 47, 48, 49, 50, 51].map(|index| stat[index].as_str());
        self.add(pid, "mm", "addresses", fields.join(" "));
        for file in ["cmdline", "environ"] {
            self.add(
                pid,
                "mm",
                file,
                proc::text(speaker, file)?.replace('\0', " "),
            );
        }
        let auxv = std::fs::read(format!("/proc/{speaker}/auxv"))?;
        let auxv: String = auxv.iter().map(|byte| format!("{byte:02x}")).collect();
        self.add(pid, "mm", "auxv", auxv);
        for details in proc::smaps(speaker)? {
            let vma = &details.vma;
            // The kernel's page for all 64-bit programs is nobody's mapping. A 32-bit program has none, but
            // its restored task is one that has begun as a 64-bit program.
            if vma.path == "[vsyscall]" {
                continue;
            }
            let path = self.names.lasting(&vma.path);
            let lasting = !path.ends_with(" (deleted)")
                && !path.starts_with("/dev/zero")
                && !path.starts_with("anon_inode:")
                && path == vma.path;
            let inode = if lasting { vma.inode } else { 0 };
            let line = format!(
                "-{:x} {} {:x} {inode} {path}",
                vma.end, vma.perms, vma.offset
            );
            let start = format!("{:x}", vma.start);
            let flags = details.lines.get("VmFlags").cloned().unwrap_or_default();
            self.add(pid, "vmflags", &start, flags);
            self.add(pid, "maps", start, line);
        }
        Ok(())
    }

    fn add_files(&mut self, pid: i32, speaker: i32) -> io::Result<()> {
        for (name, file) in [("cwd", "cwd"), ("root", "root"), ("exe", "exe")] {
            let link = proc::link(speaker, file)?.to_string_lossy().into_owned();
            self.add(pid, name, "", link);
        }
        let one_in = i32::try_from(self.one_in.max(1)).unwrap_or(i32::MAX);
        let fds = proc::numbers(&format!("/proc/{speaker}/fd"))?;
        for fd in fds.into_iter().filter(|fd| (fd + pid) % one_in == 0) {
            // Another thread may close it meanwhile; all that comes behind it is still there.
            unless_gone(self.add_descriptor(pid, speaker, fd))?;
        }
        Ok(())
    }

    fn add_descriptor(&mut self, pid: i32, speaker: i32, fd: i32) -> io::Result<()> {
        let link = proc::link(speaker, &format!("fd/{fd}"))?;
        let info = proc::lines(speaker, &format!("fdinfo/{fd}"))?;
        let link = self.names.lasting(&link.to_string_lossy());
        let get = |name: &str| info.get(name).map_or("", String::as_str);
        let line = format!("{link} pos {} flags {}", get("pos"), get("flags"));
        self.add(pid, "fd", fd, line);
        Ok(())
    }

    fn add_thread(&mut self, pid: i32, tid: i32) -> io::Result<()> {
        let task = format!("{pid}/task/{tid}");
        let status = proc::lines(&task, "status")?;
        let mut signals = Vec::new();
        for name in ["SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"] {
            signals.push(format!(
                "{name} {}",
                status.get(name).map_or("", String::as_str)
            ));
        }
        self.add(pid, "signals", tid, signals.join(" "));
        for (aspect, name) in [
            ("comm", "Name"),
            ("umask", "Umask"),
            ("tracer", "TracerPid"),
        ] {
            self.add(
                pid,
                aspect,
                tid,
                status.get(name).cloned().unwrap_or_default(),
            );
        }
        let syscall = proc::text(&task, "syscall")?.trim().to_owned();
        self.add(pid, "syscall", tid, syscall);
        Ok(())
    }
}

/// One VMA as two lines of a snapshot tell of it.
struct Area {
    start: usize,
    end: usize,
    perms: String,
    offset: usize,
    inode: String,
    path: String,
    flags: String,
}

impl Area {
    /// Reads `-end perms offset inode path`, as [`Snapshot::add_mm`] writes it.
    fn parse(start: &str, line: &str, flags: &str) -> Option<Area> {
        let mut words = line.strip_prefix('-')?.splitn(5, ' ');
        let hex = |text: &str| usize::from_str_radix(text, 16).ok();
        Some(Area {
            start: hex(start)?,
            end: hex(words.next()?)?,
            perms: words.next()?.to_owned(),
            offset: hex(words.next()?)?,
            inode: words.next()?.to_owned(),
            path: words.next()?.to_owned(),
            flags: lasting_flags(flags, true).join(" "),
        })
    }

    /// Tells whether `next` goes on where this one ends, with the same of everything.
    fn goes_on_with(&self, next: &Area) -> bool {
        let anonymous = self.inode == "0" && !self.path.starts_with('/');
        let follows = anonymous || self.offset + (self.end - self.start) == next.offset;
        self.end == next.start
            && follows
            && (&self.perms, &self.inode, &self.path, &self.flags)
                == (&next.perms, &next.inode, &next.path, &next.flags)
    }

    fn line(&self) -> String {
        let Area {
            end,
            perms,
            offset,
            inode,
            path,
            ..
        } = self;
        format!("-{end:x} {perms} {offset:x} {inode} {path}")
    }
}

impl Snapshot {
    /// The same with VMAs joined that are neighbours and differ in nothing a program can tell. The
    /// kernel keeps such ones apart by where their pages came from, which a restore makes new.
    pub fn joined(&self) -> Snapshot {
        let mut joined = self.clone();
        joined
            .lines
            .retain(|key, _| !matches!(key.aspect, "maps" | "vmflags"));
        let mut areas: Vec<(i32, Area)> = Vec::new();
        for (key, line) in self.lines.iter().filter(|(key, _)| key.aspect == "maps") {
            let flags_key = Key {
                aspect: "vmflags",
                ..key.clone()
            };
            let flags = self.lines.get(&flags_key).map_or("", String::as_str);
            areas.extend(Area::parse(&key.detail, line, flags).map(|area| (key.pid, area)));
        }
        areas.sort_by_key(|(pid, area)| (*pid, area.start));
        let mut whole: Vec<(i32, Area)> = Vec::new();
        for (pid, area) in areas {
            match whole.last_mut() {
                Some((of, last)) if *of == pid && last.goes_on_with(&area) => last.end = area.end,
                _ => whole.push((pid, area)),
            }
        }
        for (pid, area) in whole {
            let start = format!("{:x}", area.start);
            joined.add(pid, "vmflags", &start, area.flags.clone());
            joined.add(pid, "maps", &start, area.line());
        }
        joined
    }
}

/// What ends while it is looked at is left out.
fn unless_gone(looked: io::Result<()>) -> io::Result<()> {
    match looked {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
        looked => looked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameless_objects_are_numbered_by_first_appearance() {
        let mut names = Names::default();
        assert_eq!(names.lasting("pipe:[77]"), "pipe:#0");
        assert_eq!(names.lasting("socket:[9]"), "socket:#1");
        assert_eq!(names.lasting("pipe:[77]"), "pipe:#0");
        assert_eq!(names.lasting("/tmp/a"), "/tmp/a");
    }

    #[test]
    fn neighbours_that_differ_in_nothing_are_joined() {
        let mut snapshot = Snapshot::empty(5);
        let areas = [
            ("1000", "-2000 rw-p 0 0 [heap]", "rd wr ac"),
            ("2000", "-3000 rw-p 0 0 [heap]", "rd wr"),
            ("3000", "-4000 rw-p 0 0 [heap]", "rd wr lo"),
            ("5000", "-6000 r--p 0 7 /a", "rd"),
            ("6000", "-7000 r--p 1000 7 /a", "rd"),
            ("7000", "-8000 r--p 1000 7 /a", "rd"),
        ];
        for (start, line, flags) in areas {
            snapshot.add(5, "maps", start, line.to_owned());
            snapshot.add(5, "vmflags", start, flags.to_owned());
        }
        let joined = snapshot.joined();
        let maps = joined.lines.iter().filter(|(key, _)| key.aspect == "maps");
        let starts: Vec<&str> = maps.map(|(key, _)| key.detail.as_str()).collect();
        assert_eq!(starts, ["1000", "3000", "5000", "7000"]);
        let key = Key {
            pid: 5,
            aspect: "maps",
            detail: "5000".to_owned(),
        };
        assert_eq!(joined.lines[&key], "-7000 r--p 0 7 /a");
    }

    #[test]
    fn a_snapshot_of_this_process_has_its_descriptors_and_maps() {
        let mut sleeper = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep");
        let own = i32::try_from(sleeper.id()).expect("pids are small");
        let snapshot = Snapshot::take(own).expect("proc is readable");
        sleeper
            .kill()
            .and_then(|()| sleeper.wait())
            .expect("our own child");
        let has = |aspect| {
            snapshot
                .lines
                .keys()
                .any(|k| k.pid == own && k.aspect == aspect)
        };
        assert!(
            ["maps", "vmflags", "fd", "signals", "mm"]
                .into_iter()
                .all(has)
        );
        assert_eq!(snapshot.tasks[0].0, own);
    }
}
