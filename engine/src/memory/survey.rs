//! A quick look at the memory of a running task, before anything is stopped.

use firn_sys::Pid;
use firn_sys::procfs;

use super::classify::{self, Refusal};
use super::smaps::{self, Mapping};
use crate::obstacle::Obstacle;

/// Finds all mappings of a running task that can't be dumped.
///
/// Only /proc/PID/maps is read, which does not walk the pages; what only the flags of a mapping tell
/// (userfaultfd, shadow stacks) is found when the task stands still. A task that is gone has none.
pub fn survey(pid: Pid) -> Vec<Obstacle> {
    let Ok(text) = procfs::read(format!("/proc/{pid}/maps")) else {
        return Vec::new();
    };
    // Lines that make no sense are reported by the dump itself, with the line.
    let mappings = smaps::parse(&text).unwrap_or_default();
    obstacles(pid, &mappings)
}

/// All mappings that can't be dumped.
pub(super) fn obstacles(pid: Pid, mappings: &[Mapping]) -> Vec<Obstacle> {
    let refused = mappings.iter().filter_map(|mapping| {
        // Which kind of shared memory it is does not matter here: all kinds can be dumped.
        let refusal = classify::backing(mapping, (u32::MAX, u32::MAX)).err()?;
        Some(obstacle(pid, mapping, refusal))
    });
    refused.collect()
}

fn obstacle(pid: Pid, mapping: &Mapping, (reason, hint): Refusal) -> Obstacle {
    Obstacle {
        pid,
        object: mapping.title(),
        reason: reason.to_owned(),
        hint: hint.map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_all_obstacles_of_a_map() {
        let text = "1000-2000 rw-s 0 00:0e 9 anon_inode:[perf_event]\n\
                    3000-4000 rw-p 0 fe:00 9 /bin/fine\n\
                    5000-6000 rw-s 0 00:01 9 /secretmem (deleted)\n";
        let mappings = smaps::parse(text.as_bytes()).expect("text");
        let found = obstacles(Pid::from_raw(7), &mappings);
        assert_eq!(found.len(), 2);
        assert_eq!(
            found[0].object,
            "mapping 0x1000-0x2000 of anon_inode:[perf_event]"
        );
    }

    #[test]
    fn finds_nothing_in_the_way_here() {
        assert_eq!(survey(Pid::this()), []);
    }
}
