//! NUMA memory policies: of a thread, and what a policy of memory has in common with that.
//!
//! Only the thread itself can ask for its policy, with the nodes as they were given, also where the mode keeps
//! them apart from those in use (MPOL_F_STATIC_NODES, MPOL_F_RELATIVE_NODES). A home node
//! (set_mempolicy_home_node), which of several nodes is tried first, is told by no interface of the kernel that
//! leaves the memory alone, and is lost; a dump says so of memory that may have one.
//!
//! A thread without a policy gets that of the restorer, so that `numactl ... firn restore` can move it. The
//! process has its policy before its memory is filled; threads with another one set that themselves.
//!
//! Source: man 2 get_mempolicy, set_mempolicy; linux mm/mempolicy.c.

use std::sync::OnceLock;

use firn_proto::FirnMempolicyEntry;
use firn_sys::{nr, procfs};

use crate::program::{Arena, Arg, Data, Program, ProgramId, Rule};

const MPOL_DEFAULT: u32 = 0;
const MPOL_BIND: u32 = 2;
const MPOL_PREFERRED_MANY: u32 = 5;
/// Where flags begin in a mode.
const MODE_BITS: u32 = 13;
const MPOL_F_RELATIVE_NODES: u32 = 1 << 14;
const MPOL_F_STATIC_NODES: u32 = 1 << 15;
const WORD_BITS: usize = 64;
/// The kernel's bound for any machine (MAX_NUMNODES with NODES_SHIFT 10).
const MAX_WORDS: usize = 16;

/// A policy: mode with its flags, and nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// MPOL_* and MPOL_F_*.
    pub mode: u32,
    /// Nodes without trailing zero words; bit 0 of the first word is node 0.
    pub nodes: Vec<u64>,
}

/// Nodes of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Nodes(Vec<u64>);

/// How far a policy can be had on a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// As it was.
    Whole,
    /// Some of its nodes are missing.
    Partly,
    /// None of its nodes is there: it can't be set.
    Not,
}

impl Nodes {
    /// Nodes with memory that this process may use; none on a kernel without CONFIG_NUMA.
    pub fn usable() -> Nodes {
        let allowed = procfs::read_to_string("/proc/self/status").unwrap_or_default();
        let allowed = allowed
            .lines()
            .find_map(|line| line.strip_prefix("Mems_allowed_list:"));
        let there = procfs::read_to_string("/sys/devices/system/node/has_memory");
        let there = Nodes::parse(there.as_deref().unwrap_or(""));
        let allowed = Nodes::parse(allowed.unwrap_or("0"));
        let both = there.0.iter().zip(&allowed.0).map(|(a, b)| a & b);
        Nodes(both.collect())
    }

    /// Number of words that hold every node that this kernel may ever have.
    pub fn nr_words() -> usize {
        static WORDS: OnceLock<usize> = OnceLock::new();
        *WORDS.get_or_init(|| {
            let possible = procfs::read_to_string("/sys/devices/system/node/possible");
            let possible = Nodes::parse(possible.as_deref().unwrap_or("0"));
            possible.0.len().max(1)
        })
    }

    /// Parses a list such as `0-3,8`.
    fn parse(list: &str) -> Nodes {
        let mut words = Vec::new();
        for part in list.trim().split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else {
                continue;
            };
            for node in first..=last.min(MAX_WORDS * WORD_BITS - 1) {
                if words.len() <= node / WORD_BITS {
                    words.resize(node / WORD_BITS + 1, 0u64);
                }
                words[node / WORD_BITS] |= 1 << (node % WORD_BITS);
            }
        }
        Nodes(words)
    }

    /// Whether there is more than one.
    pub fn are_several(&self) -> bool {
        self.0.iter().map(|word| word.count_ones()).sum::<u32>() > 1
    }

    fn has(&self, word: usize) -> u64 {
        self.0.get(word).copied().unwrap_or(0)
    }
}

impl Policy {
    fn new(mode: u32, mut nodes: Vec<u64>) -> Policy {
        while nodes.last() == Some(&0) {
            nodes.pop();
        }
        Policy { mode, nodes }
    }

    /// The absence of a policy.
    pub fn none() -> Policy {
        Policy::new(MPOL_DEFAULT, Vec::new())
    }

    /// False for what every thread and mapping has that was given none.
    pub fn is_some(&self) -> bool {
        *self != Policy::none()
    }

    /// Whether one of its nodes may have been chosen to be tried first.
    pub fn may_have_home(&self) -> bool {
        matches!(
            self.mode & ((1 << MODE_BITS) - 1),
            MPOL_BIND | MPOL_PREFERRED_MANY
        )
    }

    /// The form that images have.
    pub fn to_image(&self) -> FirnMempolicyEntry {
        FirnMempolicyEntry {
            mode: self.mode,
            nodes: self.nodes.clone(),
        }
    }

    /// The policy of an image; nodes beyond any machine's are left out.
    pub fn from_image(entry: &FirnMempolicyEntry) -> Policy {
        let nodes = entry.nodes.iter().copied().take(MAX_WORDS);
        Policy::new(entry.mode, nodes.collect())
    }

    /// How far the policy can be had with these nodes. Relative nodes are counted among those that are there.
    pub fn fit(&self, here: &Nodes) -> Fit {
        if here.0.is_empty() {
            return Fit::Not;
        }
        if self.nodes.is_empty() || self.mode & MPOL_F_RELATIVE_NODES != 0 {
            return Fit::Whole;
        }
        let mut words = self.nodes.iter().enumerate();
        let whole = words.all(|(at, word)| word & !here.has(at) == 0);
        let mut words = self.nodes.iter().enumerate();
        let some = words.any(|(at, word)| word & here.has(at) != 0);
        match (whole, some) {
            (true, _) => Fit::Whole,
            (false, true) => Fit::Partly,
            (false, false) => Fit::Not,
        }
    }

    /// What is lost of it here, in words.
    pub fn loss(&self, here: &Nodes) -> Option<&'static str> {
        match self.fit(here) {
            Fit::Whole => None,
            Fit::Partly => {
                Some("some of the NUMA nodes that its memory was to come from are not here")
            }
            Fit::Not => Some(
                "none of the NUMA nodes that its memory was to come from is here: it comes from any",
            ),
        }
    }

    /// The arguments mode, nodes and their number, as far as these nodes are here.
    pub fn arguments(&self, p: &mut Program, here: &Nodes) -> [Arg; 3] {
        let keeps_all = self.mode & (MPOL_F_STATIC_NODES | MPOL_F_RELATIVE_NODES) != 0;
        let nodes = self.nodes.iter().enumerate();
        let nodes: Vec<u8> = nodes
            .map(|(at, word)| {
                if keeps_all {
                    *word
                } else {
                    word & here.has(at)
                }
            })
            .flat_map(u64::to_le_bytes)
            .collect();
        if nodes.is_empty() {
            return [self.mode.into(), 0.into(), 0.into()];
        }
        let bits = u64::try_from(8 * nodes.len()).expect("few nodes");
        let nodes = p.data(&nodes);
        // The kernel takes one bit less than it is told.
        [self.mode.into(), nodes.into(), (bits + 1).into()]
    }
}

/// Room for the answer of one get_mempolicy.
#[derive(Debug, Clone, Copy)]
pub struct PolicyQuestion {
    answer: Data,
}

/// Adds the question for a policy: of the thread, or of the memory at an address.
pub fn ask(p: &mut Program, nr_words: usize, address: Option<u64>) -> PolicyQuestion {
    const MPOL_F_ADDR: u32 = 2;
    let answer = p.space(8 + 8 * nr_words);
    let bits = u64::try_from(WORD_BITS * nr_words).expect("few nodes") + 1;
    let flags = if address.is_some() { MPOL_F_ADDR } else { 0 };
    let args = [
        answer.into(),
        answer.at(8).into(),
        bits.into(),
        address.unwrap_or(0).into(),
        flags.into(),
    ];
    // ENOSYS without CONFIG_NUMA: the answer stays empty, which is no policy.
    let why = "asking for a NUMA policy";
    p.call(nr::GET_MEMPOLICY, &args, Rule::Any, why);
    PolicyQuestion { answer }
}

impl PolicyQuestion {
    /// The policy; none where there is none or the kernel knows none.
    pub fn answer(self, arena: &Arena, id: ProgramId) -> Policy {
        let bytes = arena.read(id, self.answer);
        let words = bytes[8..].chunks_exact(8);
        let words = words.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
        let mode = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        Policy::new(mode, words.collect())
    }
}

/// Adds the call that gives the calling thread a policy.
pub fn plan(p: &mut Program, policy: &Policy, here: &Nodes) {
    if policy.fit(here) == Fit::Not {
        return;
    }
    let args = policy.arguments(p, here);
    p.call(
        nr::SET_MEMPOLICY,
        &args,
        Rule::Ok,
        "setting the NUMA policy",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const BIND: u32 = 2;

    #[test]
    fn lists_of_nodes_are_parsed() {
        assert_eq!(Nodes::parse("0-2,64\n"), Nodes(vec![7, 1]));
        assert_eq!(Nodes::parse(""), Nodes(vec![]));
        assert_eq!(Nodes::parse("0-99999999999").0.len(), MAX_WORDS);
        assert!(Nodes::usable().has(0) & 1 == 1);
    }

    #[test]
    fn only_some_policies_have_a_node_that_is_tried_first() {
        let may = |mode| Policy::new(mode, vec![3]).may_have_home();
        assert!(may(BIND | MPOL_F_STATIC_NODES) && may(MPOL_PREFERRED_MANY));
        assert!(!may(0) && !may(1) && !may(3));
        assert!(Nodes::parse("0,64").are_several() && !Nodes::parse("3").are_several());
    }

    #[test]
    fn missing_nodes_are_a_loss() {
        let here = Nodes::parse("0-1");
        let fit = |mode, nodes: &[u64]| Policy::new(mode, nodes.to_vec()).fit(&here);
        assert_eq!(fit(BIND, &[3]), Fit::Whole);
        assert_eq!(fit(BIND, &[6]), Fit::Partly);
        assert_eq!(fit(BIND, &[0, 1]), Fit::Not);
        assert_eq!(fit(BIND | MPOL_F_RELATIVE_NODES, &[8]), Fit::Whole);
        assert_eq!(fit(1, &[]), Fit::Whole);
        let far = Policy::new(BIND, vec![4]);
        assert!(far.loss(&here).is_some());
        let mut p = Program::new("test");
        plan(&mut p, &far, &here);
        plan(&mut p, &Policy::none(), &Nodes::default());
        assert!(p.is_empty());
    }

    #[test]
    fn only_nodes_that_are_here_are_asked_for() {
        let here = Nodes::parse("0");
        let mut p = Program::new("test");
        plan(&mut p, &Policy::new(BIND, vec![3]), &here);
        plan(
            &mut p,
            &Policy::new(BIND | MPOL_F_STATIC_NODES, vec![3]),
            &here,
        );
        plan(&mut p, &Policy::none(), &here);
        assert!(
            p.describe(0).starts_with("set_mempolicy(2, "),
            "{}",
            p.describe(0)
        );
        assert_eq!(p.describe(2), "set_mempolicy()");
    }

    #[test]
    fn images_bring_policies_back() {
        let policy = Policy::new(BIND, vec![5, 0, 0]);
        assert_eq!(policy.nodes, [5]);
        assert_eq!(Policy::from_image(&policy.to_image()), policy);
        assert!(policy.is_some() && !Policy::none().is_some());
    }
}
