//! `NAME.partial`, which one receiver at a time writes: it has the writer's seat of the file that bears the
//! name.

use std::io;
use std::path::Path;

use crate::storage::is_named;
use crate::{Access, HostFile};

/// Makes it anew. What an earlier receiver left goes; one that is still at it keeps its file.
///
/// # Errors
/// Another receiver has it, or the host refused.
pub(super) fn create(path: &Path) -> io::Result<HostFile> {
    loop {
        match open(path) {
            // Nobody else takes the name off a file that somebody has the seat of.
            Ok(_old) => std::fs::remove_file(path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        match HostFile::create(path) {
            Ok(new) if is_named(new.file(), path) => return Ok(new),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(told(error)),
        }
    }
}

/// Opens the one that is there.
///
/// # Errors
/// Another receiver has it, or the host refused.
pub(super) fn open(path: &Path) -> io::Result<HostFile> {
    loop {
        let opened = HostFile::open(path, Access::ReadWrite).map_err(told)?;
        // Another receiver may have taken the name away before the seat was ours.
        if is_named(opened.file(), path) {
            return Ok(opened);
        }
    }
}

fn told(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => taken(),
        _ => error,
    }
}

/// Two copies want the same name.
pub(super) fn taken() -> io::Error {
    io::Error::other("another copy is being received into it")
}

#[cfg(test)]
mod tests {
    use super::super::wire::{self, Hello};
    use super::super::{CopyError, FileTarget, Sink, TargetFormat};
    use super::*;

    const UNIT: u32 = 1 << 16;

    fn hello(session: &str) -> Hello {
        Hello {
            version: wire::VERSION,
            session: session.to_owned(),
            size_bytes: 3 << 16,
            unit_bytes: UNIT,
            hears: true,
        }
    }

    fn is_taken<T>(outcome: Result<T, CopyError>) -> bool {
        let Err(CopyError::Target { source, .. }) = outcome else {
            return false;
        };
        source.to_string() == taken().to_string()
    }

    #[test]
    fn a_second_receiver_leaves_the_first_ones_file_alone() {
        for format in [TargetFormat::Raw, TargetFormat::Expanded] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("copy");
            let target = || FileTarget::new(&path, format, 1 << 30);
            // Left by somebody who is gone.
            std::fs::write(dir.path().join("copy.partial"), b"old").unwrap();
            let mut first = target();
            first.begin(&hello("a")).unwrap();
            first.data(0, vec![7; 1 << 16]).unwrap();
            for session in ["b", "a"] {
                let mut second = target();
                assert!(is_taken(second.begin(&hello(session))), "{session}");
                drop(second);
            }
            let mut stream = &0x4CC0_AC3Du32.to_le_bytes()[..];
            let options = super::super::ReceiveOptions { max_size: 1 << 30 };
            let legacy = super::super::receive(&mut stream, None, target(), &options, &mut |_| {});
            assert!(is_taken(legacy));
            first.data(1 << 16, vec![8; 1 << 16]).unwrap();
            first.end().unwrap();
            assert!(path.exists() && !dir.path().join("copy.partial").exists());
            if format == TargetFormat::Raw {
                let bytes = std::fs::read(&path).unwrap();
                assert!(bytes[..1 << 16].iter().all(|byte| *byte == 7));
                assert!(bytes[1 << 16..2 << 16].iter().all(|byte| *byte == 8));
            }
        }
    }

    #[test]
    fn a_name_that_somebody_took_is_not_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy");
        let mut target = FileTarget::new(&path, TargetFormat::Raw, 1 << 30);
        target.begin(&hello("a")).unwrap();
        std::fs::remove_file(target.partial()).unwrap();
        std::fs::write(target.partial(), b"another").unwrap();
        assert!(is_taken(target.end()));
        assert!(!path.exists());
    }
}
