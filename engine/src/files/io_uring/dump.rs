//! A ring into an image, or why it can't be.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use firn_proto::{FdTypes, FileEntry, FirnUringEntry};
use firn_sys::io_uring::{self, setup};
use firn_sys::pagemap::{Pagemap, entry as page};
use firn_sys::{Errno, Pid, pidfd};

use super::belongings;
use super::dumped::Busy;
use super::fdinfo::Shown;
use super::in_flight::{self, Known, Progress};
use super::inner::Inner;
use super::layout::{self, Layout};
use super::memory::Memory;
use super::operations;
use super::probe::{self, Special};
use super::restore::{self, KNOWN};
use super::settings;
use super::turns::{self, Turns};
use crate::files::dump::{DumpState, query};
use crate::files::error::FileDumpError;
use crate::files::fdinfo::FdInfo;
use crate::files::kind::Dumping;
use crate::files::open_file::{OpenFile, Trouble};
use crate::kernel::Kernel;

const PAGE: usize = 4096;
/// Bits that say how a ring is made and not what it is then.
const ONLY_AT_SETUP: u32 = setup::CQSIZE | setup::CLAMP;
/// How long requests may take to end, and how often is looked.
const PATIENCE: Duration = Duration::from_millis(100);
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);
pub(super) const FINISH: &str = "dump when its requests have ended, or let the program cancel them (IORING_OP_ASYNC_CANCEL); \
                      most programs have an option to do without io_uring, such as UV_USE_IO_URING=0 for Node";
const FINISH_OR_ROOT: &str = "dump as root (CAP_BPF and CAP_PERFMON), or when its requests have ended, or let the program \
                              cancel them (IORING_OP_ASYNC_CANCEL)";

/// What fdinfo alone tells against saving a ring, and what lasts: a program that runs has requests in flight at
/// almost any moment, and others at the next.
pub(super) fn trouble(shown: &Shown) -> Option<Trouble> {
    let is_saved = |operation: &&u8| in_flight::is_saved(**operation);
    if let Some(operation) = shown.polls.iter().find(|operation| !is_saved(operation)) {
        return Some(Trouble::new(
            format!(
                "a request of the io_uring ring waits for something: {}; requests of this operation are not \
                 supported yet",
                operations::name(*operation)
            ),
            FINISH,
        ));
    }
    shown.has_personalities.then(|| {
        Trouble::new(
            "credentials are registered with the io_uring ring",
            "let the program unregister them before the dump",
        )
    })
}

/// What tells against saving the ring of a task that is stopped: its fdinfo, and the number of requests in flight
/// that don't just wait, where that can be seen.
fn unfinished(shown: &Shown, at_work: Option<u32>) -> Option<Trouble> {
    let is_seen = at_work.is_some();
    let in_flight = at_work.unwrap_or(shown.taken.wrapping_sub(shown.completed));
    let (reason, hint) = if shown.nr_overflown > 0 {
        (
            "the io_uring ring has more completions than it has room for",
            "let the program take them before the dump",
        )
    } else if !is_seen && !shown.polls.is_empty() {
        (
            "requests of the io_uring ring wait for something (a poll, a read, an accept), and the kernel's memory, \
             where it stands for what, can't be read",
            FINISH_OR_ROOT,
        )
    } else if in_flight == 0 {
        return trouble(shown);
    } else if is_seen {
        (
            "requests of the io_uring ring are in flight that the kernel works on, or holds back",
            FINISH,
        )
    } else if in_flight < u32::MAX / 2 {
        (
            "requests of the io_uring ring are in flight, and the kernel's memory, where it stands what they are, \
             can't be read",
            FINISH_OR_ROOT,
        )
    } else {
        (
            "requests of the io_uring ring have completed several times each, so nothing tells whether \
             others are in flight",
            FINISH,
        )
    };
    Some(Trouble::new(reason, hint))
}

/// Waits for requests that end by themselves, such as those that workers of the kernel have begun; says what stays
/// in the way.
fn await_end(file: &OpenFile, inner: Option<Inner<'_>>) -> Result<Option<Trouble>, Errno> {
    let begun = Instant::now();
    loop {
        let at_work = inner.and_then(|inner| inner.at_work());
        let shown = look(file)?;
        let found = unfinished(&shown, at_work);
        if found.is_none() && !may_take(&shown) || begun.elapsed() > PATIENCE {
            return Ok(found);
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

/// Whether a thread that submits may take more: it takes what is there, unless it sleeps.
fn may_take(shown: &Shown) -> bool {
    shown.sq_thread.is_some() && shown.sq_tail != shown.taken
}

/// Waits for the requests of a ring of a stopped process, for as long as for those that end by themselves.
pub(super) fn settle(kernel: Option<&Kernel>, pid: Pid, fd: i32) -> Result<(), Errno> {
    let ring = pidfd::open(pid).and_then(|process| pidfd::getfd(process, fd))?;
    let inner = kernel.and_then(|kernel| Inner::of(kernel, ring.as_fd()));
    let begun = Instant::now();
    while begun.elapsed() <= PATIENCE {
        let shown = look_at(pid, fd)?;
        let at_work = inner.and_then(|inner| inner.at_work());
        let at_work = at_work.unwrap_or(shown.taken.wrapping_sub(shown.completed));
        if at_work == 0 && !may_take(&shown) {
            break;
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
    Ok(())
}

impl Special {
    fn trouble(self) -> Trouble {
        let (reason, hint) = match self {
            Special::Disabled => (
                "the io_uring ring has not been enabled yet (IORING_SETUP_R_DISABLED)",
                "dump when the program has enabled it",
            ),
            Special::SingleIssuer => (
                "the io_uring ring belongs to one thread (IORING_SETUP_SINGLE_ISSUER)",
                "let the program close it before the dump, or start it without io_uring",
            ),
            Special::Restricted => (
                "the io_uring ring is restricted to certain operations",
                "let the program close it before the dump",
            ),
            Special::Polled => (
                "completions of the io_uring ring are polled for (IORING_SETUP_IOPOLL)",
                "let the program close it before the dump",
            ),
            Special::Eventfd => (
                "an eventfd is registered with the io_uring ring, and nothing tells which",
                "let the program unregister it before the dump",
            ),
            Special::Groups => (
                "groups of buffers are provided to the io_uring ring",
                "let the program take them back before the dump",
            ),
            Special::Personalities => (
                "credentials are registered with the io_uring ring",
                "let the program unregister them before the dump",
            ),
        };
        Trouble::new(reason, hint)
    }
}

/// Makes the image of a ring whose tasks are all stopped.
pub(super) fn dump(
    dumping: &Dumping<'_>,
    state: &mut DumpState<'_>,
) -> Result<FileEntry, FileDumpError> {
    let file = dumping.file;
    let fd = dumping.duplicate.ok_or_else(|| file.unexpected("SqHead"))?;
    let inside: Vec<Pid> = state.collected.inside.iter().copied().collect();
    let in_the_way = |trouble| FileDumpError::Obstacles(vec![file.obstacle(trouble)]);
    if let Some(trouble) = state.collected.rings.held_outside(file, &inside) {
        return Err(in_the_way(trouble));
    }
    let kernel = state.collected.rings.kernel.clone();
    let kernel = kernel.get();
    let states = state.collected.rings.states.clone();
    let known = kernel.map(|kernel| Known {
        kernel,
        states: &states,
    });
    let inner = kernel.and_then(|kernel| Inner::of(kernel, fd));
    let special = match inner.and_then(|inner| inner.special()) {
        Some(special) => special,
        None => probe::special(fd),
    };
    if let Some(special) = special {
        return Err(in_the_way(special.trouble()));
    }
    let failed = |source| query(file, "the memory of the io_uring ring", source);
    if let Some(trouble) = await_end(file, inner).map_err(failed)? {
        let seen = known.zip(inner);
        let named = seen.and_then(|(known, inner)| in_flight::refused(known, inner));
        return Err(in_the_way(named.unwrap_or(trouble)));
    }
    let Ok(head) = probe::head(fd) else {
        return Err(in_the_way(Trouble::new(
            "the io_uring ring lies in memory of the program (IORING_SETUP_NO_MMAP)",
            "let the program close it before the dump",
        )));
    };
    let flags = match inner {
        Some(inner) => inner.flags & !ONLY_AT_SETUP,
        None => probe::shape(&head, || look(file)).map_err(failed)?,
    };
    if flags & !KNOWN != 0 {
        return Err(in_the_way(Trouble::new(
            format!(
                "the io_uring ring has parameters that are not known (IORING_SETUP bits {:#x})",
                flags & !KNOWN
            ),
            "let the program close it before the dump",
        )));
    }
    let word = |at: usize| head.word(at).load(Ordering::Acquire);
    let (sq_entries, cq_entries) = (word(layout::SQ_ENTRIES), word(layout::CQ_ENTRIES));
    let layout = Layout::new(sq_entries, cq_entries, flags);
    let layout = layout.ok_or_else(|| failed(Errno::EINVAL))?;
    // Another ring of the same shape tells whether everything is where it is looked for.
    let twin = io_uring::create(restore::params(layout)).map_err(failed)?;
    if !layout.fits(&twin) {
        return Err(failed(Errno::EINVAL));
    }
    if inner.is_none() && hides_wide_entries(fd, layout, flags).map_err(failed)? {
        return Err(in_the_way(Trouble::new(
            "the io_uring ring has submission entries of 128 bytes and no array of indices",
            "let the program close it before the dump",
        )));
    }
    let mut ring = Memory::map(fd, layout).map_err(failed)?.read(flags);
    let shown = look(file).map_err(failed)?;
    let added = belongings::add(file, &shown, kernel.zip(inner), &mut ring);
    let said = added.map_err(in_the_way)?;
    let settings = settings::add(kernel.zip(inner), &mut ring).map_err(in_the_way)?;
    if let Some((known, inner)) = known.zip(inner) {
        in_flight::add(known, inner, &mut ring).map_err(in_the_way)?;
        if let Some(before) = Progress::of(&inner).filter(|_| !ring.requests.is_empty()) {
            state.collected.rings.note_busy(Busy {
                address: inner.address(),
                before,
                gone_on: file.obstacle(Trouble::new(
                    "a request of the io_uring ring has ended while it was read",
                    "dump again",
                )),
            });
        }
    }
    let total = Turns::of(&ring).total();
    if turns::is_too_many(total) {
        return Err(in_the_way(Trouble::new(
            format!(
                "the io_uring ring has taken {} requests, and a restore has to repeat their number",
                total
            ),
            "let the program make its ring anew before the dump",
        )));
    }
    if let Some(address) = inner.map(|inner| inner.address()) {
        state.collected.rings.note(dumping.id, address);
    }
    let said = turns::warning(total)
        .into_iter()
        .chain(said)
        .chain(settings);
    let said = said.map(|text| format!("{} of task {}: {text}", file.place, file.pid));
    state.collected.warnings.extend(said);
    Ok(FileEntry {
        r#type: FdTypes::FirnUring.into(),
        id: dumping.id,
        firn_uring: Some(Box::new(FirnUringEntry {
            id: dumping.id,
            flags: file.image_flags(),
            fown: dumping.fown,
            ..ring
        })),
        ..FileEntry::default()
    })
}

/// Reads fdinfo again. While the kernel works on the ring it shows nothing.
fn look(file: &OpenFile) -> Result<Shown, Errno> {
    let fd = crate::files::dump::fd_of(file).ok_or(Errno::EBADF)?;
    look_at(file.pid, fd)
}

fn look_at(pid: Pid, fd: i32) -> Result<Shown, Errno> {
    let begun = Instant::now();
    loop {
        let text = firn_sys::procfs::read(format!("/proc/{pid}/fdinfo/{fd}"))?;
        let info = FdInfo::parse(&text).map_err(|_| Errno::EINVAL)?;
        if let Some(shown) = Shown::parse(&info.lines) {
            return Ok(shown);
        }
        if begun.elapsed() > PATIENCE {
            return Err(Errno::EBUSY);
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

/// Where fdinfo prints no entries, as without an array of indices, it does not show how long they are. The size of
/// the ring's file does, beyond a page, and before it what stands in the second half.
fn hides_wide_entries(fd: BorrowedFd<'_>, layout: Layout, flags: u32) -> Result<bool, Errno> {
    if flags & setup::NO_SQARRAY == 0 {
        return Ok(false);
    }
    let narrow = layout.entries_len();
    let map = |len| io_uring::map(fd, io_uring::OFFSET_ENTRIES, len);
    if narrow < PAGE {
        let entries = map(PAGE)?;
        let beyond = entries.read(narrow, narrow.min(PAGE - narrow));
        return Ok(beyond.iter().any(|byte| *byte != 0));
    }
    let Ok(wide) = map(2 * narrow) else {
        return Ok(false);
    };
    let mut bits = [0u64];
    let offset = u64::try_from(narrow).expect("lengths fit 64 bits");
    Pagemap::open(Pid::this())?.entries(wide.address() + offset, &mut bits)?;
    Ok(bits[0] & page::PRESENT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_idle_when_as_much_has_come_as_has_gone() {
        let idle = Shown {
            taken: 7,
            completed: 7,
            sq_tail: 9,
            ..Shown::default()
        };
        assert!(unfinished(&idle, None).is_none());
        let reason = |shown: Shown| unfinished(&shown, None).expect("in the way").reason;
        let busy = Shown {
            taken: 2,
            completed: u32::MAX,
            ..idle.clone()
        };
        assert!(
            trouble(&busy).is_none(),
            "it may have ended by the next look"
        );
        assert!(reason(busy).contains("in flight"));
        let many = Shown {
            completed: 8,
            ..idle.clone()
        };
        assert!(reason(many.clone()).contains("several times"));
        assert!(unfinished(&many, Some(0)).is_none());
        assert!(unfinished(&idle, Some(1)).is_some());
        let polling = |operation| Shown {
            polls: vec![operation],
            ..idle.clone()
        };
        assert!(reason(polling(6)).contains("wait for something"));
        assert!(trouble(&polling(6)).is_none() && unfinished(&polling(6), Some(0)).is_none());
        let connecting = trouble(&polling(16)).expect("in the way").reason;
        assert!(connecting.contains("IORING_OP_CONNECT"), "{connecting}");
    }
}
