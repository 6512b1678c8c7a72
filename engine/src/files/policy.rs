//! What may have changed about single files since the dump, by patterns of their paths.
//!
//! ```text
//! exact      nothing: type, permissions, size, time of the last change, build id
//! grown      it may be longer than it was, as logs are that others append to
//! build-id   an ELF file is recognised by its build id alone, any other by its size
//! ignore     all but its type
//! ```
//!
//! What images of CRIU do not say (the time; the size of files that are only appended to) is not
//! compared.

use std::path::Path;

use firn_proto::RegFileEntry;
use firn_sys::file::Stat;

use super::pattern::fits;
use super::{FileRestoreOptions, validate};

/// What may have changed about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilePolicy {
    /// Nothing.
    Exact,
    /// It may be longer.
    Grown,
    /// Anything but the build id.
    BuildId,
    /// Anything but the type.
    Ignore,
}

/// What holds for the file of an entry: the first pattern that fits its path counts.
pub(super) fn policy_of(entry: &RegFileEntry, options: &FileRestoreOptions) -> Option<FilePolicy> {
    let name = String::from_utf8_lossy(&entry.name);
    let mut policies = options.policies.iter();
    let found = policies.find(|(pattern, _)| fits(pattern, &name));
    found.map(|(_, policy)| *policy)
}

/// Compares a file with its entry as its policy says; the error is the difference.
pub(super) fn check(
    policy: FilePolicy,
    path: &Path,
    entry: &RegFileEntry,
    stat: &Stat,
    options: &FileRestoreOptions,
) -> Result<(), String> {
    let lenient = FileRestoreOptions {
        skip_rwx_check: options.skip_rwx_check || policy == FilePolicy::Ignore,
        ..FileRestoreOptions::default()
    };
    if let Some(mode) = entry.mode {
        validate::check_mode(mode, stat.mode, &lenient)?;
    }
    let size = size_of(entry);
    match policy {
        FilePolicy::Ignore => Ok(()),
        FilePolicy::Grown => match size {
            Some(size) if stat.size < size => Err(format!(
                "it had {size} bytes and has only {} (its policy allows it to grow)",
                stat.size
            )),
            _ => Ok(()),
        },
        FilePolicy::BuildId if entry.build_id.is_empty() => same_size(entry.size, stat),
        FilePolicy::BuildId => validate::check_build_id(path, entry),
        FilePolicy::Exact => {
            same_size(size, stat)?;
            validate::check_build_id(path, entry)?;
            validate::check_mtime(entry, stat.mtime)
        }
    }
}

fn size_of(entry: &RegFileEntry) -> Option<u64> {
    entry.size.or_else(|| entry.firn.as_ref()?.appended_size)
}

fn same_size(size: Option<u64>, stat: &Stat) -> Result<(), String> {
    match size {
        Some(size) if size != stat.size => Err(validate::other_size(size, stat.size)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firn_proto::FirnRegFileEntry;

    #[test]
    fn each_policy_forgives_what_it_says() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        std::fs::write(&path, "12345").expect("write");
        let stat = firn_sys::file::lstat_path(&path).expect("it is there");
        let options = FileRestoreOptions::default();
        let same = RegFileEntry {
            mode: Some(stat.mode),
            size: Some(stat.size),
            firn: Some(FirnRegFileEntry {
                mtime_seconds: Some(stat.mtime.0),
                mtime_nanoseconds: Some(stat.mtime.1),
                ..FirnRegFileEntry::default()
            }),
            ..RegFileEntry::default()
        };
        let passes = |entry: &RegFileEntry| {
            let all = [
                FilePolicy::Exact,
                FilePolicy::Grown,
                FilePolicy::BuildId,
                FilePolicy::Ignore,
            ];
            all.map(|policy| check(policy, &path, entry, &stat, &options).is_ok())
        };
        assert_eq!(passes(&same), [true; 4]);
        let grown = RegFileEntry {
            size: Some(3),
            ..same.clone()
        };
        assert_eq!(passes(&grown), [false, true, false, true]);
        let shorter = RegFileEntry {
            size: Some(9),
            ..same.clone()
        };
        assert_eq!(passes(&shorter), [false, false, false, true]);
        let appended = RegFileEntry {
            size: None,
            firn: Some(FirnRegFileEntry {
                appended_size: Some(9),
                ..FirnRegFileEntry::default()
            }),
            ..same.clone()
        };
        assert_eq!(passes(&appended), [false, false, true, true]);
        let mut older = same.clone();
        older.firn.as_mut().expect("set above").mtime_seconds = Some(1);
        assert_eq!(passes(&older), [false, true, true, true]);
        let other_mode = RegFileEntry {
            mode: Some(stat.mode ^ 0o111),
            ..same.clone()
        };
        assert_eq!(passes(&other_mode), [false, false, false, true]);
        let rebuilt = RegFileEntry {
            build_id: vec![1],
            ..same
        };
        assert_eq!(passes(&rebuilt), [false, true, false, true]);
    }

    #[test]
    fn the_first_pattern_counts() {
        let options = FileRestoreOptions {
            policies: vec![
                ("/var/log/*".to_owned(), FilePolicy::Grown),
                ("*".to_owned(), FilePolicy::Exact),
            ],
            ..FileRestoreOptions::default()
        };
        let policy = |name: &str| {
            let entry = RegFileEntry {
                name: name.into(),
                ..RegFileEntry::default()
            };
            policy_of(&entry, &options)
        };
        assert_eq!(policy("/var/log/x/y"), Some(FilePolicy::Grown));
        assert_eq!(policy("/etc/passwd"), Some(FilePolicy::Exact));
    }
}
