//! What fdinfo shows of a ring.

use std::collections::BTreeMap;

/// A ring as fdinfo shows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Shown {
    /// Entries that the kernel has taken.
    pub(super) taken: u32,
    /// Completions that it has put into the ring.
    pub(super) completed: u32,
    /// Tail of submissions.
    pub(super) sq_tail: u32,
    /// The thread that submits, where there is one and the ring was not in use.
    pub(super) sq_thread: Option<i32>,
    /// The processor that it has run on, or keeps to.
    pub(super) sq_thread_cpu: Option<u32>,
    /// Names of registered files by their places.
    pub(super) files: BTreeMap<u32, String>,
    /// Number of registered files.
    pub(super) nr_files: u32,
    /// Registered memory, address and length; nothing in an empty place.
    pub(super) buffers: Vec<(u64, u64)>,
    /// Operations of requests that wait for something.
    pub(super) polls: Vec<u8>,
    /// Completions for which there was no room.
    pub(super) nr_overflown: usize,
    /// It has credentials registered.
    pub(super) has_personalities: bool,
    /// Lines about waiting submission entries, of which there are more than are told.
    pub(super) entries: Vec<String>,
    /// Lines about completions that wait.
    pub(super) completions: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    None,
    Entries,
    Completions,
    Files,
    Buffers,
    Personalities,
    Polls,
    Overflow,
}

impl Shown {
    /// Reads the lines behind those that every file has; None where they are not those of a ring.
    pub(super) fn parse(lines: &[String]) -> Option<Shown> {
        let mut shown = Shown::default();
        let mut part = Part::None;
        let mut is_ring = false;
        for line in lines {
            let is_detail = line.starts_with([' ', '\t']);
            if is_detail {
                shown.detail(part, line)?;
                continue;
            }
            let (key, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.trim();
            part = Part::None;
            match key {
                "CachedSqHead" => {
                    shown.taken = value.parse().ok()?;
                    is_ring = true;
                }
                "CachedCqTail" => shown.completed = value.parse().ok()?,
                "SqTail" => shown.sq_tail = value.parse().ok()?,
                "SqThread" => shown.sq_thread = value.parse().ok().filter(|tid| *tid > 0),
                "SqThreadCpu" => shown.sq_thread_cpu = value.parse().ok(),
                "SQEs" => part = Part::Entries,
                "CQEs" => part = Part::Completions,
                "UserFiles" => {
                    shown.nr_files = value.parse().ok()?;
                    part = Part::Files;
                }
                "UserBufs" => part = Part::Buffers,
                "Personalities" => {
                    shown.has_personalities = true;
                    part = Part::Personalities;
                }
                "PollList" => part = Part::Polls,
                "CqOverflowList" => part = Part::Overflow,
                _ => {}
            }
        }
        is_ring.then_some(shown)
    }

    fn detail(&mut self, part: Part, line: &str) -> Option<()> {
        match part {
            Part::Entries => self.entries.push(line.to_owned()),
            Part::Completions => self.completions.push(line.to_owned()),
            Part::Buffers => self.buffers.push(buffer(line)?),
            Part::Polls => self.polls.push(operation(line)?),
            Part::Overflow => self.nr_overflown += 1,
            Part::Files => drop(self.name_file(line)),
            Part::Personalities | Part::None => {}
        }
        Some(())
    }
}

impl Shown {
    /// `    0: /dev/null`
    fn name_file(&mut self, line: &str) -> Option<()> {
        let (place, name) = line.split_once(':')?;
        let place = place.trim().parse().ok()?;
        self.files.insert(place, name.trim().to_owned());
        Some(())
    }
}

/// `  op=6, task_works=0`
fn operation(line: &str) -> Option<u8> {
    let (_, value) = line.split_once("op=")?;
    value.split(',').next()?.trim().parse().ok()
}

/// `    0: 0x7f5e30000000/4096`, or `<none>` in an empty place.
fn buffer(line: &str) -> Option<(u64, u64)> {
    let (_, value) = line.split_once(':')?;
    let value = value.trim();
    if value == "<none>" {
        return Some((0, 0));
    }
    let (address, len) = value.split_once('/')?;
    let address = address.strip_prefix("0x")?;
    Some((u64::from_str_radix(address, 16).ok()?, len.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_ring_is_read_as_linux_6_18_shows_it() {
        let text = "SqMask:\t0x7\nSqHead:\t9\nSqTail:\t10\nCachedSqHead:\t9\nCqMask:\t0xf\nCqHead:\t4\n\
            CqTail:\t9\nCachedCqTail:\t9\nSQEs:\t1\n    5: opcode:NOP, fd:0, flags:0, off:0\nCQEs:\t1\n   \
            15: user_data:0, res:0, flag:0, extra1:5, extra2:0\n\nSqThread:\t-1\nSqThreadCpu:\t-1\n\
            SqTotalTime:\t0\nSqWorkTime:\t0\nUserFiles:\t2\n    0: /dev/null\n    1: pipe:[504983]\n\
            UserBufs:\t2\n    0: 0x7f5e30000000/4096\n    1: <none>\nPollList:\n  op=6, task_works=0\n\
            CqOverflowList:\n  user_data=7, res=0, flags=0\nNAPI:\tdisabled\n";
        let shown = Shown::parse(&lines(text)).expect("captured from a kernel");
        assert_eq!((shown.taken, shown.completed, shown.sq_tail), (9, 9, 10));
        assert_eq!((shown.nr_files, shown.sq_thread), (2, None));
        assert_eq!(shown.sq_thread_cpu, None);
        assert_eq!(shown.files[&1], "pipe:[504983]");
        assert_eq!(shown.buffers, [(0x7f5e_3000_0000, 4096), (0, 0)]);
        assert_eq!((&shown.polls[..], shown.nr_overflown), (&[6][..], 1));
        assert_eq!((shown.entries.len(), shown.completions.len()), (1, 1));
        assert!(!shown.has_personalities);
    }

    #[test]
    fn other_files_are_no_rings() {
        assert_eq!(Shown::parse(&lines("eventfd-count: 7\n")), None);
        assert_eq!(Shown::parse(&lines("CachedSqHead:\tmany\n")), None);
    }
}
