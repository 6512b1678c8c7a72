//! Modes that prctl keeps for an address space: huge pages off, and merging of equal pages.
//!
//! Both are handed on by fork, so that the restorer's own count as well: what differs is set, when the task has
//! made its children. Merging marks every mapping that there is; those that the task had taken out again are
//! taken out again. It can't be asked from outside, nor can what KSM has merged be seen; that comes by itself.
//!
//! Source: man 2 PR_SET_THP_DISABLE, PR_SET_MEMORY_MERGE (Linux 6.4); linux mm/ksm.c, ksm_enable_merge_any;
//! include/uapi/linux/prctl.h, PR_THP_DISABLE_EXCEPT_ADVISED (Linux 6.18).

use firn_proto::{FirnMmEntry, MmEntry};
use firn_sys::mm::{advice, map};
use firn_sys::{nr, task as sys_task};

use super::vma::{Vma, status};
use crate::program::{Arena, Program, ProgramId, Rule, Slot};

const PR_SET_THP_DISABLE: u32 = 41;
const PR_GET_THP_DISABLE: u32 = 42;
const PR_SET_MEMORY_MERGE: u32 = 67;
const PR_GET_MEMORY_MERGE: u32 = 68;
/// PR_GET_THP_DISABLE: no huge pages, and no but those that are advised.
const DISABLED: u32 = 1;
const EXCEPT_ADVISED: u32 = 2;
const EINVAL: i32 = 22;

/// Modes of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpaceModes {
    /// What PR_GET_THP_DISABLE returns.
    huge_pages_off: u32,
    /// PR_SET_MEMORY_MERGE.
    merges: bool,
}

/// Questions about them, asked by the process.
#[derive(Debug)]
pub struct SpaceModeQuestions {
    huge_pages_off: Slot,
    merges: Slot,
}

/// Adds the questions about the modes of an address space.
pub fn ask(p: &mut Program) -> SpaceModeQuestions {
    let get = |p: &mut Program, option: u32, why: &'static str| {
        p.call_to_slot(nr::PRCTL, &[option.into()], Rule::Any, why)
    };
    SpaceModeQuestions {
        huge_pages_off: get(p, PR_GET_THP_DISABLE, "asking whether huge pages are off"),
        // EINVAL before Linux 6.4, and without CONFIG_KSM.
        merges: get(p, PR_GET_MEMORY_MERGE, "asking whether pages are merged"),
    }
}

impl SpaceModeQuestions {
    /// Collects the answers from the arena.
    pub fn answers(&self, arena: &Arena, id: ProgramId) -> SpaceModes {
        SpaceModes {
            huge_pages_off: u32::try_from(arena.slot(id, self.huge_pages_off)).unwrap_or(0),
            merges: arena.slot(id, self.merges) == 1,
        }
    }
}

impl SpaceModes {
    /// Those of this process.
    pub fn own() -> SpaceModes {
        let get = |option| sys_task::prctl_get(option, 0).unwrap_or(0);
        SpaceModes {
            huge_pages_off: u32::try_from(get(PR_GET_THP_DISABLE)).unwrap_or(0),
            merges: get(PR_GET_MEMORY_MERGE) == 1,
        }
    }

    /// Enters them into an image.
    pub fn describe(self, mm: &mut MmEntry) {
        mm.thp_disabled = Some(self.huge_pages_off & DISABLED != 0);
        let extension = FirnMmEntry {
            thp_disable: Some(self.huge_pages_off).filter(|mode| mode & EXCEPT_ADVISED != 0),
            merge_any: self.merges.then_some(true),
            ..mm.firn.take().unwrap_or_default()
        };
        mm.firn = (extension != FirnMmEntry::default()).then_some(extension);
    }

    /// Those of an image.
    pub fn from_image(mm: &MmEntry) -> SpaceModes {
        let extension = mm.firn.as_ref();
        let disabled = u32::from(mm.thp_disabled == Some(true));
        let except_advised = extension.and_then(|firn| firn.thp_disable).unwrap_or(0);
        SpaceModes {
            huge_pages_off: disabled | (except_advised & (EXCEPT_ADVISED * disabled)),
            merges: extension.is_some_and(|firn| firn.merge_any == Some(true)),
        }
    }

    /// Adds the calls that give an address space its modes, which has those of the restorer by now.
    pub fn plan<'a>(self, p: &mut Program, own: SpaceModes, vmas: impl Iterator<Item = &'a Vma>) {
        if self.huge_pages_off != own.huge_pages_off {
            let disable = self.huge_pages_off & DISABLED;
            let flags = self.huge_pages_off & EXCEPT_ADVISED;
            let args = [PR_SET_THP_DISABLE.into(), disable.into(), flags.into()];
            // A kernel that knows no exceptions goes on with huge pages where it deems them right.
            let rule = match flags {
                0 => Rule::Exact(0),
                _ => Rule::OkOr(EINVAL),
            };
            p.call(nr::PRCTL, &args, rule, "PR_SET_THP_DISABLE");
        }
        if self.merges != own.merges {
            let args = [PR_SET_MEMORY_MERGE.into(), u32::from(self.merges).into()];
            // Without KSM, equal pages stay apart: nothing but memory is lost.
            p.call(nr::PRCTL, &args, Rule::OkOr(EINVAL), "PR_SET_MEMORY_MERGE");
        }
        if self.merges {
            for vma in vmas.filter(|vma| was_taken_out(vma)) {
                let [start, len] = [vma.range.start, vma.range.len()];
                let why = format!("madvise not to merge pages of {}", vma.title());
                let advice = advice::UNMERGEABLE.into();
                let args = [start.into(), len.into(), advice];
                p.call(nr::MADVISE, &args, Rule::OkOr(EINVAL), why);
            }
        }
    }
}

fn was_taken_out(vma: &Vma) -> bool {
    let kernel = status::VDSO | status::VVAR | status::VSYSCALL | status::UPROBES | status::AIORING;
    let is_ours = vma.status & kernel == 0;
    is_ours && vma.has_flag(map::PRIVATE) && !vma.has_advice(advice::MERGEABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modes(huge_pages_off: u32, merges: bool) -> SpaceModes {
        SpaceModes {
            huge_pages_off,
            merges,
        }
    }

    #[test]
    fn images_bring_them_back() {
        for wanted in [modes(0, false), modes(1, true), modes(3, false)] {
            let mut mm = MmEntry::default();
            wanted.describe(&mut mm);
            assert_eq!(mm.thp_disabled, Some(wanted.huge_pages_off != 0));
            assert_eq!(
                mm.firn.is_some(),
                wanted.merges || wanted.huge_pages_off == 3
            );
            assert_eq!(SpaceModes::from_image(&mm), wanted);
        }
    }

    #[test]
    fn only_what_differs_from_the_restorers_is_set() {
        let mut p = Program::new("test");
        modes(1, true).plan(&mut p, modes(1, true), [].into_iter());
        assert!(p.is_empty());
        modes(3, false).plan(&mut p, modes(0, true), [].into_iter());
        assert_eq!(p.len(), 2);
        assert!(
            p.describe(0).starts_with("prctl(41, 1, 2"),
            "{}",
            p.describe(0)
        );
        assert!(p.describe(1).starts_with("prctl(67"), "{}", p.describe(1));
    }
}
