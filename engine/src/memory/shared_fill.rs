//! Filling shared memory objects from their images.

use std::fs::File;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use firn_images::PageSource;
use firn_sys::Errno;
use firn_sys::window::Window;

use super::fill::PageFill;
use super::piece::{self, Piece};
use super::range::{AddressRange, PAGE_SIZE};
use super::shared_restore::{Object, SharedRestoreError};
use super::vma;

/// Bytes of an object that are mapped at once while it is filled.
const WINDOW_BYTES: u64 = 4 << 20;

impl Object {
    /// Reads all contents into mapped windows of the object, with several workers.
    pub(super) fn fill(
        &self,
        file: &File,
        pages: &PageSource,
        how: &PageFill<'_>,
    ) -> Result<(), SharedRestoreError> {
        let windows = self.windows(pages);
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let work = || {
            while let Some((window, pieces)) = windows.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.fill_window(file, *window, pieces, pages, how) {
                    // The others stop at their next window.
                    next.store(windows.len(), Ordering::Relaxed);
                    let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
                    failure.get_or_insert(error);
                }
            }
        };
        let workers = how.workers.min(windows.len());
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(work);
            }
            work();
        });
        let failure = failure.into_inner().unwrap_or_else(|e| e.into_inner());
        failure.map_or(Ok(()), Err)
    }

    /// Parts of the object that have contents, with the contents.
    fn windows(&self, pages: &PageSource) -> Vec<(AddressRange, Vec<Piece>)> {
        let runs = pages.runs();
        // Huge pages are mapped whole; and mapping them beyond the end would make the object grow.
        let step = WINDOW_BYTES.max(vma::huge_page_size(self.huge));
        let object_end = self.size.next_multiple_of(PAGE_SIZE);
        let mut windows = Vec::new();
        let mut start = 0;
        while let Some(run) = runs.get(runs.partition_point(|run| run.end() <= start)) {
            let first = run.vaddr.max(start);
            let first = first - first % step;
            let window = AddressRange::new(first, object_end.min(first + step));
            windows.push((window, piece::pieces_in(pages, window)));
            start = window.end;
        }
        windows
    }

    fn fill_window(
        &self,
        file: &File,
        range: AddressRange,
        pieces: &[Piece],
        pages: &PageSource,
        how: &PageFill<'_>,
    ) -> Result<(), SharedRestoreError> {
        if how.cancel.is_cancelled() {
            return Err(SharedRestoreError::Cancelled);
        }
        let len = usize::try_from(range.len()).expect("a window fits memory");
        let window =
            Window::of_file(file, range.start, len).map_err(self.failed("map for filling"))?;
        for piece in pieces {
            let source = pages.files()[piece.file].file();
            let source = source.map_err(|error| self.failed("fill")(error.into()))?;
            let at = usize::try_from(piece.range.start - range.start).expect("inside");
            let len = usize::try_from(piece.len()).expect("inside");
            let mut done = 0;
            while done < len {
                let offset = piece.offset + u64::try_from(done).expect("inside");
                match window.read_file(&source, offset, at + done, len - done) {
                    Ok(0) => return Err(self.failed("read all of")(Errno::EIO)),
                    Ok(read) => done += read,
                    Err(Errno::EINTR) => {}
                    Err(error) => return Err(self.failed("fill")(error)),
                }
            }
            how.written.fetch_add(piece.len(), Ordering::Relaxed);
        }
        Ok(())
    }
}
