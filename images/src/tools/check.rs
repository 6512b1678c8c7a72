//! Proves that an images directory is whole, or lists all that is wrong with it.
//!
//! First each file by itself, then what they say of each other: the tree, the images that each
//! task needs, every number by which one image refers to another, every page.

mod core;
mod fault;
mod files;
mod memory;
mod report;
mod structure;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::BTreeSet;
use std::path::Path;

pub(super) use self::core::LEADER_EXITED;
pub(super) use tree::is_zombie;

pub use fault::Fault;
pub use report::{CheckReport, Problem};

use super::set::{Placed, SetImages};
use crate::{Header, ImageDir, ImageFile, ImageKind, ImageReadError, Presence};

/// What has been found so far.
#[derive(Debug, Default)]
struct Findings {
    problems: Vec<Problem>,
    remarks: Vec<Problem>,
}

impl Findings {
    /// Notes something about a file.
    fn file(&mut self, kind: ImageKind, id: u64, fault: Fault) {
        self.problems.push(Problem {
            file: kind.file_name(id),
            entry: None,
            offset: None,
            fault,
        });
    }

    /// Notes something about an entry of a file.
    fn entry<M>(&mut self, kind: ImageKind, id: u64, placed: &Placed<M>, fault: Fault) {
        self.problems.push(Problem {
            file: kind.file_name(id),
            entry: Some(placed.entry),
            offset: Some(placed.offset),
            fault,
        });
    }

    /// Turns the last problem into a remark.
    fn last_is_remark(&mut self) {
        self.remarks.extend(self.problems.pop());
    }
}

/// Checks a directory.
///
/// # Errors
/// Only where the directory itself cannot be read; all else is in the report.
pub fn check(path: &Path) -> Result<CheckReport, ImageReadError> {
    let dir = ImageDir::open(path)?;
    let files: Vec<ImageFile> = dir.files()?;
    let mut found = Findings::default();
    let mut damaged = BTreeSet::new();
    let has_entries = |file: &&ImageFile| {
        let info = file.kind.info();
        info.header != Header::Raw && info.presence != Presence::Unused
    };
    for file in files.iter().filter(has_entries) {
        let problems = structure::check_file(dir.path(), file);
        if problems
            .iter()
            .any(|p| !matches!(p.fault, Fault::Required { .. }))
        {
            damaged.insert(file.name.clone());
        }
        found.problems.extend(problems);
    }
    let mut set = SetImages::read(&dir, &files, damaged);
    found.problems.append(&mut set.problems);
    if is_pre_dump(&set) {
        found.file(ImageKind::Inventory, 0, Fault::PreDump);
    } else {
        tree::check_inventory(&set, &mut found);
        tree::check_tree(&set, &mut found);
        core::check_cores(&set, &mut found);
        files::check_files(&set, &mut found);
    }
    memory::check_memory(&dir, &files, &set, &mut found);
    Ok(report(&files, &set, found))
}

fn is_pre_dump(set: &SetImages) -> bool {
    set.pstree.is_empty()
        && set
            .inventory
            .as_ref()
            .is_some_and(|inv| inv.img_version == 0)
}

fn report(files: &[ImageFile], set: &SetImages, found: Findings) -> CheckReport {
    let pagemaps = set.pagemaps.values().chain(set.shmem_pagemaps.values());
    let alive = set.pstree.iter().map(|task| task.message.threads.len());
    CheckReport {
        images: files.len(),
        tasks: set.pstree.len(),
        threads: alive.sum(),
        pages: pagemaps
            .map(|map| map.present_bytes() / crate::PAGE_SIZE)
            .sum(),
        problems: found.problems,
        remarks: found.remarks,
    }
}
