//! NUMA policies of memory: asked for by the task, mapping by mapping, and set again before memory is filled.
//!
//! What a child inherits comes with the policies of its parent; those go first. The policy of shared memory
//! belongs to the object, and every task that has it mapped sets the same one.
//!
//! Source: man 2 mbind.

use firn_proto::{FirnVmaPolicy, MmEntry};
use firn_sys::{Pid, nr};

use super::range::{AddressRange, PAGE_SIZE};
use super::vma::Vma;
use crate::program::{Arena, Program, ProgramId, Rule};
use crate::task::mempolicy::{self, Fit, Nodes, Policy, PolicyQuestion};

const EFAULT: i32 = 14;

/// Memory with a policy.
pub type Governed = (AddressRange, Policy);

/// Questions for the policies of memory.
#[derive(Debug)]
pub struct PolicyQuestions(Vec<(AddressRange, PolicyQuestion)>);

/// Adds the questions for the policies of all given mappings.
pub fn ask(
    p: &mut Program,
    ranges: impl Iterator<Item = AddressRange>,
    nr_words: usize,
) -> PolicyQuestions {
    let ask = |range: AddressRange| (range, mempolicy::ask(p, nr_words, Some(range.start)));
    PolicyQuestions(ranges.map(ask).collect())
}

impl PolicyQuestions {
    /// The mappings that have a policy.
    pub fn answers(&self, arena: &Arena, id: ProgramId) -> Vec<Governed> {
        let answer =
            |(range, asked): &(AddressRange, PolicyQuestion)| (*range, asked.answer(arena, id));
        let answers = self.0.iter().map(answer);
        answers.filter(|(_, policy)| policy.is_some()).collect()
    }
}

/// What is to be said of memory of tasks that may be tried first on a node that nothing tells of; matters only where
/// there are several.
pub fn home_warning<'a>(tasks: impl Iterator<Item = (Pid, &'a [Governed])>) -> Option<String> {
    let may_have_home = |(_, governed): &(Pid, &[Governed])| {
        let mut policies = governed.iter().map(|(_, policy)| policy);
        policies.any(Policy::may_have_home)
    };
    let pids: Vec<String> = tasks
        .filter(may_have_home)
        .map(|(pid, _)| pid.to_string())
        .collect();
    if pids.is_empty() || !Nodes::usable().are_several() {
        return None;
    }
    Some(format!(
        "memory of task{} {} has NUMA policies of several nodes; which of these is tried first \
         (set_mempolicy_home_node) can't be seen and is lost, if it was set",
        if pids.len() == 1 { "" } else { "s" },
        pids.join(", ")
    ))
}

/// The policies as images have them.
pub fn to_image(governed: &[Governed]) -> Vec<FirnVmaPolicy> {
    let entry = |(range, policy): &Governed| FirnVmaPolicy {
        start: range.start,
        end: range.end,
        policy: policy.to_image(),
    };
    governed.iter().map(entry).collect()
}

/// The policies of an image, ascending; ranges that are none of its mappings are left out.
pub fn from_image(mm: &MmEntry, vmas: &[Vma]) -> Vec<Governed> {
    let entries = mm.firn.iter().flat_map(|firn| &firn.policies);
    let governed = entries.filter_map(|entry| {
        let at = vmas.partition_point(|vma| vma.range.end <= entry.start);
        let vma = vmas.get(at)?.range;
        let is_part = vma.start <= entry.start && entry.start < entry.end && entry.end <= vma.end;
        let is_aligned = entry.start % PAGE_SIZE == 0 && entry.end % PAGE_SIZE == 0;
        let range = AddressRange::new(entry.start, entry.end);
        (is_part && is_aligned).then(|| (range, Policy::from_image(&entry.policy)))
    });
    let mut governed: Vec<Governed> = governed.collect();
    governed.sort_by_key(|(range, _)| range.start);
    governed
}

/// Adds the calls that give the memory of one mapping its policies, out of all, which ascend.
pub fn plan(p: &mut Program, all: &[Governed], mapping: AddressRange, here: &Nodes) {
    let first = all.partition_point(|(range, _)| range.end <= mapping.start);
    let inside = all[first..].iter();
    for (range, policy) in inside.take_while(|(range, _)| range.end <= mapping.end) {
        if policy.fit(here) != Fit::Not {
            bind(p, *range, policy, here, Rule::Ok);
        }
    }
}

/// Adds the calls that take inherited policies away.
pub fn plan_removal(p: &mut Program, inherited: &[AddressRange]) {
    // None of it may have been wanted.
    let rule = Rule::OkOr(EFAULT);
    for range in inherited {
        bind(p, *range, &Policy::none(), &Nodes::default(), rule);
    }
}

fn bind(p: &mut Program, range: AddressRange, policy: &Policy, here: &Nodes, rule: Rule) {
    let [mode, nodes, bits] = policy.arguments(p, here);
    let args = [
        range.start.into(),
        range.len().into(),
        mode,
        nodes,
        bits,
        0.into(),
    ];
    let why = format!("setting the NUMA policy of [{range}]");
    p.call(nr::MBIND, &args, rule, why);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_policies_go_by_the_default_one() {
        let mut p = Program::new("test");
        plan_removal(&mut p, &[AddressRange::new(0x1000, 0x3000)]);
        let said = p.describe(0);
        assert_eq!(said, "mbind(4096, 8192) or errno 14");
    }
}
