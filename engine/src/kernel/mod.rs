//! What no interface of the kernel shows: its own structures, read with the types that it publishes.
//!
//! A root that may load BPF programs reads the kernel's memory a word at a time
//! (`firn_sys::kernel_memory`), and /sys/kernel/btf/vmlinux tells where the members of structures are. Nothing
//! is written, and nothing can be. Members are found by name; where a kernel has no such member, or this is
//! forbidden, the answer is that nothing is known, and the caller asks in another way or refuses.
//!
//! **Preconditions** for answers that last: the tasks that use an object are stopped, and a descriptor of
//! this process keeps it alive.

mod types;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use firn_sys::kernel_memory::KernelMemory;
use firn_sys::{Pid, pidfd};
use types::{Member, TypeId, Types};

const TYPES: &str = "/sys/kernel/btf/vmlinux";
/// Flag of pidfd_open: any thread, and not only a leader.
const PIDFD_THREAD: u32 = 0o200;
/// Structures that are asked for.
const NAMES: &[&str] = &[
    "task_struct",
    "mm_struct",
    "pid",
    "io_ring_ctx",
    "io_kiocb",
    "io_poll",
    "io_rw",
    "io_sr_msg",
    "io_accept",
    "io_timeout",
    "io_async_rw",
    "iov_iter",
    "io_async_msghdr",
    "io_timeout_data",
    "io_tctx_node",
    "socket",
    "packet_sock",
    "sem_undo",
];

/// The kernel's structures.
#[derive(Debug)]
pub(crate) struct Kernel {
    memory: KernelMemory,
    types: Types,
}

/// The kernel's structures, opened when they are first asked for, and once for all clones. That takes some 7 ms,
/// so who knows that they will be needed by a stopped tree asks before it stops.
#[derive(Debug, Default, Clone)]
pub(crate) struct LazyKernel(Arc<OnceLock<Option<Kernel>>>);

impl LazyKernel {
    /// None where this kernel or these rights don't allow it.
    pub(crate) fn get(&self) -> Option<&Kernel> {
        self.0.get_or_init(Kernel::open).as_ref()
    }
}

/// A structure somewhere in the kernel's memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Object<'a> {
    kernel: &'a Kernel,
    address: u64,
    of: TypeId,
}

impl Kernel {
    /// None where this kernel or these rights don't allow it.
    pub(crate) fn open() -> Option<Kernel> {
        let memory = KernelMemory::open()
            .inspect_err(|error| tracing::debug!("the kernel's memory can't be read: {error}"))
            .ok()?;
        let types = std::fs::read(TYPES).ok()?;
        let types = Types::parse(types, NAMES)?;
        Some(Kernel { memory, types })
    }

    /// The `struct file` behind a descriptor of this process.
    pub(crate) fn file(&self, fd: BorrowedFd<'_>) -> Option<Object<'_>> {
        let task = self.object("task_struct", self.memory.current_task().ok()?)?;
        let table = task.follow("files")?.follow("fdt")?;
        let place = table.number("fd")? + 8 * u64::try_from(fd.as_raw_fd()).ok()?;
        let of = table.kernel.types.member(table.of, "fd")?.of;
        let of = self.types.target(self.types.target(of)?)?;
        self.pointer(place, of)
    }

    /// The `struct task_struct` of a thread.
    pub(crate) fn thread(&self, tid: Pid) -> Option<Object<'_>> {
        let pidfd = pidfd::open_with(tid, PIDFD_THREAD).ok()?;
        let file = self.file(pidfd.as_fd())?;
        // Where pidfds have a file system of their own (Linux 6.9) it is there.
        let of_inode = || file.follow("f_inode")?.follow_as("i_private", "pid");
        let pid = file.follow_as("private_data", "pid").or_else(of_inode)?;
        let link = pid.number("tasks.first")?;
        let task = self.around("task_struct", "pid_links", link)?;
        (task.number("thread_pid")? == pid.address).then_some(task)
    }

    /// The number that a thread has for this process: each pid namespace has its own. None where it has none.
    pub(crate) fn number_of(&self, thread: Object<'_>) -> Option<Pid> {
        let own = self.object("task_struct", self.memory.current_task().ok()?)?;
        let level = own.follow("thread_pid")?.word("level")?;
        let pid = thread.follow("thread_pid")?;
        if pid.word("level")? < level {
            return None;
        }
        let seen = pid.item("numbers", level)?;
        let is_ours = seen.number("ns")?
            == own
                .follow("thread_pid")?
                .item("numbers", level)?
                .number("ns")?;
        is_ours.then(|| Some(Pid::from_image(seen.word("nr")?)))?
    }

    /// Values of the kernel's enumerators by name, in that order; None for one that it does not have.
    pub(crate) fn constants(&self, names: &[&str]) -> Vec<Option<u64>> {
        self.types.constants(names)
    }

    /// A structure of one of the names above.
    pub(crate) fn object(&self, name: &str, address: u64) -> Option<Object<'_>> {
        Some(Object {
            kernel: self,
            address,
            of: self.types.structure(name)?,
        })
    }

    /// The structure of that name whose member is at an address.
    fn around(&self, name: &str, member: &str, address: u64) -> Option<Object<'_>> {
        let of = self.types.structure(name)?;
        let at = self.types.member(of, member)?.bit_offset / 8;
        self.object(name, address.checked_sub(at)?)
    }

    /// The structures of that name that are linked by a member, whose addresses go from `next` until `end`.
    fn linked(
        &self,
        name: &str,
        link: &str,
        mut next: u64,
        end: u64,
        most: usize,
    ) -> Option<Vec<Object<'_>>> {
        let mut found = Vec::new();
        while next != end {
            let entry = self.around(name, link, next)?;
            next = entry.number(&format!("{link}.next"))?;
            found.push(entry);
            if found.len() > most {
                return None;
            }
        }
        Some(found)
    }

    /// What the pointer at an address points to; None for a null pointer.
    fn pointer(&self, place: u64, of: TypeId) -> Option<Object<'_>> {
        let address = self.word(place)?;
        (address != 0).then_some(Object {
            kernel: self,
            address,
            of,
        })
    }

    fn word(&self, address: u64) -> Option<u64> {
        self.memory.word(address).ok()
    }
}

impl<'a> Object<'a> {
    /// Its address, which tells whether it is the same one.
    pub(crate) fn address(self) -> u64 {
        self.address
    }

    /// A number, or a pointer as one. Of an array, its first element.
    pub(crate) fn number(self, path: &str) -> Option<u64> {
        let member = self.member(path)?;
        let bits = match member.bits {
            0 => 8 * self.kernel.types.len(member.of)?,
            bits => u64::from(bits),
        };
        let at = self.address + member.bit_offset / 64 * 8;
        let shift = (8 * (self.address % 8) + member.bit_offset) % 64;
        if bits + shift > 64 || !self.address.is_multiple_of(8) {
            return None;
        }
        let word = self.kernel.word(at)? >> shift;
        Some(if bits == 64 {
            word
        } else {
            word & ((1 << bits) - 1)
        })
    }

    /// A number of 32 bits.
    pub(crate) fn word(self, path: &str) -> Option<u32> {
        u32::try_from(self.number(path)?).ok()
    }

    /// What a member that is a pointer points to; None for a null pointer.
    pub(crate) fn follow(self, path: &str) -> Option<Object<'a>> {
        let member = self.member(path)?;
        let of = self.kernel.types.target(member.of)?;
        self.kernel
            .pointer(self.address + member.bit_offset / 8, of)
    }

    /// What a member of no known type points to, which is a structure of that name.
    pub(crate) fn follow_as(self, path: &str, name: &str) -> Option<Object<'a>> {
        let address = self.number(path).filter(|address| *address != 0)?;
        self.kernel.object(name, address)
    }

    /// What element `nth` of an array of pointers points to; None for a null pointer. The member is the array
    /// or points to it.
    pub(crate) fn element(self, path: &str, nth: u32) -> Option<Object<'a>> {
        let (begin, of) = self.array(path)?;
        let of = self.kernel.types.target(of)?;
        self.kernel.pointer(begin + 8 * u64::from(nth), of)
    }

    /// Element `nth` of an array of structures, which the member is or points to.
    pub(crate) fn item(self, path: &str, nth: u32) -> Option<Object<'a>> {
        let (begin, of) = self.array(path)?;
        let len = self.kernel.types.len(of)?;
        Some(Object {
            address: begin + len * u64::from(nth),
            of,
            ..self
        })
    }

    /// The first numbers of an array, which the member is or points to.
    pub(crate) fn numbers(self, path: &str, len: usize) -> Option<Vec<u64>> {
        let (begin, of) = self.array(path)?;
        let size = self.kernel.types.len(of)?;
        if !matches!(size, 1 | 2 | 4 | 8) || !begin.is_multiple_of(size) {
            return None;
        }
        let mut last = None;
        let mut number = |nth: usize| {
            let at = begin + size * u64::try_from(nth).ok()?;
            let word = match last {
                Some((place, word)) if place == at / 8 => word,
                _ => self.kernel.word(at / 8 * 8)?,
            };
            last = Some((at / 8, word));
            let number = word >> (8 * (at % 8));
            Some(number & (u64::MAX >> (64 - 8 * size)))
        };
        (0..len).map(&mut number).collect()
    }

    /// Where an array begins, which the member is or points to, and what it is of.
    fn array(self, path: &str) -> Option<(u64, TypeId)> {
        let (types, member) = (&self.kernel.types, self.member(path)?);
        Some(match types.element(member.of) {
            Some(of) => (self.address + member.bit_offset / 8, of),
            None => (self.number(path)?, types.target(member.of)?),
        })
    }

    /// The structures of that name that a `struct list_head` links by their member `link`; None where there are
    /// more than `most`, or one can't be read.
    pub(crate) fn entries(
        self,
        path: &str,
        name: &str,
        link: &str,
        most: usize,
    ) -> Option<Vec<Object<'a>>> {
        let head = self.address + self.member(path)?.bit_offset / 8;
        let first = self.number(&format!("{path}.next"))?;
        self.kernel.linked(name, link, first, head, most)
    }

    /// The structures of that name that a `struct hlist_head` links by their member `link`; None where there are more
    /// than `most`, or one can't be read.
    pub(crate) fn chain(
        self,
        path: &str,
        name: &str,
        link: &str,
        most: usize,
    ) -> Option<Vec<Object<'a>>> {
        let first = self.number(&format!("{path}.first"))?;
        self.kernel.linked(name, link, first, 0, most)
    }

    /// A member, taken for a structure of that name: that is how the kernel keeps what each operation has of its own.
    pub(crate) fn part_as(self, path: &str, name: &str) -> Option<Object<'a>> {
        let at = self.address + self.member(path)?.bit_offset / 8;
        self.kernel.object(name, at)
    }

    /// The structure of that name whose member `path` begins where this one does.
    pub(crate) fn whole_of(self, name: &str, path: &str) -> Option<Object<'a>> {
        self.kernel.around(name, path, self.address)
    }

    /// Whether a `struct list_head` has no entries.
    pub(crate) fn is_list_empty(self, path: &str) -> Option<bool> {
        let head = self.address + self.member(path)?.bit_offset / 8;
        Some(self.number(&format!("{path}.next"))? == head)
    }

    fn member(self, path: &str) -> Option<Member> {
        self.kernel.types.member(self.of, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_behind_a_descriptor_is_found() {
        let Some(kernel) = Kernel::open() else {
            eprintln!("skipped: this kernel or these rights do not allow it");
            return;
        };
        let null = std::fs::File::open("/dev/null").expect("there");
        let again = null.try_clone().expect("a duplicate");
        let other = std::fs::File::open("/dev/null").expect("there");
        let file = |file: &std::fs::File| kernel.file(file.as_fd()).expect("a file").address();
        assert_eq!(file(&null), file(&again));
        assert_ne!(file(&null), file(&other));
        let inode = kernel.file(null.as_fd()).expect("a file").follow("f_inode");
        let number = inode.expect("an inode").number("i_ino");
        let expected = std::os::unix::fs::MetadataExt::ino(&null.metadata().expect("metadata"));
        assert_eq!(number, Some(expected));
        let me = firn_sys::task::gettid();
        let thread = kernel.thread(me).expect("this thread");
        let task = kernel.memory.current_task().expect("this thread");
        assert_eq!(thread.address(), task);
        assert_eq!(kernel.number_of(thread), Some(me));
    }
}
