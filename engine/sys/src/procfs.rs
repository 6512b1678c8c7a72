//! Reading files of /proc.
//!
//! They claim to be empty, so a general reader feels its way in small steps; one large read gets most of
//! them whole.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Larger than nearly every file of a small process; longer ones take several reads.
const STEP: usize = 32 << 10;

/// Reads a file of /proc to its end.
///
/// # Errors
/// ENOENT or ESRCH: the task is gone. EACCES without ptrace rights, for some files.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut bytes = Vec::new();
    loop {
        let end = bytes.len();
        bytes.resize(end + STEP, 0);
        match file.read(&mut bytes[end..]) {
            Ok(0) => {
                bytes.truncate(end);
                return Ok(bytes);
            }
            Ok(got) => bytes.truncate(end + got),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => bytes.truncate(end),
            Err(error) => return Err(error),
        }
    }
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
    }

    #[test]
    fn a_missing_file_is_an_error() {
        assert!(read("/proc/self/no-such-file").is_err());
    }
}
