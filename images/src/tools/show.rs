//! Images as compact text for people: a line for each entry.
//!
//! ```text
//! fdinfo-2.img  FDINFO
//!   0  id=17 flags=0 type=REG fd=0
//! ```
//!
//! Values that repeat in a list are written once with their number, long bytes are shortened, of
//! payload only the length is told. It is meant for reading; [`decode`](super::decode) has all.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::decode::{DecodeError, open, rendered, shape_of};
use super::extra::{Sizes, skip_payload};
use super::info::size;
use super::line::LineWriter;
use crate::{Header, ImageDir, ImageKind, ImageReadError, PAGE_SIZE, Presence};

/// Shows a file, or all images of a directory.
///
/// Returns what could not be shown to its end; the text says so too.
///
/// # Errors
/// Where the directory cannot be read, or the text not be written.
pub fn show(path: &Path, out: impl Write) -> Result<Vec<DecodeError>, DecodeError> {
    let mut out = BufWriter::with_capacity(1 << 16, out);
    let mut failed = Vec::new();
    if path.is_dir() {
        let dir = ImageDir::open(path)?;
        for file in dir.files()? {
            let path = dir.path().join(&file.name);
            show_one(&path, Some(file.kind), &mut out, &mut failed)?;
        }
    } else {
        let name = path.file_name().and_then(|name| name.to_str());
        let kind = name.and_then(ImageKind::of_file_name);
        show_one(path, kind.map(|(kind, _)| kind), &mut out, &mut failed)?;
    }
    out.flush().map_err(DecodeError::Write)?;
    Ok(failed)
}

/// Shows one file; only failing to write is an error.
fn show_one(
    path: &Path,
    kind: Option<ImageKind>,
    out: &mut impl Write,
    failed: &mut Vec<DecodeError>,
) -> Result<(), DecodeError> {
    let shown = match kind.map(ImageKind::info) {
        Some(info) if info.header == Header::Raw || info.presence == Presence::Unused => {
            show_raw(path, info.tag, out)
        }
        _ => show_entries(path, out),
    };
    match shown {
        Err(DecodeError::Write(error)) => Err(DecodeError::Write(error)),
        Err(error) => {
            writeln!(out, "  DAMAGED: {}", described(&error)).map_err(DecodeError::Write)?;
            failed.push(error);
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Writes an error with what it comes from.
fn described(error: &DecodeError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn heading(path: &Path, rest: &str, out: &mut impl Write) -> Result<(), DecodeError> {
    let name = path.file_name().unwrap_or(path.as_os_str());
    writeln!(out, "{}  {rest}", name.display()).map_err(DecodeError::Write)
}

fn show_raw(path: &Path, tag: &str, out: &mut impl Write) -> Result<(), DecodeError> {
    let bytes = path.metadata().map(|metadata| metadata.len());
    let bytes = bytes.map_err(|source| ImageReadError::Open {
        path: path.into(),
        source,
    })?;
    let rest = match tag {
        "PAGES" => format!("{tag}, {} pages ({})", bytes / PAGE_SIZE, size(bytes)),
        _ => format!("{tag}, raw, {}", size(bytes)),
    };
    heading(path, &rest, out)
}

fn show_entries(path: &Path, out: &mut impl Write) -> Result<(), DecodeError> {
    let mut image = match open(path) {
        Ok(image) => image,
        Err(error) => {
            heading(path, "?", out)?;
            return Err(error);
        }
    };
    heading(path, image.kind().info().tag, out)?;
    let mut index = 0;
    loop {
        let place = image.place();
        let shape = shape_of(image.kind(), index);
        let Some(message) = image.next_bytes()? else {
            return Ok(());
        };
        let mut line = LineWriter::default();
        let outcome = rendered(&mut line, shape, message, place);
        let sizes = Sizes::of(shape, message);
        let before = image.remaining();
        let outcome = outcome.and_then(|()| skip_payload(&mut image, index, &sizes));
        let payload = before - image.remaining();
        let written = write_entry(out, index, &line.finish(), payload);
        written.map_err(DecodeError::Write)?;
        outcome?;
        index += 1;
    }
}

fn write_entry(out: &mut impl Write, index: u64, line: &str, payload: u64) -> io::Result<()> {
    write!(out, "  {index}  {line}")?;
    if payload > 0 {
        write!(out, "  + {payload} bytes")?;
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/criu-4.2-sleep");

    fn shown(path: &Path) -> (String, usize) {
        let mut text = Vec::new();
        let failed = show(path, &mut text).unwrap();
        (String::from_utf8(text).unwrap(), failed.len())
    }

    #[test]
    fn a_directory_is_shown_entry_by_entry() {
        let (text, failed) = shown(Path::new(GOLDEN));
        assert_eq!(failed, 0);
        for line in [
            "pages-1.img  PAGES, 28 pages (112.0 KiB)",
            "fdinfo-2.img  FDINFO",
            "  0  id=4 flags=0 type=REG fd=0",
            "  0  cwd_id=5 root_id=6 umask=18",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        assert!(text.contains("st_space=[0*32]"), "{text}");
        assert!(text.contains("prot=PROT_READ|PROT_WRITE"), "{text}");
    }

    #[test]
    fn damage_is_shown_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fdinfo-2.img");
        let image = std::fs::read(Path::new(GOLDEN).join("fdinfo-2.img")).unwrap();
        std::fs::write(&path, &image[..image.len() - 1]).unwrap();
        let (text, failed) = shown(dir.path());
        assert_eq!(failed, 1);
        assert!(text.contains("\n  1  id=4"), "{text}");
        assert!(text.contains("\n  DAMAGED: "), "{text}");
        assert_eq!(shown(&path), (text, failed));
    }
}
