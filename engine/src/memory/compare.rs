//! Comparing the pages of a child with those it inherits, page by page, in the images.

use firn_images::PageSource;
use firn_sys::Errno;

use super::image::MemoryImage;
use super::piece::{self, Piece};
use super::range::{AddressRange, PAGE_SIZE};

/// Pages compared at once.
const BATCH: u64 = 64;
const PAGE: usize = 4096;

/// Pages of `child` in `range` that are not, equally, in `parent`; and how many were compared.
///
/// # Errors
/// A pages file can't be read.
pub fn different_pages(
    parent: &MemoryImage,
    child: &MemoryImage,
    range: AddressRange,
) -> Result<(Vec<Piece>, u64), (String, Errno)> {
    let own = piece::pieces_in(child.pages(), range);
    let theirs = piece::pieces_in(parent.pages(), range);
    let common: Vec<AddressRange> = theirs.iter().map(|piece| piece.range).collect();
    let (both, mut different) = piece::split_by(&own, &common);
    let mut compared = 0;
    let mut buffers = (Vec::new(), Vec::new());
    for piece in both {
        let mut start = piece.range.start;
        while start < piece.range.end {
            let end = piece.range.end.min(start + BATCH * PAGE_SIZE);
            let part = piece.within(AddressRange::new(start, end));
            read(child.pages(), &[part], &mut buffers.0)?;
            let their_parts = piece::pieces_in(parent.pages(), part.range);
            read(parent.pages(), &their_parts, &mut buffers.1)?;
            push_different(&part, &buffers.0, &buffers.1, &mut different);
            compared += part.len() / PAGE_SIZE;
            start = end;
        }
    }
    different.sort_unstable_by_key(|piece| piece.range.start);
    Ok((different, compared))
}

fn push_different(part: &Piece, own: &[u8], theirs: &[u8], different: &mut Vec<Piece>) {
    let mut at = part.range.start;
    for (mine, other) in own.chunks_exact(PAGE).zip(theirs.chunks_exact(PAGE)) {
        if mine != other {
            let page = part.within(AddressRange::new(at, at + PAGE_SIZE));
            piece::push_page(different, page);
        }
        at += PAGE_SIZE;
    }
}

/// Reads the contents of pieces, one after the other.
fn read(pages: &PageSource, pieces: &[Piece], buffer: &mut Vec<u8>) -> Result<(), (String, Errno)> {
    buffer.clear();
    for piece in pieces {
        let at = buffer.len();
        // At most BATCH pages.
        let len = usize::try_from(piece.len()).expect("a batch fits memory");
        buffer.resize(at + len, 0);
        let file = &pages.files()[piece.file];
        file.read_exact_at(&mut buffer[at..], piece.offset)
            .map_err(|error| (file.path().display().to_string(), Errno::from(error)))?;
    }
    Ok(())
}
