//! What wait has yet to tell a parent about a child that lives: that it has stopped, or gone on again.
//!
//! The kernel keeps this with the child, and only its parent can look: by a wait that leaves everything as it
//! is. On restore a child stops, or stops and goes on, once more; then the parent takes what it had been told
//! before.
//!
//! ```text
//! went on, not told   programs: the child stops itself, the parent continues it, and takes the stop only
//! stopped, not told   `restore/stops.rs`: the child stops at the very end
//! stopped, told       the same, and the parent takes the stop
//! ```
//!
//! Source: man 2 waitid, WNOWAIT; linux kernel/exit.c, wait_task_stopped and wait_task_continued.

use std::collections::HashMap;

use firn_sys::{Pid, nr};

use crate::program::{Arena, Data, Program, ProgramId, Rule};
use crate::tree::Tree;

const P_PID: u32 = 1;
const WNOHANG: u32 = 1;
const WSTOPPED: u32 = 2;
const WCONTINUED: u32 = 8;
const WNOWAIT: u32 = 0x0100_0000;
const WALL: u32 = 0x4000_0000;
const CLD_STOPPED: u32 = 5;
const CLD_CONTINUED: u32 = 6;
const ECHILD: i32 = 10;
/// What wait fills of a siginfo, rounded up: signal, errno, code, pid, uid, status.
const INFO_SIZE: usize = 32;

/// What there is to be told about a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChildEvent {
    /// It has stopped.
    Stopped,
    /// It has gone on.
    Continued,
}

impl ChildEvent {
    /// The number that images have, as `si_code` of SIGCHLD.
    pub fn to_image(self) -> u32 {
        match self {
            ChildEvent::Stopped => CLD_STOPPED,
            ChildEvent::Continued => CLD_CONTINUED,
        }
    }

    /// The event of an image; None for 0 and for numbers that are none.
    pub fn from_image(code: u32) -> Option<ChildEvent> {
        match code {
            CLD_STOPPED => Some(ChildEvent::Stopped),
            CLD_CONTINUED => Some(ChildEvent::Continued),
            _ => None,
        }
    }
}

/// The living children of each process of a tree.
pub fn living_children(tree: &Tree) -> HashMap<Pid, Vec<Pid>> {
    let mut children: HashMap<Pid, Vec<Pid>> = HashMap::new();
    for task in tree.alive() {
        children.entry(task.ppid).or_default().push(task.pid);
    }
    children
}

/// Questions of a process about its children.
#[derive(Debug)]
pub struct EventQuestions {
    children: Vec<Pid>,
    infos: Data,
}

/// Adds the calls that look at what there is to be told about each child.
pub fn ask(program: &mut Program, children: Vec<Pid>) -> EventQuestions {
    let infos = program.space(children.len() * INFO_SIZE);
    let options = WSTOPPED | WCONTINUED | WNOHANG | WNOWAIT | WALL;
    for (nth, child) in children.iter().enumerate() {
        let info = infos.at(nth * INFO_SIZE);
        let pid = child.to_image();
        let args = [P_PID.into(), pid.into(), info.into(), options.into()];
        // ECHILD: it has been reaped by a debugger of its own.
        let why = "asking what there is to know of a child";
        program.call(nr::WAITID, &args, Rule::OkOr(ECHILD), why);
    }
    EventQuestions { children, infos }
}

impl EventQuestions {
    /// The children about which there is something to be told.
    pub fn answers(&self, arena: &Arena, id: ProgramId) -> Vec<(Pid, ChildEvent)> {
        let infos = arena.read(id, self.infos);
        let event = |(child, info): (&Pid, &[u8])| {
            let code = u32::from_le_bytes(info[8..12].try_into().expect("four bytes"));
            Some((*child, ChildEvent::from_image(code)?))
        };
        let asked = self.children.iter().zip(infos.chunks_exact(INFO_SIZE));
        asked.filter_map(event).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_child_is_asked_about_without_being_waited_for() {
        let mut program = Program::new("test");
        let asked = ask(&mut program, vec![Pid::from_raw(7), Pid::from_raw(8)]);
        assert_eq!(program.len(), 2);
        assert!(program.describe(1).starts_with("waitid(1, 8, "));
        assert_eq!(asked.infos.len(), 2 * INFO_SIZE);
    }

    #[test]
    fn events_keep_the_numbers_of_the_kernel() {
        for event in [ChildEvent::Stopped, ChildEvent::Continued] {
            assert_eq!(ChildEvent::from_image(event.to_image()), Some(event));
        }
        assert_eq!(ChildEvent::from_image(0), None);
    }
}
