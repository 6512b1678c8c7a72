//! Terminals: pairs of pseudo terminals, the terminal of a shell's job, /dev/tty and /dev/console.
//!
//! Where the tree has the master of a pair, both sides are made again, with the same number; sessions
//! that had the slave as their controlling terminal get it back: see [`super::pty`]. Where it has only
//! the slave, the other side (an emulator, sshd) is outside: with --shell-job the restore opens the
//! terminal that it runs on itself, and gives it the line settings that the job had left. The size of
//! the window is then that of the new terminal; or the restore makes a new pair and hands its master to
//! whoever embeds the engine. A slave whose master is gone is made hung up again.
//!
//! A terminal is described once, however often it is open; each descriptor's entry also points to one
//! with the path.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};

use firn_images::{ImageKind, ImageSetWriter};
use firn_proto::{FdTypes, FileEntry, TtyFileEntry, TtyInfoEntry, TtyType};
use firn_sys::file::{O_NOCTTY, S_IFCHR};
use firn_sys::tty;

use super::FileDumpOptions;
use super::dump::{DumpState, query};
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::{OpenFile, Trouble};
use super::pty_data::PtyContents;
use super::{external, pty, regular, tty_image};
use crate::obstacle::Obstacle;

/// Majors of the pseudo terminals' slaves.
const PTS_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;
/// /dev/tty.
const CTTY: (u32, u32) = (5, 0);
/// /dev/console.
const CONSOLE: (u32, u32) = (5, 1);
/// /dev/ptmx.
const PTMX: (u32, u32) = (5, 2);
/// Numbers that stand for /dev/console and /dev/tty where pseudo terminals have theirs.
const CONSOLE_INDEX: u32 = 1002;
const CTTY_INDEX: u32 = 1006;
/// External terminals follow this one.
const EXTERNAL_INDEX: u32 = 1012;

/// Terminals.
pub(super) struct Tty;

/// What sort of terminal a file is, with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Master(u32),
    Slave(u32),
    Controlling,
    Console,
    External(u32),
}

impl Sort {
    /// The number that images give its description: odd for masters.
    pub(super) fn info_id(self) -> u32 {
        match self {
            Sort::Master(index) => index * 2 + 1,
            Sort::Slave(index) => index * 2,
            Sort::External(nth) => (EXTERNAL_INDEX + nth) * 2,
            Sort::Controlling => CTTY_INDEX * 2,
            Sort::Console => CONSOLE_INDEX * 2,
        }
    }
}

/// What images know about terminals.
#[derive(Debug, Default)]
pub(super) struct Terminals {
    infos: BTreeMap<u32, TtyInfoEntry>,
    /// One open file of each.
    open: Vec<OpenFile>,
    contents: PtyContents,
    /// Devices of terminals that the restore will be given.
    external: Vec<(u64, u64)>,
}

impl Terminals {
    /// Writes tty-info, and what waits in the pairs.
    pub(super) fn write(&self, images: &ImageSetWriter) -> Result<(), FileDumpError> {
        let mut infos = self.infos.clone();
        let data = self.contents.take(&mut infos)?;
        let infos: Vec<TtyInfoEntry> = infos.into_values().collect();
        images.write_all(ImageKind::TtyInfo, 0, &infos)?;
        if !data.is_empty() {
            images.write_all(ImageKind::TtyData, 0, &data)?;
        }
        Ok(())
    }

    /// What an external terminal is, by its device and that of its filesystem.
    pub(super) fn external(&mut self, rdev: u64, dev: u64) -> Sort {
        let known = &mut self.external;
        let at = known.iter().position(|known| *known == (rdev, dev));
        let at = at.unwrap_or_else(|| {
            known.push((rdev, dev));
            known.len() - 1
        });
        Sort::External(u32::try_from(at).expect("fewer terminals than descriptors") + 1)
    }

    /// Describes a terminal that is met for the first time.
    pub(super) fn describe_once(
        &mut self,
        id: u32,
        describe: impl FnOnce() -> Result<TtyInfoEntry, FileDumpError>,
    ) -> Result<(), FileDumpError> {
        if let Entry::Vacant(place) = self.infos.entry(id) {
            place.insert(describe()?);
        }
        Ok(())
    }

    /// The terminals whose other side is outside of the tree, once all tables are known.
    pub(super) fn unpaired(&self, options: &FileDumpOptions) -> Vec<Obstacle> {
        unpaired(&self.open, options)
    }
}

/// Terminals among the open files of a tree whose other side is outside of it.
pub(super) fn unpaired(files: &[OpenFile], options: &FileDumpOptions) -> Vec<Obstacle> {
    if options.shell_job {
        return Vec::new();
    }
    let masters: HashSet<u32> = files
        .iter()
        .filter_map(|file| match sort_of(file) {
            Some(Sort::Master(index)) => Some(index),
            _ => None,
        })
        .collect();
    let outside = |file: &&OpenFile| match sort_of(file) {
        _ if options.has_external(file) => false,
        Some(Sort::Slave(_)) if options.orphan_pts_master => false,
        Some(Sort::Slave(index)) => !masters.contains(&index) && !is_hung_up(file),
        Some(Sort::Controlling) => true,
        Some(Sort::Master(_) | Sort::Console | Sort::External(_)) | None => false,
    };
    let trouble = |file: &OpenFile| {
        let key = external::key_of(file).unwrap_or_default();
        Trouble::new(
            "it is a terminal, whose other side is outside the tree",
            format!(
                "add --shell-job to continue on the terminal of the restore, or --external {key} to give \
                 it another one, or start the program with its terminal closed (setsid, stdio from files)"
            ),
        )
    };
    let found = files.iter().filter(outside);
    found.map(|file| file.obstacle(trouble(file))).collect()
}

/// A slave has no name when its master is closed.
fn is_hung_up(file: &OpenFile) -> bool {
    file.link.ends_with(b" (deleted)")
}

impl FileKind for Tty {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Tty
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        sort_of(file).is_some()
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        state: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let file = dumping.file;
        let sort = sort_of(file).ok_or_else(|| file.unexpected("tty-index"))?;
        let collected = &mut *state.collected;
        let regf_id = collected.new_id();
        let name = file.link.strip_suffix(b" (deleted)").unwrap_or(&file.link);
        let path = regular::entry(file, regf_id, dumping.fown, name.to_vec(), collected);
        collected.entries.push(path);
        let terminals = &mut collected.terminals;
        let tty_info_id = sort.info_id();
        if let Some(fd) = dumping.duplicate {
            terminals.describe_once(tty_info_id, || {
                tty_image::describe(file, fd, tty_info_id, sort)
                    .map_err(|source| query(file, "the terminal", source))
            })?;
            terminals.contents.add(file, fd, sort)?;
        }
        terminals.open.push(file.clone());
        Ok(FileEntry {
            r#type: FdTypes::Tty.into(),
            id: dumping.id,
            tty: Some(TtyFileEntry {
                id: dumping.id,
                tty_info_id,
                flags: file.image_flags(),
                fown: dumping.fown,
                regf_id: Some(regf_id),
            }),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let tty = FileRestoreError::expect_member(entry, entry.tty.as_ref(), "a terminal")?;
        let terminals = opener.terminals;
        let info = terminals.get(&tty.tty_info_id).ok_or_else(|| {
            FileRestoreError::corrupt(entry.id, "tty-info does not know its terminal")
        })?;
        let flags = tty.flags | O_NOCTTY.cast_unsigned();
        if info.r#type == i32::from(TtyType::Console) {
            let reg = opener.path_entry(entry.id, tty.regf_id)?;
            let fd = open::open_path(&open::path_of(reg, opener.options), flags)?;
            tty_image::apply(&fd, info, entry.id)?;
            return Ok(fd);
        }
        if let Some(fd) = pty::open(tty, info, opener)? {
            return Ok(fd);
        }
        if !opener.options.shell_job {
            return Err(no_terminal(
                "the tasks were on a terminal: add --shell-job to restore them on this one",
            ));
        }
        let fd = if info.r#type == i32::from(TtyType::Ctty) {
            open::open_path("/dev/tty".as_ref(), flags)?
        } else {
            own_terminal(flags)?
        };
        if let Some(termios) = &info.termios {
            let settings = tty_image::from_image(termios, entry.id)?;
            tty::set_settings(&fd, &settings)
                .map_err(FileRestoreError::refused("set", "the terminal"))?;
        }
        Ok(fd)
    }
}

/// What sort of terminal it is; None for anything else.
pub(super) fn sort_of(file: &OpenFile) -> Option<Sort> {
    if file.stat.file_type() != S_IFCHR || file.is_path_only() || !file.link.starts_with(b"/") {
        return None;
    }
    match file.stat.device() {
        CTTY => Some(Sort::Controlling),
        CONSOLE => Some(Sort::Console),
        PTMX => Some(Sort::Master(file.info.value("tty-index")?.parse().ok()?)),
        // Minors have 20 bits, so the first major has all the terminals there can be.
        (major, minor) => PTS_MAJORS.contains(&major).then_some(Sort::Slave(minor)),
    }
}

/// Opens the terminal that the restore runs on: the first of its standard streams that is one.
fn own_terminal(flags: u32) -> Result<OwnedFd, FileRestoreError> {
    let (input, output, error) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let streams = [input.as_fd(), output.as_fd(), error.as_fd()];
    match streams.into_iter().find(|stream| tty::is_terminal(stream)) {
        Some(stream) => open::reopen(stream, flags, "the terminal"),
        None => Err(no_terminal(
            "the tasks need a terminal and the restore has none: run it on a terminal",
        )),
    }
}

fn no_terminal(what: &str) -> FileRestoreError {
    FileRestoreError::Terminal { what: what.into() }
}

/// What tty-info holds.
pub(super) type TerminalInfos = BTreeMap<u32, TtyInfoEntry>;

/// Collects entries of tty-info by number.
pub(super) fn by_id(infos: Vec<TtyInfoEntry>) -> TerminalInfos {
    infos.into_iter().map(|info| (info.id, info)).collect()
}
