//! A ring into an image, or why it can't be.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use firn_proto::{FdTypes, FileEntry, FirnUringEntry};
use firn_sys::io_uring::{self, setup};
use firn_sys::mapping::SharedMapping;
use firn_sys::pagemap::{Pagemap, entry as page};
use firn_sys::{Errno, Pid};

use super::fdinfo::Shown;
use super::layout::{self, Layout};
use super::probe::{self, Special};
use crate::files::dump::{DumpState, query};
use crate::files::error::FileDumpError;
use crate::files::fdinfo::FdInfo;
use crate::files::kind::Dumping;
use crate::files::open_file::{OpenFile, Trouble};
use crate::files::outside;

/// More requests than this take a restore longer than a moment, which is said.
const MANY: u32 = 50_000_000;
const PAGE: usize = 4096;
/// How long requests may take to end, and how often is looked.
const PATIENCE: Duration = Duration::from_millis(100);
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);
const FINISH: &str = "dump when its requests have ended, or let the program cancel them (IORING_OP_ASYNC_CANCEL); \
                      most programs have an option to do without io_uring, such as UV_USE_IO_URING=0 for Node";

/// What fdinfo alone tells against saving a ring, and what lasts: a program that runs has requests in flight at
/// almost any moment, and none at the next.
pub(super) fn trouble(shown: &Shown) -> Option<Trouble> {
    let (reason, hint) = if shown.nr_polls > 0 {
        (
            "requests of the io_uring ring wait for something (a poll, a read, an accept)",
            FINISH,
        )
    } else if shown.sq_thread.is_some() {
        (
            "a thread of the kernel submits for the io_uring ring (IORING_SETUP_SQPOLL)",
            "start the program without that, such as with UV_USE_IO_URING=0 for Node",
        )
    } else if shown.has_personalities {
        (
            "credentials are registered with the io_uring ring",
            "let the program unregister them before the dump",
        )
    } else if shown.nr_files > 0 {
        (
            "files are registered with the io_uring ring, and nothing tells which open files they are",
            "let the program unregister them before the dump",
        )
    } else if !shown.buffers.is_empty() {
        (
            "memory is registered with the io_uring ring",
            "let the program unregister it before the dump",
        )
    } else {
        return None;
    };
    Some(Trouble::new(reason, hint))
}

/// What fdinfo tells against saving the ring of a task that is stopped.
fn unfinished(shown: &Shown) -> Option<Trouble> {
    let in_flight = shown.taken.wrapping_sub(shown.completed);
    let (reason, hint) = if shown.nr_overflown > 0 {
        (
            "the io_uring ring has more completions than it has room for",
            "let the program take them before the dump",
        )
    } else if in_flight == 0 {
        return trouble(shown);
    } else if in_flight < u32::MAX / 2 {
        ("requests of the io_uring ring are in flight", FINISH)
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
fn await_end(file: &OpenFile) -> Result<Option<Trouble>, Errno> {
    let begun = Instant::now();
    loop {
        let found = unfinished(&look(file)?);
        if found.is_none() || begun.elapsed() > PATIENCE {
            return Ok(found);
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
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
            Special::Buffers => (
                "groups of buffers are provided to the io_uring ring",
                "let the program take them back before the dump",
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
    let held = outside::holders_of_inode(file, &inside);
    if !held.is_empty() {
        return Err(FileDumpError::Obstacles(held));
    }
    let in_the_way = |trouble| FileDumpError::Obstacles(vec![file.obstacle(trouble)]);
    if let Some(special) = probe::special(fd) {
        return Err(in_the_way(special.trouble()));
    }
    let failed = |source| query(file, "the memory of the io_uring ring", source);
    if let Some(trouble) = await_end(file).map_err(failed)? {
        return Err(in_the_way(trouble));
    }
    let Ok(head) = probe::head(fd) else {
        return Err(in_the_way(Trouble::new(
            "the io_uring ring lies in memory of the program (IORING_SETUP_NO_MMAP)",
            "let the program close it before the dump",
        )));
    };
    let flags = probe::shape(&head, || look(file)).map_err(failed)?;
    let word = |at: usize| head.word(at).load(Ordering::Acquire);
    let (sq_entries, cq_entries) = (word(layout::SQ_ENTRIES), word(layout::CQ_ENTRIES));
    let layout = Layout::new(sq_entries, cq_entries, flags);
    let layout = layout.ok_or_else(|| failed(Errno::EINVAL))?;
    // Another ring of the same shape tells whether everything is where it is looked for.
    let twin = io_uring::create(layout.params()).map_err(failed)?;
    if !layout.fits(&twin) {
        return Err(failed(Errno::EINVAL));
    }
    if hides_wide_entries(fd, layout, flags).map_err(failed)? {
        return Err(in_the_way(Trouble::new(
            "the io_uring ring has submission entries of 128 bytes and no array of indices",
            "let the program close it before the dump",
        )));
    }
    let ring = read(fd, layout, flags).map_err(failed)?;
    if ring.cq_tail > MANY {
        state.collected.warnings.push(format!(
            "{} of task {}: to restore an io_uring ring after {} requests takes about {} seconds",
            file.place,
            file.pid,
            ring.cq_tail,
            ring.cq_tail / 5_000_000
        ));
    }
    Ok(FileEntry {
        r#type: FdTypes::FirnUring.into(),
        id: dumping.id,
        firn_uring: Some(FirnUringEntry {
            id: dumping.id,
            flags: file.image_flags(),
            fown: dumping.fown,
            ..ring
        }),
        ..FileEntry::default()
    })
}

/// Reads fdinfo again.
fn look(file: &OpenFile) -> Result<Shown, Errno> {
    let fd = crate::files::dump::fd_of(file).ok_or(Errno::EBADF)?;
    let text = firn_sys::procfs::read(format!("/proc/{}/fdinfo/{fd}", file.pid))?;
    let info = FdInfo::parse(&text).map_err(|_| Errno::EINVAL)?;
    Shown::parse(&info.lines).ok_or(Errno::EINVAL)
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

fn read(fd: BorrowedFd<'_>, layout: Layout, flags: u32) -> Result<FirnUringEntry, Errno> {
    let map = |offset, len: usize| -> Result<SharedMapping, Errno> {
        io_uring::map(fd, offset, len.next_multiple_of(PAGE))
    };
    let rings = map(io_uring::OFFSET_RINGS, layout.rings_len())?;
    let entries = map(io_uring::OFFSET_ENTRIES, layout.entries_len())?;
    let word = |at: usize| rings.word(at).load(Ordering::Acquire);
    let has_array = flags & setup::NO_SQARRAY == 0;
    Ok(FirnUringEntry {
        setup_flags: flags,
        sq_entries: layout.sq_entries,
        cq_entries: layout.cq_entries,
        sq_head: word(layout::SQ_HEAD),
        sq_tail: word(layout::SQ_TAIL),
        cq_head: word(layout::CQ_HEAD),
        cq_tail: word(layout::CQ_TAIL),
        sq_dropped: Some(word(layout::SQ_DROPPED)).filter(|nr| *nr != 0),
        cq_overflow: Some(word(layout::CQ_OVERFLOW)).filter(|nr| *nr != 0),
        cq_flags: Some(word(layout::CQ_FLAGS)).filter(|flags| *flags != 0),
        sqes: entries.read(0, layout.entries_len()),
        cqes: rings.read(layout::COMPLETIONS, layout.completions_len()),
        sq_array: has_array.then(|| rings.read(layout.array(), layout.array_len())),
        ..FirnUringEntry::default()
    })
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
        assert!(unfinished(&idle).is_none());
        let reason = |shown: Shown| unfinished(&shown).expect("in the way").reason;
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
        assert!(reason(many).contains("several times"));
        let polling = Shown {
            nr_polls: 1,
            ..idle.clone()
        };
        assert!(reason(polling).contains("wait for something"));
        let with_files = Shown {
            nr_files: 1,
            ..idle
        };
        assert!(reason(with_files).contains("files are registered"));
    }
}
