//! Filling a descriptor table with files that other processes have.
//!
//! The kernel gives what is fetched the lowest free number, so which one that is can be told beforehand: in
//! a table without gaps it is the right one already. One number that the table leaves free is for the process
//! that is fetched from.

use firn_sys::{Pid, fcntl, file, nr};

use crate::program::{Program, Rule};

/// A descriptor to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fetch {
    /// Who has the open file.
    pub(super) from: Pid,
    /// Its number there.
    pub(super) source: i32,
    /// Its number in the new table.
    pub(super) target: u32,
    /// Whether the descriptor is close-on-exec.
    pub(super) cloexec: bool,
}

/// One step on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Closes everything.
    Clear,
    /// Opens a descriptor of a process, which gets the number `lands`.
    Reach {
        from: Pid,
        lands: u32,
    },
    /// Fetches from the process behind `reach`; the descriptor gets the number `lands` and is close-on-exec.
    Fetch {
        reach: u32,
        source: i32,
        lands: u32,
    },
    /// Moves a descriptor onto a number, closing what was there.
    Move {
        from: u32,
        to: u32,
        cloexec: bool,
    },
    /// Lets a descriptor survive exec.
    Keep {
        fd: u32,
    },
    Close {
        fd: u32,
    },
}

/// Appends the records that fill a table; afterwards exactly the targets are open. `spare` is a number that
/// is none of them.
pub(super) fn plan(fetches: &[Fetch], spare: u32, program: &mut Program) {
    for step in order(fetches, spare) {
        plan_step(step, program);
    }
}

fn order(fetches: &[Fetch], spare: u32) -> Vec<Step> {
    let mut steps = Vec::with_capacity(fetches.len() * 2 + 8);
    steps.push(Step::Clear);
    let mut sorted = fetches.to_vec();
    sorted.sort_by_key(|fetch| (fetch.from, fetch.target));
    let mut numbers = Numbers::default();
    let mut reached = None;
    for fetch in sorted {
        if reached != Some(fetch.from) {
            let lands = numbers.lowest();
            let from = fetch.from;
            steps.push(Step::Reach { from, lands });
            if lands != spare {
                let (from, to) = (lands, spare);
                let cloexec = true;
                steps.push(Step::Move { from, to, cloexec });
            }
            numbers.take(spare);
            reached = Some(fetch.from);
        }
        let lands = numbers.lowest();
        let (reach, source) = (spare, fetch.source);
        steps.push(Step::Fetch {
            reach,
            source,
            lands,
        });
        numbers.take(fetch.target);
        match (lands == fetch.target, fetch.cloexec) {
            (true, true) => {}
            (true, false) => steps.push(Step::Keep { fd: lands }),
            (false, cloexec) => steps.push(Step::Move {
                from: lands,
                to: fetch.target,
                cloexec,
            }),
        }
    }
    if reached.is_some() {
        steps.push(Step::Close { fd: spare });
    }
    steps
}

/// Which numbers are open.
#[derive(Debug, Default)]
struct Numbers {
    taken: std::collections::HashSet<u32>,
    /// All below it are taken.
    low: u32,
}

impl Numbers {
    fn lowest(&mut self) -> u32 {
        while self.taken.remove(&self.low) {
            self.low += 1;
        }
        self.low
    }

    fn take(&mut self, number: u32) {
        self.taken.insert(number);
    }
}

fn plan_step(step: Step, program: &mut Program) {
    match step {
        Step::Clear => {
            let all = [0.into(), u32::MAX.into()];
            let why = "clearing the descriptors";
            program.call(nr::CLOSE_RANGE, &all, Rule::Ok, why);
        }
        Step::Reach { from, lands } => {
            let args = [from.to_image().into(), 0.into()];
            let why = format!("reaching process {from}, which keeps open files");
            program.call(nr::PIDFD_OPEN, &args, Rule::Exact(lands.into()), why);
        }
        Step::Fetch {
            reach,
            source,
            lands,
        } => {
            let args = [reach.into(), source.into(), 0.into()];
            let rule = Rule::Exact(lands.into());
            program.call(nr::PIDFD_GETFD, &args, rule, "fetching an open file");
        }
        Step::Move { from, to, cloexec } => {
            let flags = if cloexec { file::O_CLOEXEC } else { 0 };
            let args = [from.into(), to.into(), flags.into()];
            program.call(nr::DUP3, &args, Rule::Exact(to.into()), format!("fd {to}"));
            program.call(nr::CLOSE, &[from.into()], Rule::Ok, format!("fd {to}"));
        }
        Step::Keep { fd } => {
            let args = [fd.into(), fcntl::F_SETFD.into(), 0.into()];
            program.call(nr::FCNTL, &args, Rule::Ok, format!("fd {fd}"));
        }
        Step::Close { fd } => {
            let why = "letting the keeper of open files go";
            program.call(nr::CLOSE, &[fd.into()], Rule::Ok, why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// What a descriptor leads to.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Object {
        Other,
        Process(Pid),
        File(Pid, i32),
    }

    /// Runs the steps on a table of (object, close-on-exec), as the kernel would. Returns it, and how many
    /// were open at most.
    fn run(steps: &[Step]) -> (BTreeMap<u32, (Object, bool)>, usize) {
        let mut table = BTreeMap::from([(0, (Object::Other, true)), (7, (Object::Other, true))]);
        let mut most = 0;
        for step in steps {
            let free = (0..).find(|fd| !table.contains_key(fd)).expect("one");
            match *step {
                Step::Clear => table.clear(),
                Step::Reach { from, lands } => {
                    assert_eq!(lands, free);
                    table.insert(free, (Object::Process(from), true));
                }
                Step::Fetch {
                    reach,
                    source,
                    lands,
                } => {
                    assert_eq!(lands, free);
                    let Object::Process(from) = table[&reach].0 else {
                        panic!("{reach} is no process")
                    };
                    table.insert(free, (Object::File(from, source), true));
                }
                Step::Move { from, to, cloexec } => {
                    assert_ne!(from, to, "dup3 refuses equal numbers");
                    let (object, _) = table.remove(&from).expect("open");
                    table.insert(to, (object, cloexec));
                }
                Step::Keep { fd } => table.get_mut(&fd).expect("open").1 = false,
                Step::Close { fd } => assert!(table.remove(&fd).is_some()),
            }
            most = most.max(table.len());
        }
        (table, most)
    }

    fn fetch(from: i32, target: u32, cloexec: bool) -> Fetch {
        Fetch {
            from: Pid::from_raw(from),
            source: target.cast_signed() + 1000,
            target,
            cloexec,
        }
    }

    #[test]
    fn a_table_without_gaps_needs_no_moves() {
        let fetches: Vec<Fetch> = (0..100).map(|fd| fetch(5, fd, true)).collect();
        let steps = order(&fetches, 100);
        // Everything is closed, the process is reached and put aside, and let go in the end.
        assert_eq!(steps.len(), 100 + 4);
        let (table, most) = run(&steps);
        assert_eq!((table.len(), most), (100, 101));
    }

    #[test]
    fn an_empty_table_is_cleared() {
        assert_eq!(order(&[], 0), [Step::Clear]);
    }

    proptest! {
        #[test]
        fn exactly_the_wanted_table_comes_out(
            wanted in proptest::collection::btree_map(0u32..60, (1i32..5, any::<bool>()), 0..60),
        ) {
            let fetches: Vec<Fetch> = wanted
                .iter()
                .map(|(&target, &(from, cloexec))| fetch(from, target, cloexec))
                .collect();
            let spare = (0..).find(|fd| !wanted.contains_key(fd)).expect("finitely many");
            let (table, most) = run(&order(&fetches, spare));
            let expected: BTreeMap<u32, (Object, bool)> = fetches
                .iter()
                .map(|one| (one.target, (Object::File(one.from, one.source), one.cloexec)))
                .collect();
            prop_assert_eq!(table, expected);
            // One more than the table is for the process.
            prop_assert!(most <= fetches.len() + 1);
        }
    }
}
