//! Pages on their way from a pages file into a task.

use firn_images::{PagePlace, PageSource};

use super::range::{AddressRange, PAGE_SIZE};

/// Pages that stand one after the other in a pages file and in the task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where the pages belong.
    pub range: AddressRange,
    /// Index of the pages file.
    pub file: usize,
    /// Offset in it, in bytes.
    pub offset: u64,
}

impl Piece {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.range.len()
    }

    /// True for no pages.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The part that lies in `range`.
    pub fn within(&self, range: AddressRange) -> Piece {
        let part = self.range.intersect(range);
        let skipped = part.start.saturating_sub(self.range.start);
        Piece {
            range: part,
            file: self.file,
            offset: self.offset + skipped,
        }
    }

    /// Whether `next` goes on in the file where this one ends.
    pub fn is_followed_in_file_by(&self, next: &Piece) -> bool {
        self.file == next.file && self.offset + self.len() == next.offset
    }
}

/// Pieces of the pages that lie in `range`.
pub fn pieces_in(pages: &PageSource, range: AddressRange) -> Vec<Piece> {
    let runs = pages.runs();
    let first = runs.partition_point(|run| run.end() <= range.start);
    let inside = runs[first..].iter().take_while(|run| run.vaddr < range.end);
    inside
        .filter_map(|run| {
            // Pages that only the host of the dump has were refused before.
            let PagePlace::Stored { file, offset, .. } = run.place else {
                return None;
            };
            let whole = Piece {
                range: AddressRange::new(run.vaddr, run.end()),
                file,
                offset,
            };
            Some(whole.within(range))
        })
        .collect()
}

/// Appends a page to pieces, as part of the last one where it goes on there.
pub fn push_page(pieces: &mut Vec<Piece>, page: Piece) {
    match pieces.last_mut() {
        Some(last) if last.range.end == page.range.start && last.is_followed_in_file_by(&page) => {
            last.range.end = page.range.end;
        }
        _ => pieces.push(page),
    }
}

/// Splits pieces at the borders of `ranges`, ascending and disjoint, into those inside and those
/// outside.
pub fn split_by(pieces: &[Piece], ranges: &[AddressRange]) -> (Vec<Piece>, Vec<Piece>) {
    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    for piece in pieces {
        let own = [piece.range];
        for part in super::range::intersect(&own, ranges) {
            inside.push(piece.within(part));
        }
        for part in super::range::subtract(&own, ranges) {
            outside.push(piece.within(part));
        }
    }
    (inside, outside)
}

/// Number of pages of all pieces.
pub fn nr_pages(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.len() / PAGE_SIZE).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start: u64, end: u64, offset: u64) -> Piece {
        Piece {
            range: AddressRange::new(start, end),
            file: 0,
            offset,
        }
    }

    #[test]
    fn parts_keep_their_place_in_the_file() {
        let whole = piece(0x1000, 0x5000, 0x8000);
        let (inside, outside) = split_by(&[whole], &[AddressRange::new(0x2000, 0x3000)]);
        assert_eq!(inside, [piece(0x2000, 0x3000, 0x9000)]);
        assert_eq!(
            outside,
            [piece(0x1000, 0x2000, 0x8000), piece(0x3000, 0x5000, 0xa000)]
        );
    }

    #[test]
    fn pages_join_only_where_both_places_go_on() {
        let mut pieces = Vec::new();
        push_page(&mut pieces, piece(0x1000, 0x2000, 0));
        push_page(&mut pieces, piece(0x2000, 0x3000, 0x1000));
        push_page(&mut pieces, piece(0x3000, 0x4000, 0x9000));
        push_page(&mut pieces, piece(0x5000, 0x6000, 0xa000));
        assert_eq!(pieces.len(), 3);
        assert_eq!(nr_pages(&pieces), 4);
    }
}
