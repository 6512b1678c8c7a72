//! Seccomp: strict mode, and chains of filters.
//!
//! A thread's filters form a chain; threads share chains by inheritance or because one thread gave its
//! own to all (TSYNC). The kernel hands the filters out one by one, the oldest first, but does not tell
//! who shares what. In images `prev` leads from an older filter to the next newer one, and a thread names
//! its oldest. Where all threads of a process have the same chain, only the leader's is written, marked
//! TSYNC, and the other threads have none.
//!
//! On restore the filters that all threads of a process begin with are installed by the leader for all
//! of them, so that they are shared again and a later TSYNC works; each thread adds its own rest. Filters
//! are installed before credentials, which may take the right to do so away, while the coordinator
//! traces all threads of the process and has seccomp suspended, so that no filter sees the restore.
//!
//! A filter that asks a supervisor (user notification) would lose it and is refused.
//!
//! Source: man 2 seccomp; man 2 ptrace, PTRACE_SECCOMP_GET_FILTER, PTRACE_O_SUSPEND_SECCOMP.

use std::collections::HashMap;

use firn_proto::{SeccompEntry, SeccompFilter, SeccompMode, ThreadCoreEntry};
use firn_sys::{Errno, Pid, nr, ptrace};

use super::outside::Outside;
use crate::obstacle::Obstacle;
use crate::program::{Arg, Program, Rule};
use crate::tree::Tree;

const MODE_STRICT: u32 = 1;
const MODE_FILTER: u32 = 2;
const PR_SET_SECCOMP: u32 = 22;
const SECCOMP_SET_MODE_FILTER: u32 = 1;
const FLAG_TSYNC: u32 = 1;
/// Leaves the speculation controls as they are; they are restored by themselves.
const FLAG_SPEC_ALLOW: u32 = 4;
/// struct sock_filter: code, jt, jf, k.
const INSTRUCTION_SIZE: usize = 8;
/// BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;

/// What a task takes over from a restoring process that has seccomp filters.
pub const INHERITED: &str = "comes under the seccomp filters of the process that restores it, which nothing can take off; \
                             restore from where there are none";

/// Failure to read a thread's filters.
#[derive(Debug, thiserror::Error)]
pub enum SeccompDumpError {
    /// The kernel did not hand them out.
    #[error("can't read seccomp filter {nth} of thread {tid}")]
    Filter {
        /// The thread.
        tid: Pid,
        /// Number of the filter, the oldest is 0.
        nth: usize,
        /// Cause.
        source: Errno,
    },
}

/// One filter of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Filter {
    program: Vec<u8>,
    flags: u32,
}

/// The seccomp state of a tree, in its image's form.
#[derive(Debug, Default)]
pub struct SeccompDump {
    entry: SeccompEntry,
    /// Index of the oldest filter of each chain that is in the image.
    starts: HashMap<Vec<Filter>, u32>,
    of_thread: HashMap<Pid, (SeccompMode, Option<u32>)>,
    obstacles: Vec<Obstacle>,
}

impl SeccompDump {
    /// Reads the filters of all threads; `outside` stands in the order of [`Tree::alive`].
    ///
    /// # Errors
    /// See [`SeccompDumpError`].
    ///
    /// # Preconditions
    /// All threads are in ptrace stops of the calling thread, which is not under seccomp itself.
    pub fn collect(tree: &Tree, outside: &[Outside]) -> Result<SeccompDump, SeccompDumpError> {
        let mut dump = SeccompDump::default();
        for (task, outside) in tree.alive().zip(outside) {
            if outside.threads.iter().all(|thread| thread.seccomp == 0) {
                continue;
            }
            let mut threads = Vec::with_capacity(task.threads.len());
            for (tid, status) in task.threads.iter().zip(&outside.threads) {
                let chain = match status.seccomp {
                    MODE_FILTER => read_chain(*tid)?,
                    _ => Vec::new(),
                };
                if chain.iter().any(|filter| asks_supervisor(&filter.program)) {
                    dump.obstacles.push(supervised(task.pid, *tid));
                }
                threads.push((*tid, status.seccomp, chain));
            }
            dump.add_process(threads);
        }
        Ok(dump)
    }

    /// What can't be dumped.
    pub fn take_obstacles(&mut self) -> Vec<Obstacle> {
        std::mem::take(&mut self.obstacles)
    }

    fn add_process(&mut self, mut threads: Vec<(Pid, u32, Vec<Filter>)>) {
        let (_, mode, chain) = &threads[0];
        let shared = threads.len() > 1
            && *mode == MODE_FILTER
            && threads.iter().all(|(_, m, c)| (m, c) == (mode, chain));
        if shared {
            threads.truncate(1);
            for filter in &mut threads[0].2 {
                filter.flags |= FLAG_TSYNC;
            }
        }
        for (tid, mode, chain) in threads {
            let state = match mode {
                MODE_STRICT => (SeccompMode::Strict, None),
                MODE_FILTER => (SeccompMode::Filter, Some(self.add_chain(chain))),
                _ => continue,
            };
            self.of_thread.insert(tid, state);
        }
    }

    fn add_chain(&mut self, chain: Vec<Filter>) -> u32 {
        if let Some(start) = self.starts.get(&chain) {
            return *start;
        }
        // The newest comes first in the image, so that each finds its newer one before it.
        let filters = &mut self.entry.seccomp_filters;
        for (age, filter) in chain.iter().rev().enumerate() {
            let newer = u32::try_from(filters.len())
                .expect("few filters")
                .checked_sub(1);
            filters.push(SeccompFilter {
                filter: filter.program.clone(),
                prev: newer.filter(|_| age > 0),
                flags: Some(filter.flags),
            });
        }
        let start = u32::try_from(filters.len().saturating_sub(1)).expect("few filters");
        self.starts.insert(chain, start);
        start
    }

    /// Enters a thread's mode and filters into its image.
    pub fn describe(&self, tid: Pid, core: &mut ThreadCoreEntry) {
        let state = self.of_thread.get(&tid);
        let (mode, filter) = state.copied().unwrap_or((SeccompMode::Disabled, None));
        core.seccomp_mode = Some(mode.into());
        core.seccomp_filter = filter;
    }

    /// All filters.
    pub fn image(&self) -> &SeccompEntry {
        &self.entry
    }
}

fn read_chain(tid: Pid) -> Result<Vec<Filter>, SeccompDumpError> {
    let mut chain = Vec::new();
    loop {
        let nth = chain.len();
        let failed = |source| SeccompDumpError::Filter { tid, nth, source };
        let program = match ptrace::seccomp_filter(tid, nth) {
            Ok(program) => program,
            Err(Errno::ENOENT) => return Ok(chain),
            Err(source) => return Err(failed(source)),
        };
        let flags = ptrace::seccomp_flags(tid, nth).map_err(failed)?;
        let flags = u32::try_from(flags).unwrap_or(0);
        chain.push(Filter { program, flags });
    }
}

/// True for a filter with a return of `SECCOMP_RET_USER_NOTIF`.
fn asks_supervisor(program: &[u8]) -> bool {
    const RETURN_CONSTANT: u16 = 0x06;
    const USER_NOTIF: u32 = 0x7fc0_0000;
    const ACTION: u32 = 0xffff_0000;
    program.chunks_exact(INSTRUCTION_SIZE).any(|instruction| {
        let code = u16::from_le_bytes([instruction[0], instruction[1]]);
        let k = u32::from_le_bytes(instruction[4..8].try_into().expect("four bytes"));
        code == RETURN_CONSTANT && k & ACTION == USER_NOTIF
    })
}

fn supervised(pid: Pid, tid: Pid) -> Obstacle {
    Obstacle {
        pid,
        object: format!("seccomp filter of thread {tid}"),
        reason: "it asks a supervisor process (user notification), which would be lost".to_owned(),
        hint: Some("run the task without the supervisor's seccomp profile".to_owned()),
    }
}

/// Images whose chains make no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("seccomp filters of thread {tid}: {what}")]
pub struct SeccompImageError {
    /// The thread.
    pub tid: Pid,
    /// What is wrong.
    pub what: &'static str,
}

/// Seccomp of one process, ready to be installed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SeccompPlan {
    /// Filters that the leader installs for all threads, oldest first.
    shared: Vec<Filter>,
    /// What each thread adds, in the order of threads.
    own: Vec<ThreadPlan>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ThreadPlan {
    Filters(Vec<Filter>),
    Strict,
}

impl SeccompPlan {
    /// Understands the images of a process's threads, leader first.
    ///
    /// # Errors
    /// See [`SeccompImageError`].
    pub fn of_process<'a>(
        image: &SeccompEntry,
        threads: impl IntoIterator<Item = (Pid, &'a ThreadCoreEntry)>,
    ) -> Result<SeccompPlan, SeccompImageError> {
        let mut plans = Vec::new();
        for (tid, core) in threads {
            plans.push(of_thread(image, tid, core)?);
        }
        // Threads without filters of their own get what the leader gives to all.
        let given: Vec<Filter> = match plans.first() {
            Some(ThreadPlan::Filters(chain)) => {
                let given = chain
                    .iter()
                    .take_while(|filter| filter.flags & FLAG_TSYNC != 0);
                given.cloned().collect()
            }
            _ => Vec::new(),
        };
        for plan in plans.iter_mut().skip(1) {
            if *plan == ThreadPlan::Filters(Vec::new()) {
                *plan = ThreadPlan::Filters(given.clone());
            }
        }
        Ok(SeccompPlan::of_threads(plans))
    }

    fn of_threads(mut plans: Vec<ThreadPlan>) -> SeccompPlan {
        let mut shared = Vec::new();
        if plans.len() > 1 {
            let same = |nth: usize| {
                let mut filters = plans.iter().map(|plan| match plan {
                    ThreadPlan::Filters(chain) => chain.get(nth).map(bare),
                    ThreadPlan::Strict => None,
                });
                let first = filters.next().flatten();
                first.filter(|first| filters.all(|filter| filter.as_ref() == Some(first)))
            };
            shared = (0..).map_while(same).collect();
        }
        for plan in &mut plans {
            if let ThreadPlan::Filters(chain) = plan {
                chain.drain(..shared.len());
            }
        }
        SeccompPlan { shared, own: plans }
    }

    /// True where there is nothing to install.
    pub fn is_empty(&self) -> bool {
        let nothing = |plan: &ThreadPlan| *plan == ThreadPlan::Filters(Vec::new());
        self.shared.is_empty() && self.own.iter().all(nothing)
    }

    /// Adds the calls by which the leader installs what all threads have.
    pub fn plan_shared(&self, program: &mut Program) {
        for filter in &self.shared {
            install(program, filter, FLAG_TSYNC);
        }
    }

    /// Adds the calls by which a thread installs the rest of its own.
    pub fn plan_own(&self, program: &mut Program, nth: usize) {
        match self.own.get(nth) {
            Some(ThreadPlan::Filters(chain)) => {
                for filter in chain {
                    install(program, filter, 0);
                }
            }
            Some(ThreadPlan::Strict) => {
                let args = [PR_SET_SECCOMP.into(), MODE_STRICT.into()];
                let why = "entering seccomp's strict mode";
                program.call(nr::PRCTL, &args, Rule::Ok, why);
            }
            None => {}
        }
    }
}

/// A filter without the mark of how it is given to all threads.
fn bare(filter: &Filter) -> Filter {
    Filter {
        program: filter.program.clone(),
        flags: filter.flags & !FLAG_TSYNC,
    }
}

fn of_thread(
    image: &SeccompEntry,
    tid: Pid,
    core: &ThreadCoreEntry,
) -> Result<ThreadPlan, SeccompImageError> {
    let corrupt = |what| SeccompImageError { tid, what };
    let mode = core.seccomp_mode.unwrap_or(0);
    if mode == i32::from(SeccompMode::Strict) {
        return Ok(ThreadPlan::Strict);
    }
    if mode != i32::from(SeccompMode::Filter) {
        return Ok(ThreadPlan::Filters(Vec::new()));
    }
    let mut next = Some(core.seccomp_filter.ok_or(corrupt("there is no filter"))?);
    let mut chain = Vec::new();
    while let Some(index) = next {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let filters = &image.seccomp_filters;
        let filter = filters.get(index).ok_or(corrupt("a filter is missing"))?;
        let len = filter.filter.len();
        if len == 0
            || !len.is_multiple_of(INSTRUCTION_SIZE)
            || len > MAX_INSTRUCTIONS * INSTRUCTION_SIZE
        {
            return Err(corrupt("a filter has an impossible length"));
        }
        if chain.len() > filters.len() {
            return Err(corrupt("the chain runs in a circle"));
        }
        chain.push(Filter {
            program: filter.filter.clone(),
            flags: filter.flags.unwrap_or(0),
        });
        next = filter.prev;
    }
    Ok(ThreadPlan::Filters(chain))
}

fn install(program: &mut Program, filter: &Filter, more: u32) {
    let code = program.data(&filter.program);
    let nr_instructions = filter.program.len() / INSTRUCTION_SIZE;
    let len = u64::try_from(nr_instructions).expect("a short program");
    // struct sock_fprog: length, padding, address.
    let description = program.table(&[len.into(), Arg::Data(code)]);
    let flags = filter.flags & !FLAG_TSYNC | FLAG_SPEC_ALLOW | more;
    let args = [
        SECCOMP_SET_MODE_FILTER.into(),
        flags.into(),
        description.into(),
    ];
    // With TSYNC a positive result is the thread that could not follow.
    let why = "installing a seccomp filter";
    program.call(nr::SECCOMP, &args, Rule::Exact(0), why);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(k: u8) -> Filter {
        Filter {
            program: vec![6, 0, 0, 0, k, 0, 0, 0],
            flags: 0,
        }
    }

    fn thread(dump: &SeccompDump, tid: i32) -> ThreadCoreEntry {
        let mut core = ThreadCoreEntry::default();
        dump.describe(Pid::from_raw(tid), &mut core);
        core
    }

    fn plan(dump: &SeccompDump, tids: &[i32]) -> SeccompPlan {
        let cores: Vec<_> = tids
            .iter()
            .map(|tid| (Pid::from_raw(*tid), thread(dump, *tid)))
            .collect();
        let threads = cores.iter().map(|(tid, core)| (*tid, core));
        SeccompPlan::of_process(dump.image(), threads).unwrap()
    }

    #[test]
    fn chains_go_from_old_to_new() {
        let mut dump = SeccompDump::default();
        dump.add_process(vec![(
            Pid::from_raw(5),
            MODE_FILTER,
            vec![filter(1), filter(2)],
        )]);
        let filters = &dump.image().seccomp_filters;
        assert_eq!(thread(&dump, 5).seccomp_filter, Some(1));
        assert_eq!((filters[1].filter[4], filters[1].prev), (1, Some(0)));
        assert_eq!((filters[0].filter[4], filters[0].prev), (2, None));
        let plan = plan(&dump, &[5]);
        assert_eq!(plan.own, [ThreadPlan::Filters(vec![filter(1), filter(2)])]);
    }

    #[test]
    fn what_all_threads_have_is_shared_again() {
        let mut dump = SeccompDump::default();
        let chain = vec![filter(1), filter(2)];
        dump.add_process(
            (5..8)
                .map(|tid| (Pid::from_raw(tid), MODE_FILTER, chain.clone()))
                .collect(),
        );
        assert_eq!(dump.image().seccomp_filters[0].flags, Some(FLAG_TSYNC));
        assert_eq!(thread(&dump, 6).seccomp_mode, Some(0));
        let plan = plan(&dump, &[5, 6, 7]);
        assert_eq!(plan.shared, chain);
        assert!(
            plan.own
                .iter()
                .all(|own| *own == ThreadPlan::Filters(Vec::new()))
        );
    }

    #[test]
    fn threads_add_what_differs() {
        let mut dump = SeccompDump::default();
        dump.add_process(vec![
            (Pid::from_raw(5), MODE_FILTER, vec![filter(1)]),
            (Pid::from_raw(6), MODE_FILTER, vec![filter(1), filter(2)]),
        ]);
        let plan = plan(&dump, &[5, 6]);
        assert_eq!(plan.shared, [filter(1)]);
        assert_eq!(plan.own[1], ThreadPlan::Filters(vec![filter(2)]));
        let mut program = Program::new("test");
        plan.plan_shared(&mut program);
        assert!(
            program.describe(0).starts_with("seccomp(0x1, 0x5, ")
                || program.describe(0).starts_with("seccomp(1, 5, ")
        );
    }

    #[test]
    fn nonsense_is_refused() {
        let mut image = SeccompEntry::default();
        let mut core = ThreadCoreEntry {
            seccomp_mode: Some(2),
            seccomp_filter: Some(0),
            ..ThreadCoreEntry::default()
        };
        let tid = Pid::from_raw(5);
        let understand = |image: &SeccompEntry, core: &ThreadCoreEntry| {
            SeccompPlan::of_process(image, [(tid, core)]).map_err(|error| error.what)
        };
        assert_eq!(understand(&image, &core), Err("a filter is missing"));
        image.seccomp_filters.push(SeccompFilter {
            filter: filter(1).program,
            prev: Some(0),
            flags: None,
        });
        assert_eq!(understand(&image, &core), Err("the chain runs in a circle"));
        image.seccomp_filters[0].filter.pop();
        assert_eq!(
            understand(&image, &core),
            Err("a filter has an impossible length")
        );
        core.seccomp_filter = None;
        assert_eq!(understand(&image, &core), Err("there is no filter"));
    }

    #[test]
    fn a_supervised_filter_is_recognized() {
        let mut notify = filter(0).program;
        notify[4..8].copy_from_slice(&0x7fc0_0000u32.to_le_bytes());
        assert!(asks_supervisor(&notify));
        assert!(!asks_supervisor(&filter(9).program));
    }
}
