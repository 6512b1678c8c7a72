//! Turning one descriptor table into another: the moves in an order in which none destroys what a later
//! one needs.

use std::collections::BTreeSet;

/// A descriptor as the new table has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    /// Number of the same open file in the old table.
    pub(super) source: u32,
    /// Number in the new table.
    pub(super) target: u32,
    /// Whether the descriptor is close-on-exec.
    pub(super) cloexec: bool,
}

/// One step on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MoveStep {
    /// Duplicates onto a number, closing what was there.
    Dup { from: u32, to: u32, cloexec: bool },
    /// Sets the flag of a descriptor that has the right number already.
    SetCloexec { fd: u32, cloexec: bool },
    /// Closes all numbers of the range, ends included.
    Close { first: u32, last: u32 },
}

/// Orders the moves. Afterwards exactly the targets are open.
///
/// # Panics
/// If two moves have the same target, which the caller has ruled out.
pub(super) fn order(moves: &[Move]) -> Vec<MoveStep> {
    let mut pending = moves.to_vec();
    pending.sort_unstable_by_key(|one| one.target);
    let targets: Vec<u32> = pending.iter().map(|one| one.target).collect();
    let double = targets.windows(2).find(|pair| pair[0] == pair[1]);
    assert!(double.is_none(), "one move per target");
    let mut steps = Vec::with_capacity(moves.len() + 8);
    // In place already: the number stays, only the flag changes. Others may still copy from it.
    let in_place = pending.iter().filter(|one| one.source == one.target);
    steps.extend(in_place.map(|one| MoveStep::SetCloexec {
        fd: one.target,
        cloexec: one.cloexec,
    }));
    pending.retain(|one| one.source != one.target);
    copy_all(pending, moves, &mut steps);
    close_others(&targets, &mut steps);
    steps
}

/// Copies, given by ascending target.
fn copy_all(mut pending: Vec<Move>, moves: &[Move], steps: &mut Vec<MoveStep>) {
    let place_of = |number| pending.binary_search_by_key(&number, |one| one.target).ok();
    // Which pending move overwrites what a move reads, and how many still read what a move overwrites.
    let mut source_of: Vec<Option<usize>> = pending.iter().map(|m| place_of(m.source)).collect();
    let mut readers = vec![0u32; pending.len()];
    for place in source_of.iter().flatten() {
        readers[*place] += 1;
    }
    let mut done = vec![false; pending.len()];
    let mut ready: Vec<usize> = (0..pending.len()).filter(|at| readers[*at] == 0).collect();
    let spare = std::cell::LazyCell::new(|| spare_number(moves));
    let mut first = 0;
    loop {
        while let Some(at) = ready.pop() {
            steps.push(MoveStep::Dup {
                from: pending[at].source,
                to: pending[at].target,
                cloexec: pending[at].cloexec,
            });
            done[at] = true;
            if let Some(source) = source_of[at] {
                readers[source] -= 1;
                if readers[source] == 0 && !done[source] {
                    ready.push(source);
                }
            }
        }
        // Only cycles are left: save one member, so that its number may be overwritten.
        while done.get(first) == Some(&true) {
            first += 1;
        }
        if first == pending.len() {
            return;
        }
        steps.push(MoveStep::Dup {
            from: pending[first].target,
            to: *spare,
            cloexec: true,
        });
        // Each number of the cycles is read by exactly one pending move.
        let is_reader = |at: &usize| !done[*at] && source_of[*at] == Some(first);
        let reader = (first..pending.len()).find(is_reader);
        let reader = reader.expect("cycles are closed");
        pending[reader].source = *spare;
        source_of[reader] = None;
        readers[first] = 0;
        ready.push(first);
    }
}

/// The lowest number that no move mentions. It is free again when its cycle is done.
fn spare_number(moves: &[Move]) -> u32 {
    let used: BTreeSet<u32> = moves.iter().flat_map(|m| [m.source, m.target]).collect();
    (0..).find(|fd| !used.contains(fd)).expect("finitely many")
}

fn close_others(targets: &[u32], steps: &mut Vec<MoveStep>) {
    let mut first = 0;
    for &target in targets {
        if target > first {
            steps.push(MoveStep::Close {
                first,
                last: target - 1,
            });
        }
        first = target + 1;
    }
    steps.push(MoveStep::Close {
        first,
        last: u32::MAX,
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Runs the steps on a table of (content, close-on-exec), as the kernel would.
    fn run(
        steps: &[MoveStep],
        mut table: BTreeMap<u32, (u32, bool)>,
    ) -> BTreeMap<u32, (u32, bool)> {
        for step in steps {
            match *step {
                MoveStep::Dup { from, to, cloexec } => {
                    assert_ne!(from, to, "dup3 refuses equal numbers");
                    let (content, _) = table[&from];
                    table.insert(to, (content, cloexec));
                }
                MoveStep::SetCloexec { fd, cloexec } => {
                    table.get_mut(&fd).expect("open").1 = cloexec;
                }
                MoveStep::Close { first, last } => {
                    assert!(first <= last, "close_range refuses empty ranges");
                    table.retain(|fd, _| !(first..=last).contains(fd));
                }
            }
        }
        table
    }

    #[test]
    fn a_swap_goes_through_a_spare_number() {
        let swap = |source, target| Move {
            source,
            target,
            cloexec: false,
        };
        let steps = order(&[swap(0, 1), swap(1, 0)]);
        let table = run(&steps, BTreeMap::from([(0, (10, true)), (1, (11, true))]));
        assert_eq!(table, BTreeMap::from([(0, (11, false)), (1, (10, false))]));
    }

    #[test]
    fn no_descriptors_at_all_close_everything() {
        let last = u32::MAX;
        assert_eq!(order(&[]), [MoveStep::Close { first: 0, last }]);
    }

    proptest! {
        #[test]
        fn exactly_the_wanted_table_comes_out(
            wanted in proptest::collection::btree_map(0u32..40, (0u32..40, any::<bool>()), 0..40),
        ) {
            let moves: Vec<Move> = wanted
                .iter()
                .map(|(&target, &(source, cloexec))| Move { source, target, cloexec })
                .collect();
            let before = (0..60).map(|fd| (fd, (fd + 1000, true))).collect();
            let after = run(&order(&moves), before);
            let expected = wanted.iter().map(|(&to, &(from, flag))| (to, (from + 1000, flag))).collect();
            prop_assert_eq!(after, expected);
        }
    }
}
