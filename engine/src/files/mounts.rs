//! Mounts, as /proc/PID/mountinfo lists them.
//!
//! Source: man 5 proc_pid_mountinfo.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use firn_sys::Pid;

/// A mount, in the words of the task that it was read of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) id: u32,
    /// Device in the kernel's encoding.
    pub(super) dev: u32,
    pub(super) path: PathBuf,
    /// Type of the filesystem.
    pub(super) kind: Vec<u8>,
    /// What it is mounted from.
    pub(super) source: Vec<u8>,
    /// Options of the filesystem, with commas between.
    pub(super) options: Vec<u8>,
}

/// The mounts that a task sees, those beneath others first; none of a task that is gone.
pub(super) fn of_task(task: Pid) -> Vec<Mount> {
    read(&format!("/proc/{task}/mountinfo"))
}

/// The mounts of this process.
pub(super) fn here() -> Vec<Mount> {
    read("/proc/self/mountinfo")
}

fn read(path: &str) -> Vec<Mount> {
    let text = std::fs::read(path).unwrap_or_default();
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter_map(Mount::parse).collect()
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Mount> {
        const BETWEEN: &[u8] = b" - ";
        let end = line.windows(3).position(|part| part == BETWEEN)?;
        let mut fields = line[..end].split(|byte| *byte == b' ');
        let id = str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let (major, minor) = str::from_utf8(fields.nth(1)?).ok()?.split_once(':')?;
        let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
        let path = OsString::from_vec(unescaped(fields.nth(1)?)).into();
        let mut fields = line[end + BETWEEN.len()..].split(|byte| *byte == b' ');
        Some(Mount {
            id,
            dev: major << 20 | minor,
            path,
            kind: fields.next()?.to_vec(),
            source: unescaped(fields.next()?),
            options: unescaped(fields.next().unwrap_or_default()),
        })
    }

    /// Its mount point without the leading slash.
    pub(super) fn relative(&self) -> Vec<u8> {
        let path = self.path.as_os_str().as_bytes();
        path.strip_prefix(b"/").unwrap_or(path).to_vec()
    }
}

/// Blanks and the like are written as three octal digits.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).filter(|_| *first == b'\\');
        let digits = digits.and_then(|digits| str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_unescaped() {
        let line = br"36 35 98:0 /mnt1 /a\040b\134 rw,noatime master:1 - ext3 /dev/root rw,quota";
        let expected = Mount {
            id: 36,
            dev: 98 << 20,
            path: PathBuf::from("/a b\\"),
            kind: b"ext3".to_vec(),
            source: b"/dev/root".to_vec(),
            options: b"rw,quota".to_vec(),
        };
        assert_eq!(Mount::parse(line), Some(expected));
        assert_eq!(Mount::parse(b""), None);
        assert_eq!(Mount::parse(b"36 35 98:0 / /x rw"), None);
        assert_eq!(unescaped(br"\99"), br"\99");
    }
}
