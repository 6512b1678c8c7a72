//! What /proc/PID/fdinfo/N says about every descriptor, whatever its kind.

use firn_sys::file::O_PATH;

/// The lines that all kinds have, and the others as they stand.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct FdInfo {
    /// Position in bytes.
    pub(super) pos: u64,
    /// Open flags, O_CLOEXEC of the descriptor included.
    pub(super) flags: u32,
    /// Mount that it was opened through.
    pub(super) mnt_id: u32,
    /// Inode number; 0 before Linux 5.14, which does not say.
    pub(super) ino: u64,
    /// All other lines; each kind parses its own.
    pub(super) lines: Vec<String>,
}

/// What is wrong with a line of fdinfo.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unexpected line `{line}` in fdinfo")]
pub struct FdInfoError {
    line: String,
}

impl FdInfo {
    /// Parses the text of an fdinfo file.
    pub(super) fn parse(text: &[u8]) -> Result<FdInfo, FdInfoError> {
        let mut info = FdInfo::default();
        for line in String::from_utf8_lossy(text).lines() {
            let (key, value) = line.split_once(':').unwrap_or((line, ""));
            let bad = || FdInfoError { line: line.into() };
            match key {
                // A position beyond 2^63 is printed as a negative number.
                "pos" => info.pos = parse_pos(value.trim()).ok_or_else(bad)?,
                "flags" => {
                    info.flags = u32::from_str_radix(value.trim(), 8).map_err(|_| bad())?;
                }
                "mnt_id" => info.mnt_id = value.trim().parse().map_err(|_| bad())?,
                "ino" => info.ino = value.trim().parse().map_err(|_| bad())?,
                _ => info.lines.push(line.to_owned()),
            }
        }
        Ok(info)
    }

    /// True if it was opened with O_PATH, so that almost no call works on it.
    pub(super) fn is_path_only(&self) -> bool {
        self.flags & O_PATH.cast_unsigned() != 0
    }

    /// What stands behind `key:` in the first line that begins so.
    pub(super) fn value(&self, key: &str) -> Option<&str> {
        let mut lines = self.lines.iter();
        let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        Some(value.trim())
    }

    /// Whether locks are held through this descriptor.
    pub(super) fn has_locks(&self) -> bool {
        self.lines.iter().any(|line| line.starts_with("lock:"))
    }
}

fn parse_pos(value: &str) -> Option<u64> {
    value
        .parse()
        .ok()
        .or_else(|| value.parse::<i64>().ok().map(i64::cast_unsigned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_regular_file_has_position_and_flags() {
        let text = b"pos:\t4096\nflags:\t02102001\nmnt_id:\t29\nino:\t1311\n";
        let info = FdInfo::parse(text).expect("captured from a kernel");
        assert_eq!((info.pos, info.flags), (4096, 0o2102001));
        assert_eq!((info.mnt_id, info.ino), (29, 1311));
        assert!(info.lines.is_empty());
    }

    #[test]
    fn locks_are_found_among_other_lines() {
        let text = b"pos:\t0\nflags:\t0100002\nmnt_id:\t29\nino:\t12\n\
            lock:\t1: FLOCK  ADVISORY  WRITE 4711 fe:00:12 0 EOF\n\
            lock:\t2: POSIX  ADVISORY  READ 4711 fe:00:12 0 99\n";
        let info = FdInfo::parse(text).expect("captured from a kernel");
        assert!(info.has_locks());
        assert!(!FdInfo::default().has_locks());
    }

    #[test]
    fn other_lines_are_kept_for_their_kind() {
        let text = b"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1\neventfd-count:                7\n";
        let info = FdInfo::parse(text).expect("captured from a kernel");
        assert_eq!(info.lines, ["eventfd-count:                7"]);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(FdInfo::parse(b"flags:\t9\n").is_err());
        assert!(FdInfo::parse(b"pos:\tmany\n").is_err());
    }
}
