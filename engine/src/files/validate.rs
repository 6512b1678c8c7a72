//! Whether the files that the tasks had open are still there and the same.

use std::path::Path;

use firn_images::utc_date;
use firn_proto::RegFileEntry;
use firn_sys::Errno;
use firn_sys::file::{self, S_IFMT};

use super::error::FileRestoreError;
use super::{FileRestoreOptions, FileValidation, build_id, policy};

/// Compares the file at `path` with what its entry says. `role` is what it is to the tasks.
pub(super) fn check(
    path: &Path,
    entry: &RegFileEntry,
    role: &'static str,
    options: &FileRestoreOptions,
) -> Result<(), FileRestoreError> {
    let stat = match file::lstat_path(path) {
        Ok(stat) => stat,
        Err(Errno::ENOENT | Errno::ENOTDIR) => {
            let path = path.to_owned();
            return Err(FileRestoreError::Missing { role, path });
        }
        Err(source) => {
            let object = path.display().to_string();
            return Err(FileRestoreError::refused("look at", object)(source));
        }
    };
    let changed = |what| FileRestoreError::Changed {
        role,
        path: path.to_owned(),
        what,
    };
    if let Some(policy) = policy::policy_of(entry, options) {
        return policy::check(policy, path, entry, &stat, options).map_err(changed);
    }
    if let Some(mode) = entry.mode {
        check_mode(mode, stat.mode, options).map_err(changed)?;
    }
    let Some(size) = entry.size else {
        return Ok(());
    };
    if size != stat.size {
        return Err(changed(other_size(size, stat.size)));
    }
    match options.validation {
        FileValidation::FileSize => Ok(()),
        FileValidation::BuildId => check_build_id(path, entry).map_err(changed),
        FileValidation::Mtime => check_mtime(entry, stat.mtime).map_err(changed),
    }
}

/// Says that a file has another size.
pub(super) fn other_size(old: u64, new: u64) -> String {
    format!("it had {old} bytes and has {new}")
}

/// Compares the build id where the entry has one.
pub(super) fn check_build_id(path: &Path, entry: &RegFileEntry) -> Result<(), String> {
    if entry.build_id.is_empty() || build_id::read(path) == entry.build_id {
        return Ok(());
    }
    Err("its build id is another one".to_owned())
}

/// Compares the time of the last change where the entry has one.
pub(super) fn check_mtime(entry: &RegFileEntry, new: (i64, u32)) -> Result<(), String> {
    match mtime_of(entry) {
        Some(old) if old != new => Err(format!(
            "it was last written to on {} and is now from {} (--file-validation filesize accepts that)",
            moment(old),
            moment(new)
        )),
        _ => Ok(()),
    }
}

/// Whether the file is to be recognised by a time that the image does not know.
pub(super) fn lacks_mtime(entry: &RegFileEntry, options: &FileRestoreOptions) -> bool {
    // Without a size it is a directory or a file that may grow, of which none is noted.
    options.validation == FileValidation::Mtime
        && entry.size.is_some()
        && mtime_of(entry).is_none()
        && policy::policy_of(entry, options).is_none()
}

/// When the content had last been changed at the dump: seconds and nanoseconds.
fn mtime_of(entry: &RegFileEntry) -> Option<(i64, u32)> {
    let firn = entry.firn.as_ref()?;
    Some((firn.mtime_seconds?, firn.mtime_nanoseconds.unwrap_or(0)))
}

/// A moment with its fraction of a second, which may be all that differs.
fn moment((seconds, nanoseconds): (i64, u32)) -> String {
    match u64::try_from(seconds) {
        Ok(since_1970) => format!("{} +{nanoseconds} ns", utc_date(since_1970)),
        Err(_) => format!("{seconds} s +{nanoseconds} ns since 1970"),
    }
}

/// Compares type and permissions.
pub(super) fn check_mode(old: u32, new: u32, options: &FileRestoreOptions) -> Result<(), String> {
    if old & S_IFMT != new & S_IFMT {
        return Err(format!(
            "it was {} and is {}",
            type_name(old),
            type_name(new)
        ));
    }
    if old != new && !options.skip_rwx_check {
        return Err(format!(
            "its mode was {:o} and is {:o} (--skip-file-rwx-check accepts that)",
            old & 0o7777,
            new & 0o7777
        ));
    }
    Ok(())
}

fn type_name(mode: u32) -> &'static str {
    match mode & S_IFMT {
        file::S_IFREG => "a regular file",
        file::S_IFDIR => "a directory",
        file::S_IFCHR => "a character device",
        file::S_IFBLK => "a block device",
        file::S_IFIFO => "a fifo",
        file::S_IFLNK => "a symbolic link",
        file::S_IFSOCK => "a socket",
        _ => "a file of unknown type",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firn_proto::FirnRegFileEntry;

    fn entry_of(path: &Path) -> RegFileEntry {
        let stat = file::lstat_path(path).expect("it is there");
        RegFileEntry {
            mode: Some(stat.mode),
            size: Some(stat.size),
            ..RegFileEntry::default()
        }
    }

    #[test]
    fn every_difference_has_its_sentence() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("data");
        std::fs::write(&path, "1234").expect("write");
        let same = entry_of(&path);
        let options = FileRestoreOptions::default();
        let message = |entry: &RegFileEntry, options: &FileRestoreOptions| {
            let checked = check(&path, entry, "file", options);
            checked.map_err(|error| {
                error
                    .to_string()
                    .split(": ")
                    .last()
                    .unwrap_or("")
                    .to_owned()
            })
        };
        assert_eq!(message(&same, &options), Ok(()));
        let longer = RegFileEntry {
            size: Some(9),
            ..same.clone()
        };
        assert_eq!(
            message(&longer, &options),
            Err("it had 9 bytes and has 4".into())
        );
        let other_mode = RegFileEntry {
            mode: same.mode.map(|mode| mode ^ 0o111),
            ..same.clone()
        };
        assert!(message(&other_mode, &options).is_err());
        let lenient = FileRestoreOptions {
            skip_rwx_check: true,
            ..options.clone()
        };
        assert_eq!(message(&other_mode, &lenient), Ok(()));
        let directory = entry_of(dir.path());
        let directory = RegFileEntry {
            size: None,
            ..directory
        };
        let expected = "it was a directory and is a regular file";
        assert_eq!(message(&directory, &lenient), Err(expected.into()));
        let stamped = RegFileEntry {
            build_id: vec![1],
            ..same
        };
        assert_eq!(
            message(&stamped, &options),
            Err("its build id is another one".into())
        );
        let earlier = RegFileEntry {
            firn: Some(FirnRegFileEntry {
                mtime_seconds: Some(86_400),
                mtime_nanoseconds: Some(7),
                ..FirnRegFileEntry::default()
            }),
            ..stamped.clone()
        };
        let by_mtime = FileRestoreOptions {
            validation: FileValidation::Mtime,
            ..options.clone()
        };
        let error = check(&path, &earlier, "file", &by_mtime).expect_err("it is younger");
        let text = error.to_string();
        assert!(
            text.contains("last written to on 1970-01-02 00:00:00 UTC +7 ns"),
            "{text}"
        );
        assert!(lacks_mtime(&stamped, &by_mtime) && !lacks_mtime(&earlier, &by_mtime));
        assert_eq!(message(&stamped, &by_mtime), Ok(()));
        std::fs::remove_file(&path).expect("remove");
        let missing = check(&path, &stamped, "executable", &options);
        assert!(matches!(
            missing,
            Err(FileRestoreError::Missing {
                role: "executable",
                ..
            })
        ));
    }
}
