//! Temporary names for deleted files that have other, unknown names elsewhere.
//!
//! Such a file can't be saved as a ghost, because its other names must lead to the same file after the
//! restore. So the dump gives it one more name in the directory of the old one, which the restore uses
//! and removes.

use std::collections::HashMap;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use firn_proto::{RemapFilePathEntry, RemapType};
use firn_sys::{Errno, file};

use super::error::FileDumpError;
use super::locate;
use super::open_file::OpenFile;

/// Prefix of the temporary names; CRIU cleans up names of this form as well.
pub(super) const PREFIX: &str = "link_remap.";

/// The names made so far. Dropping removes them, unless they are kept.
#[derive(Debug, Default)]
pub(super) struct LinkRemaps {
    made: Vec<PathBuf>,
    /// Entry of the temporary name, by device and inode.
    known: HashMap<(u64, u64), u32>,
    remaps: Vec<RemapFilePathEntry>,
}

impl LinkRemaps {
    /// Makes entry `orig_id` stand for a temporary name of the file, whose own entry is `link_id`. Returns
    /// the name if it is a new one.
    pub(super) fn make(
        &mut self,
        file: &OpenFile,
        old: &[u8],
        orig_id: u32,
        link_id: u32,
    ) -> Result<Option<Vec<u8>>, FileDumpError> {
        let key = (file.stat.dev, file.stat.ino);
        let remap_id = self.known.get(&key).copied();
        self.remaps.push(RemapFilePathEntry {
            orig_id,
            remap_id: remap_id.unwrap_or(link_id),
            remap_type: Some(RemapType::Linked.into()),
        });
        if remap_id.is_some() {
            return Ok(None);
        }
        let path = self.link(file, old)?;
        self.known.insert(key, link_id);
        Ok(Some(path.into_os_string().into_vec()))
    }

    /// Whether a file without a known name has others nevertheless, which overlays don't tell: another can be
    /// given only to a file that still has one. It is taken back at once.
    pub(super) fn has_other_names(&mut self, file: &OpenFile, old: &[u8]) -> bool {
        if file.stat.nlink == 0 || !locate::is_on_overlay(file) {
            return false;
        }
        let made = self.link(file, old);
        if made.is_ok()
            && let Some(path) = self.made.pop()
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
        made.is_ok()
    }

    fn link(&mut self, file: &OpenFile, old: &[u8]) -> Result<PathBuf, FileDumpError> {
        let dir = locate::to_path(old)
            .parent()
            .map(PathBuf::from)
            .unwrap_or_default();
        let refused = |path: PathBuf| move |source| FileDumpError::LinkRemap { path, source };
        let source = file::open(&file.proc_path(), file::O_PATH.cast_unsigned())
            .map_err(refused(dir.clone()))?;
        let pid = firn_sys::Pid::this();
        for nth in self.made.len().. {
            let path = dir.join(format!("{PREFIX}{pid}.{nth}"));
            match file::link_descriptor(&source, &path) {
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(refused(path)(errno)),
                Ok(()) => {
                    self.made.push(path.clone());
                    return Ok(path);
                }
            }
        }
        unreachable!("a directory with 2^64 names");
    }

    /// What remap-fpath says about them.
    pub(super) fn remaps(&self) -> &[RemapFilePathEntry] {
        &self.remaps
    }

    /// Leaves the names, because an image refers to them.
    pub(super) fn keep(&mut self) {
        self.made.clear();
    }
}

impl Drop for LinkRemaps {
    fn drop(&mut self) {
        for path in &self.made {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }
}
