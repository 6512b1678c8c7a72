//! A file that gets its name when it is whole. Until then it is `NAME.partial`, locked by who writes it.
//!
//! A writer that is killed leaves the partial file behind; the next one of the same name takes it over. It
//! takes over nothing else: an image begins with its magic, so a file that does not is somebody's own.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
#[cfg(test)]
use std::os::unix::fs::FileExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::FolderError;
use crate::storage::Access;
use crate::{Format, HostFile};

/// A file on its way to its name. Dropped before its end, it is removed.
#[derive(Debug)]
pub struct PartialFile {
    file: File,
    partial: PathBuf,
    path: PathBuf,
    is_whole: bool,
}

impl PartialFile {
    /// Begins a new file, over what a writer of the same that was killed may have left.
    ///
    /// # Errors
    /// There is a file of that name, another writer is at it, or what stands at the partial one's place is
    /// no image; the host refused.
    pub fn begin(path: &Path) -> Result<PartialFile, FolderError> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        loop {
            if path.symlink_metadata().is_ok() {
                let what = "it is there already, and is not overwritten; take another name";
                return Err(FolderError::refused(path, what));
            }
            let file = open(&partial).map_err(FolderError::host(&partial, "opened"))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let what = "another command is writing it at this moment";
                    return Err(FolderError::refused(&partial, what));
                }
                Err(TryLockError::Error(error)) => {
                    return Err(FolderError::host(&partial, "locked")(error));
                }
            }
            let failed = FolderError::host(&partial, "written");
            if !is_at(&file, &partial).map_err(&failed)? {
                // Its writer has just come to its end.
                continue;
            }
            if !may_be_ours(&file, &partial)? {
                let what =
                    "it is in the way, and no image that a killed command left; move it away";
                return Err(FolderError::refused(&partial, what));
            }
            file.set_len(0).map_err(&failed)?;
            return Ok(PartialFile {
                file,
                partial,
                path: path.to_owned(),
                is_whole: false,
            });
        }
    }

    /// Where it is written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes it durable and gives it its name.
    ///
    /// # Errors
    /// The host refused, or a file of that name has come meanwhile.
    pub fn finish(mut self) -> Result<(), FolderError> {
        let failed = FolderError::host(&self.path, "written");
        self.file.sync_all().map_err(&failed)?;
        std::fs::hard_link(&self.partial, &self.path).map_err(&failed)?;
        self.is_whole = true;
        std::fs::remove_file(&self.partial).map_err(FolderError::host(&self.partial, "removed"))
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.is_whole {
            // While it is locked: the next one's is another file.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

fn open(partial: &Path) -> io::Result<File> {
    let no_link = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.custom_flags(no_link).open(partial)
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let here = file.metadata()?;
    match path.symlink_metadata() {
        Ok(there) => Ok((here.dev(), here.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// An empty file, or one that begins as an image does.
fn may_be_ours(file: &File, path: &Path) -> Result<bool, FolderError> {
    let failed = FolderError::host(path, "read");
    let meta = file.metadata().map_err(&failed)?;
    if !meta.is_file() || meta.len() == 0 {
        return Ok(meta.is_file());
    }
    let stored = HostFile::open(path, Access::ReadOnly).map_err(&failed)?;
    Ok(Format::detect(&stored)? != Format::Raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_writer_left_is_taken_over_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b");
        let partial = dir.path().join("b.partial");
        let refused = || PartialFile::begin(&path).unwrap_err().to_string();
        std::fs::write(&partial, "a letter").unwrap();
        assert!(refused().contains("it is in the way"));
        assert_eq!(std::fs::read(&partial).unwrap(), b"a letter");
        std::fs::write(&partial, "WithouFreSpacExt and so on").unwrap();
        let first = PartialFile::begin(&path).unwrap();
        assert_eq!(first.file().metadata().unwrap().len(), 0);
        assert!(refused().contains("another command is writing it"));
        drop(first);
        assert!(!partial.exists());
        let second = PartialFile::begin(&path).unwrap();
        second.file().write_all_at(b"whole", 0).unwrap();
        second.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert!(!partial.exists());
        assert!(refused().contains("is not overwritten"));
    }
}
