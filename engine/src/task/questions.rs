//! Everything that only the tasks themselves can answer, asked of all of them in one go.

use std::collections::HashMap;
use std::iter;

use firn_proto::TaskTimersEntry;
use firn_sys::Pid;
use firn_sys::ptrace::GeneralRegs;

use super::attributes::{self, ProcessAnswers, ProcessQuestions, ThreadAnswers, ThreadQuestions};
use super::child_events::{self, ChildEvent, EventQuestions};
use super::ia32::{self, LocalTableQuestion};
use super::mempolicy::{self, Nodes, Policy, PolicyQuestion};
use super::posix_timers::{self, TimerQuestions};
use super::status::StatusError;
use super::{itimers, signals};
use crate::arch::Abi;
use crate::files::{self, FlagQuestions, Told};
use crate::inject::{self, Found, InjectError, Job, ThreadStop};
use crate::memory::AddressSpace;
use crate::memory::policies::{self, Governed, PolicyQuestions};
use crate::obstacle::Obstacle;
use crate::program::{Data, Program, ProgramId, ProgramSet};
use crate::tree::{Task, Tree};

/// What one process answered.
#[derive(Debug, Clone)]
pub struct TaskAnswers {
    /// About the process.
    pub process: ProcessAnswers,
    /// Its signal actions, as the kernel stores them.
    pub actions: Vec<u8>,
    /// Its interval timers.
    pub timers: TaskTimersEntry,
    /// What the process itself says that can't be dumped.
    pub obstacle: Option<Obstacle>,
    /// About each thread, in the order of the task's threads.
    pub threads: Vec<ThreadAnswers>,
    /// How they were found, in the same order.
    pub stops: Vec<ThreadStop>,
    /// NUMA policies of the threads, in the same order.
    pub mempolicies: Vec<Policy>,
    /// Those of its memory.
    pub policies: Vec<Governed>,
    /// Which of the descriptors that the survey has seen are closed by execve; None if not all are open any more.
    pub close_on_exec: Option<Vec<bool>>,
    /// A limit of it was raised while it was asked, and is back.
    pub limit_was_raised: bool,
    /// What its parent has yet to be told, by the answers of that.
    pub event: Option<ChildEvent>,
}

struct Questions {
    leader: ProgramId,
    process: ProcessQuestions,
    actions: Data,
    timers: Data,
    posix_timers: TimerQuestions,
    children: EventQuestions,
    local_table: LocalTableQuestion,
    policies: PolicyQuestions,
    flags: FlagQuestions,
    threads: Vec<(ProgramId, ThreadQuestions, PolicyQuestion)>,
}

/// Failure to ask.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The programs could not be run.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// What must be known before could not be read.
    #[error(transparent)]
    Status(#[from] StatusError),
}

/// Learns what the questions have to know of this machine, so that a stopped tree need not wait for it.
pub fn know_host() {
    Nodes::nr_words();
}

/// How the threads of a task were found, and what all but the first one will be asked.
#[derive(Debug)]
pub struct Looked {
    stops: Vec<ThreadStop>,
    others: Vec<ThreadProgram>,
}

/// What one thread is asked.
#[derive(Debug)]
struct ThreadProgram {
    program: Program,
    thread: ThreadQuestions,
    policy: PolicyQuestion,
}

impl ThreadProgram {
    /// Adds to a program what every thread is asked.
    fn new(mut program: Program, abi: Abi) -> ThreadProgram {
        let thread = attributes::ask_thread(&mut program, abi);
        let policy = mempolicy::ask(&mut program, Nodes::nr_words(), None);
        program.park();
        ThreadProgram {
            program,
            thread,
            policy,
        }
    }
}

/// Looks at the threads of all living tasks, in the order of [`Tree::alive`], and touches none: what can be done before
/// the address spaces are known. Registers that were read since they stopped are not read again.
///
/// # Errors
/// A task died.
///
/// # Preconditions
/// As of [`ask`].
pub fn look(tree: &Tree, regs: &HashMap<Pid, GeneralRegs>) -> Result<Vec<Looked>, InjectError> {
    let of_thread = |tid: &Pid| match regs.get(tid) {
        Some(regs) => ThreadStop::with_regs(*tid, *regs),
        None => ThreadStop::read(*tid),
    };
    let of_task = |task: &Task| {
        let stops = task.threads.iter().map(of_thread);
        let program = |tid: &Pid| Program::new(format!("thread {tid}"));
        let others = task.threads.iter().skip(1);
        Ok(Looked {
            stops: stops.collect::<Result<_, _>>()?,
            others: others
                .map(|tid| ThreadProgram::new(program(tid), task.abi))
                .collect(),
        })
    };
    tree.alive().map(of_task).collect()
}

/// Asks all living tasks of a frozen tree, which have been `looked` at and have these address spaces, also for the
/// descriptors that they had told of; everything stands in the order of [`Tree::alive`].
///
/// # Errors
/// A task died, or a call that never fails did.
///
/// # Preconditions
/// All threads are in ptrace stops of the calling thread.
pub fn ask(
    tree: &Tree,
    looked: Vec<Looked>,
    spaces: &[AddressSpace],
    told: &Told,
) -> Result<Vec<TaskAnswers>, AskError> {
    let mut found = Vec::with_capacity(looked.len());
    let mut others = Vec::with_capacity(looked.len());
    for (looked, space) in looked.into_iter().zip(spaces) {
        found.push(Found {
            code: space.code_at(looked.stops[0].regs.rip),
            stops: looked.stops,
        });
        others.push(looked.others);
    }
    let (jobs, questions): (Vec<Job>, Vec<Questions>) = prepare_all(tree, others, spaces, told)?;
    let told = inject::run_and_tell(&jobs, found, tree.journal.as_ref())?;
    let answered = || (questions.iter()).zip(told.iter().map(|task| &task.arena));
    let events = answered().flat_map(|(asked, arena)| asked.children.answers(arena, asked.leader));
    let events: HashMap<Pid, ChildEvent> = events.collect();
    let stops = told.iter().map(|task| task.stops.clone());
    let answers = tree.alive().zip(answered()).zip(stops);
    let answers = answers.map(|((task, (asked, arena)), stops)| TaskAnswers {
        stops,
        process: asked.process.answers(arena, asked.leader),
        actions: arena.read(asked.leader, asked.actions),
        timers: TaskTimersEntry {
            posix: asked.posix_timers.answers(arena, asked.leader),
            ..itimers::to_image(&arena.read(asked.leader, asked.timers))
        },
        obstacle: asked.local_table.obstacle(arena, asked.leader, task.pid),
        threads: asked
            .threads
            .iter()
            .map(|(id, thread, _)| thread.answers(arena, *id))
            .collect(),
        mempolicies: asked
            .threads
            .iter()
            .map(|(id, _, policy)| policy.answer(arena, *id))
            .collect(),
        policies: asked.policies.answers(arena, asked.leader),
        close_on_exec: asked.flags.answers(arena, asked.leader),
        limit_was_raised: arena.had_no_room,
        event: events.get(&task.pid).copied(),
    });
    Ok(answers.collect())
}

fn prepare_all(
    tree: &Tree,
    others: Vec<Vec<ThreadProgram>>,
    spaces: &[AddressSpace],
    told: &Told,
) -> Result<(Vec<Job>, Vec<Questions>), StatusError> {
    let mut children = child_events::living_children(tree);
    let prepared = tree.alive().zip(others).zip(spaces);
    prepared
        .map(|((task, others), space)| {
            let children = children.remove(&task.pid).unwrap_or_default();
            prepare(task, children, others, space, told)
        })
        .collect()
}

fn prepare(
    task: &Task,
    children: Vec<Pid>,
    others: Vec<ThreadProgram>,
    space: &AddressSpace,
    told: &Told,
) -> Result<(Job, Questions), StatusError> {
    let mut set = ProgramSet::new();
    let mut leader = Program::new(format!("task {}", task.pid));
    let process = attributes::ask_process(&mut leader, task.abi);
    let actions = signals::ask_actions(&mut leader);
    let timers = itimers::ask(&mut leader);
    let posix_timers = posix_timers::ask(&mut leader, posix_timers::read(task.speaker())?);
    let children = child_events::ask(&mut leader, children);
    let local_table = ia32::ask_local_table(&mut leader);
    let mapped = space.mappings().iter().map(|mapping| mapping.range);
    let policies = policies::ask(&mut leader, mapped, Nodes::nr_words());
    let flags = files::ask_flags(&mut leader, told, task.speaker());
    let mut programs = Vec::with_capacity(task.threads.len());
    let mut threads = Vec::with_capacity(task.threads.len());
    let leader = ThreadProgram::new(leader, task.abi);
    for (tid, asked) in task.threads.iter().zip(iter::once(leader).chain(others)) {
        let id = set.add(asked.program);
        programs.push((*tid, id));
        threads.push((id, asked.thread, asked.policy));
    }
    let leader = programs[0].1;
    let job = Job {
        pid: task.pid,
        abi: task.abi,
        threads: programs,
        set,
    };
    Ok((
        job,
        Questions {
            leader,
            process,
            actions,
            timers,
            posix_timers,
            children,
            local_table,
            policies,
            flags,
            threads,
        },
    ))
}
