//! Command lines.

use firn_proto::{MmEntry, TaskCoreEntry};

use super::lossy;
use crate::{ImageDir, ImageKind, PagePlace, PageSource};

/// The most bytes of arguments that are read out of memory.
const MAX_BYTES: u64 = 4096;

/// Finds the arguments of a task: as the dump noted them, or else in its memory.
pub(super) fn arguments(
    dir: &ImageDir,
    pid: u64,
    task: Option<&TaskCoreEntry>,
    mm: Option<&MmEntry>,
) -> Vec<String> {
    let noted = task
        .and_then(|task| task.firn.as_ref())
        .map(|firn| &firn.cmdline);
    if let Some(noted) = noted.filter(|noted| !noted.is_empty()) {
        return noted.iter().map(|argument| lossy(argument)).collect();
    }
    let found = mm.and_then(|mm| {
        let source = PageSource::open(dir, ImageKind::Pagemap, pid).ok()?;
        let len = mm.mm_arg_end.checked_sub(mm.mm_arg_start)?;
        memory(&source, mm.mm_arg_start, len.min(MAX_BYTES))
    });
    split(&found.unwrap_or_default())
}

/// Reads memory that has been saved; `None` where a part of it has not.
fn memory(source: &PageSource, start: u64, len: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut at, end) = (start, start.checked_add(len)?);
    while at < end {
        let run = source.run_at(at)?;
        let PagePlace::Stored { file, offset, .. } = run.place else {
            return None;
        };
        let part = usize::try_from(run.end().min(end) - at).ok()?;
        let filled = bytes.len();
        bytes.resize(filled + part, 0);
        let file = source.files().get(file)?;
        let offset = offset.checked_add(at - run.vaddr)?;
        file.read_exact_at(&mut bytes[filled..], offset).ok()?;
        at = run.end();
    }
    Some(bytes)
}

/// Splits arguments at their NULs; those at the very end are filling.
fn split(bytes: &[u8]) -> Vec<String> {
    let end = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    if end == 0 {
        return Vec::new();
    }
    bytes[..end].split(|byte| *byte == 0).map(lossy).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_end_at_nuls() {
        assert_eq!(split(b"sleep\x001000\0"), ["sleep", "1000"]);
        assert_eq!(split(b"a\0\0b\0"), ["a", "", "b"]);
        assert_eq!(split(b"no end"), ["no end"]);
        assert_eq!(split(b"\0\0"), Vec::<String>::new());
    }
}
