//! Reading files of /proc.
//!
//! They claim to be empty, so a general reader feels its way in small steps; one large read gets most of
//! them whole.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::buffer::spare_capacity;

/// Larger than nearly every file of a small process; longer ones take several reads.
const STEP: usize = 32 << 10;
/// Larger than any file of one record, such as status.
const RECORD: usize = 4 << 10;

/// Reads a file of /proc to its end.
///
/// # Errors
/// ENOENT or ESRCH: the task is gone. EACCES without ptrace rights, for some files.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    while read_on(&file, &mut bytes, STEP)? > 0 {}
    Ok(bytes)
}

/// Reads a file of /proc that the kernel makes in one piece, such as status and stat: a read with room to
/// spare has got all of it.
///
/// # Errors
/// As [`read`].
pub fn read_record(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    while read_on(&file, &mut bytes, RECORD)? >= RECORD {}
    Ok(bytes)
}

/// Appends up to `step` bytes; returns how many came.
///
/// What is left of the room serves the next read, too, as long as a record fits: a buffer that grows is copied whole.
fn read_on(file: &File, bytes: &mut Vec<u8>, step: usize) -> io::Result<usize> {
    loop {
        if bytes.capacity() - bytes.len() < RECORD {
            bytes.reserve(step);
        }
        match rustix::io::read(file, spare_capacity(bytes)) {
            Err(rustix::io::Errno::INTR) => {}
            got => return Ok(got?),
        }
    }
}

/// The lines of a text of /proc, without the ends of the lines; behind the last one there is none.
pub fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = memchr::memchr(b'\n', rest).unwrap_or(rest.len());
        let line = &rest[..end];
        rest = rest.get(end + 1..).unwrap_or_default();
        Some(line)
    })
}

/// Reads a file of /proc that holds text.
///
/// # Errors
/// As [`read`]; `InvalidData` where it is not UTF-8.
pub fn read_to_string(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read(path)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_short_and_long_files_whole() {
        let own = read_to_string("/proc/self/stat").unwrap();
        assert!(own.ends_with('\n'));
        let pid = std::process::id().to_string();
        assert!(own.starts_with(&pid));
        let smaps = read_to_string("/proc/self/smaps").unwrap();
        assert!(smaps.contains("VmFlags"));
        assert_eq!(read_record("/proc/self/stat").unwrap().last(), Some(&b'\n'));
        assert!(
            read_record("/proc/self/limits")
                .unwrap()
                .starts_with(b"Limit")
        );
    }

    #[test]
    fn lines_end_at_their_newlines_and_with_the_text() {
        let all = |text: &'static [u8]| lines(text).collect::<Vec<_>>();
        assert_eq!(all(b"a\n\nbc\n"), [&b"a"[..], b"", b"bc"]);
        assert_eq!(all(b"a\nb"), [b"a", b"b"]);
        assert!(all(b"").is_empty());
    }

    #[test]
    fn a_missing_file_is_an_error() {
        assert!(read("/proc/self/no-such-file").is_err());
    }
}
