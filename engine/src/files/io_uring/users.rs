//! Threads of programs that have used io_uring: each has threads of the kernel that work for it, with limits and
//! processors of their own. It gets the limits of the ring that it uses first, and others with those that are set by a
//! ring that it uses; processors only it can choose, once it has used one. In a restore it first uses one with the
//! limits that it had, by registering it with itself for a moment.
//!
//! Source: linux io_uring/register.c, io_register_iowq_aff, io_register_iowq_max_workers; io_uring/io-wq.c.

use firn_proto::{FdTypes, FirnUringEntry, FirnUringUser};
use firn_sys::io_uring::{register, setup};
use firn_sys::{Pid, nr, procfs, task};

use super::{inner, settings};
use crate::files::dump::FileTable;
use crate::files::store::FileStore;
use crate::kernel::{Kernel, Object};
use crate::program::{Arg, Program, Rule};
use crate::tree::Task;

/// The last of the places that a thread has for rings; those of the image come later.
const PLACE: u32 = 15;
const EINVAL: i32 = 22;
const WORD_BITS: usize = 64;
/// More processors than any machine has.
const MAX_PROCESSORS: usize = 8192;

/// Words that hold all processors that this kernel may ever have.
fn nr_words() -> usize {
    let possible = procfs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let last = possible.trim().rsplit(['-', ',']).next();
    let last = last.and_then(|last| last.parse().ok()).unwrap_or(0);
    MAX_PROCESSORS.min(last) / WORD_BITS + 1
}

/// The processors that work for a thread, where they are not those of this thread, which has chosen none. Empty for
/// a thread that has not used io_uring.
///
/// **Preconditions**: the calling thread has made a ring.
pub(super) fn chosen_processors(kernel: &Kernel, thread: Object<'_>) -> Vec<u64> {
    let nr_words = nr_words();
    let own = kernel.thread(task::gettid());
    let own = own.and_then(|own| inner::processors(own, nr_words));
    let chosen = inner::processors(thread, nr_words);
    chosen
        .filter(|chosen| own.as_ref() != Some(chosen))
        .unwrap_or_default()
}

/// A set of processors as the kernel takes it.
pub(super) fn mask(processors: &[u64]) -> Vec<u8> {
    processors
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// Rings whose requests are taken by the thread that asks for it.
fn is_plain(ring: &FirnUringEntry) -> bool {
    ring.setup_flags & setup::SQPOLL == 0
}

impl FileTable {
    /// Notes the threads of a process that have used io_uring, where new ones would be served in another way.
    pub(super) fn note_users(&mut self, task: &Task, rings: &[u32]) {
        let kernel = self.collected.rings.kernel.clone();
        let Some(kernel) = kernel.get() else { return };
        let entries = self.collected.entries.iter_mut();
        let entries = entries.filter_map(|entry| entry.firn_uring.as_deref_mut());
        let is_own = |ring: &&mut FirnUringEntry| rings.contains(&ring.id) && is_plain(ring);
        let mut own: Vec<_> = entries.filter(is_own).collect();
        let is_limited = own.iter().any(|ring| !ring.worker_limits.is_empty());
        for tid in &task.threads {
            let Some(thread) = kernel.thread(*tid) else {
                continue;
            };
            let processors = chosen_processors(kernel, thread);
            let limits = inner::limits(thread).filter(|_| is_limited);
            // One without limits leaves them alone, where there is one.
            let fits = |ring: &FirnUringEntry| {
                let is_without = ring.worker_limits.is_empty();
                (is_limit(&ring.worker_limits, limits), is_without)
            };
            if (!processors.is_empty() || limits.is_some())
                && let Some(ring) = own.iter_mut().max_by_key(|ring| fits(ring))
            {
                let tid = tid.to_image();
                ring.users.push(FirnUringUser { tid, processors });
            }
        }
    }
}

/// Whether a thread with these limits has got them from a ring with those, which leave one alone that is 0.
fn is_limit(of_ring: &[u32], of_thread: Option<[u32; 2]>) -> bool {
    let of_thread = of_thread.unwrap_or_default();
    let mut pairs = of_ring.iter().zip(of_thread);
    !of_ring.is_empty() && pairs.all(|(ring, thread)| *ring == 0 || *ring == thread)
}

impl FileStore {
    /// Appends the records by which a thread has itself served as it was. It has its table already, and no ring
    /// registered with itself.
    pub(super) fn plan_workers(&self, pid: Pid, tid: Pid, program: &mut Program) {
        let table = self.table_of(pid).map_or(&[][..], |id| self.table(id));
        let rings = table.iter().filter(|fd| fd.r#type() == FdTypes::FirnUring);
        let mut users = rings.flat_map(|fd| {
            let ring = self.entry(FdTypes::FirnUring, fd.id);
            let ring = ring.and_then(|entry| entry.firn_uring.as_deref());
            let rings = ring.filter(|ring| is_plain(ring)).into_iter();
            rings.flat_map(move |ring| ring.users.iter().map(move |user| (fd.fd, ring, user)))
        });
        let Some((fd, ring, user)) = users.find(|(_, _, user)| user.tid == tid.to_image()) else {
            return;
        };
        let mut call = |operation: u32, argument: &[u8], nr: u32, rule, why: &'static str| {
            let argument = program.data(argument);
            let args: [Arg; 4] = [fd.into(), operation.into(), argument.into(), nr.into()];
            program.call(nr::IO_URING_REGISTER, &args, rule, why);
        };
        // struct io_uring_rsrc_update: place, reserved, descriptor.
        let place =
            |fd: u32| [u64::from(PLACE).to_le_bytes(), u64::from(fd).to_le_bytes()].concat();
        let why = "using io_uring for the first time";
        call(register::RING_FDS, &place(fd), 1, Rule::Exact(1), why);
        if let Some(limits) = settings::limits_argument(ring) {
            let why = "limiting those that work for it";
            call(register::WORKER_LIMITS, &limits, 2, Rule::Exact(0), why);
        }
        if !user.processors.is_empty() {
            let mask = mask(&user.processors);
            let len = u32::try_from(mask.len()).expect("bounded by what an image holds");
            // Not among those that the tree may use here.
            let rule = Rule::OkOr(EINVAL);
            let why = "choosing the processors of those that work for it";
            call(register::WORKER_PROCESSORS, &mask, len, rule, why);
        }
        let why = "taking the ring's number back";
        call(
            register::UNREGISTER_RING_FDS,
            &place(0),
            1,
            Rule::Exact(1),
            why,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_has_the_low_processors_first() {
        assert_eq!(mask(&[1, 2])[..9], [1, 0, 0, 0, 0, 0, 0, 0, 2]);
        assert!(nr_words() >= 1);
    }

    #[test]
    fn a_limit_of_0_leaves_it_as_it_is() {
        assert!(is_limit(&[2, 0], Some([2, 700])));
        assert!(!is_limit(&[2, 3], Some([2, 700])));
        assert!(!is_limit(&[], Some([2, 3])) && !is_limit(&[1, 0], None));
    }
}
