//! Finding the contents of pages, through all parents.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{PAGE_SIZE, PageFlags, PageSourceError, Pagemap, PagemapRun};
use crate::dir::ImageDir;
use crate::error::ImageReadError;
use crate::kind::ImageKind;

/// More pre-dumps than this before one dump are taken for a mistake.
const MAX_PARENTS: usize = 1024;

/// Where the pages of one process or shared memory object are.
#[derive(Debug)]
pub struct PageSource {
    runs: Vec<PageRun>,
    files: Vec<PagesFile>,
}

/// A run of pages whose contents lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Address of the first page; in a shared memory object, its offset.
    pub vaddr: u64,
    /// Number of pages.
    pub nr_pages: u64,
    /// Where the contents are.
    pub place: PagePlace,
}

/// Where the contents of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PagePlace {
    /// In a file.
    Stored {
        /// Index of the file among [`PageSource::files`].
        file: usize,
        /// Offset of the first page, in bytes.
        offset: u64,
        /// Whether a lazy restore may leave the run for later.
        may_be_lazy: bool,
    },
    /// On the host of the dump, to be asked for there.
    Remote,
}

/// A pages file, which is open from the start or whenever it is read.
#[derive(Debug)]
pub struct PagesFile {
    path: PathBuf,
    held: Option<File>,
}

/// A pages file that is open at least for the moment.
#[derive(Debug)]
pub enum LentFile<'a> {
    /// It is open all the time.
    Held(&'a File),
    /// It has been opened again.
    Opened(File),
}

impl Deref for LentFile<'_> {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            LentFile::Held(file) => file,
            LentFile::Opened(file) => file,
        }
    }
}

impl PageRun {
    /// Gives the address after the last page.
    pub fn end(&self) -> u64 {
        self.vaddr + self.nr_pages * PAGE_SIZE
    }

    /// Gives the address after the last page, and the place of the page that would be there.
    fn next(&self) -> (u64, PagePlace) {
        let place = match self.place {
            PagePlace::Remote => PagePlace::Remote,
            PagePlace::Stored {
                file,
                offset,
                may_be_lazy,
            } => {
                let offset = offset + self.nr_pages * PAGE_SIZE;
                PagePlace::Stored {
                    file,
                    offset,
                    may_be_lazy,
                }
            }
        };
        (self.end(), place)
    }
}

impl PagesFile {
    /// Tells the path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lends the file, for reading by other means. May be called by several threads.
    ///
    /// # Errors
    /// Those of open(2), where it is not open all the time.
    pub fn file(&self) -> io::Result<LentFile<'_>> {
        match &self.held {
            Some(file) => Ok(LentFile::Held(file)),
            None => File::open(&self.path).map(LentFile::Opened),
        }
    }

    /// Gives the file if it is open all the time.
    pub fn held(&self) -> Option<&File> {
        self.held.as_ref()
    }

    /// Reads bytes at an offset; may be called by several threads.
    ///
    /// # Errors
    /// Those of open(2) and pread(2); a file that is too short.
    pub fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file()?.read_exact_at(bytes, offset)
    }
}

impl PageSource {
    /// Finds all pages of a process (`Pagemap`) or shared memory object (`ShmemPagemap`).
    ///
    /// # Errors
    /// A missing or damaged pagemap, a pages file that is too short, a page that a parent is said
    /// to have and has not, parents that lead in a circle.
    pub fn open(dir: &ImageDir, kind: ImageKind, id: u64) -> Result<Self, PageSourceError> {
        let mut search = Search {
            kind,
            id,
            levels: Vec::new(),
            runs: Vec::new(),
            files: Vec::new(),
        };
        search.add_level(dir.clone())?;
        let top = search.levels[0].pagemap.runs.clone();
        for run in &top {
            search.find(0, run, run.vaddr, run.nr_pages)?;
        }
        Ok(Self {
            runs: search.runs,
            files: search.files,
        })
    }

    /// Gives the runs, ascending, without overlaps.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// Gives the files that the runs refer to.
    pub fn files(&self) -> &[PagesFile] {
        &self.files
    }

    /// Closes the files, each of which is opened again whenever it is read.
    pub fn let_files_go(&mut self) {
        self.files.iter_mut().for_each(|file| file.held = None);
    }

    /// Whether all files are open all the time.
    pub fn holds_files(&self) -> bool {
        self.files.iter().all(|file| file.held.is_some())
    }

    /// Finds the run that has the page at an address.
    pub fn run_at(&self, vaddr: u64) -> Option<&PageRun> {
        let index = self.runs.partition_point(|run| run.end() <= vaddr);
        self.runs.get(index).filter(|run| run.vaddr <= vaddr)
    }
}

/// The search for the pages of one pagemap; level 0 is the directory asked for, each further
/// level the parent of the one before.
struct Search {
    kind: ImageKind,
    id: u64,
    levels: Vec<Level>,
    runs: Vec<PageRun>,
    files: Vec<PagesFile>,
}

struct Level {
    dir: ImageDir,
    pagemap: Pagemap,
    /// Index of the pages file, where the pagemap has anything in it.
    file: usize,
}

impl Search {
    fn add_level(&mut self, dir: ImageDir) -> Result<(), PageSourceError> {
        let pagemap = Pagemap::read(&dir, self.kind, self.id)?;
        let file = self.files.len();
        if pagemap.present_bytes() > 0 {
            self.files.push(open_pages(&dir, &pagemap)?);
        }
        self.levels.push(Level { dir, pagemap, file });
        Ok(())
    }

    /// Finds `nr_pages` pages from `vaddr` on, all of them in a run of a level.
    fn find(
        &mut self,
        level: usize,
        run: &PagemapRun,
        vaddr: u64,
        nr_pages: u64,
    ) -> Result<(), PageSourceError> {
        if run.flags.contains(PageFlags::PARENT) {
            return self.find_in_parent(level + 1, vaddr, nr_pages);
        }
        let place = if run.flags.contains(PageFlags::PRESENT) {
            let (file, offset) = (self.levels[level].file, run.offset + (vaddr - run.vaddr));
            let may_be_lazy = run.flags.contains(PageFlags::LAZY);
            PagePlace::Stored {
                file,
                offset,
                may_be_lazy,
            }
        } else {
            PagePlace::Remote
        };
        match self.runs.last_mut() {
            Some(last) if last.next() == (vaddr, place) => last.nr_pages += nr_pages,
            _ => self.runs.push(PageRun {
                vaddr,
                nr_pages,
                place,
            }),
        }
        Ok(())
    }

    /// Finds pages in a parent, which has to have all of them.
    fn find_in_parent(
        &mut self,
        level: usize,
        vaddr: u64,
        nr_pages: u64,
    ) -> Result<(), PageSourceError> {
        if level == self.levels.len() {
            self.enter_parent(vaddr)?;
        }
        let (mut next, end) = (vaddr, vaddr + nr_pages * PAGE_SIZE);
        let mut index = self.levels[level]
            .pagemap
            .runs
            .partition_point(|run| run.end() <= vaddr);
        while next < end {
            let run = self.levels[level].pagemap.runs.get(index).copied();
            let Some(run) = run.filter(|run| run.vaddr <= next) else {
                let searched = self.levels[level].dir.path_of(self.kind, self.id);
                return Err(self.not_in_parent(next, searched));
            };
            let part = run.end().min(end) - next;
            self.find(level, &run, next, part / PAGE_SIZE)?;
            next += part;
            index += 1;
        }
        Ok(())
    }

    /// Follows the parent link of the last level.
    fn enter_parent(&mut self, vaddr: u64) -> Result<(), PageSourceError> {
        let last = self.levels.last().expect("there is a level 0").dir.clone();
        let Some(parent) = last.parent()? else {
            return Err(self.not_in_parent(vaddr, last.path().to_owned()));
        };
        if self.levels.len() > MAX_PARENTS {
            let path = self.levels[0].dir.path().to_owned();
            return Err(PageSourceError::TooManyParents {
                path,
                limit: MAX_PARENTS,
            });
        }
        // Paths of directories are absolute and without links, so equal means the same.
        if self
            .levels
            .iter()
            .any(|level| level.dir.path() == parent.path())
        {
            let (from, to) = (last.path().to_owned(), parent.path().to_owned());
            return Err(PageSourceError::ParentLoop { from, to });
        }
        self.add_level(parent)
    }

    fn not_in_parent(&self, vaddr: u64, searched: PathBuf) -> PageSourceError {
        let pagemap = self.levels[0].dir.path_of(self.kind, self.id);
        PageSourceError::NotInParent {
            pagemap,
            vaddr,
            searched,
        }
    }
}

fn open_pages(dir: &ImageDir, pagemap: &Pagemap) -> Result<PagesFile, PageSourceError> {
    let id = pagemap.pages_id.into();
    let path = dir.path_of(ImageKind::Pages, id);
    let file = dir.raw_file(ImageKind::Pages, id)?;
    let size = file.metadata().map(|m| m.len());
    let size = size.map_err(|source| ImageReadError::Open {
        path: path.clone(),
        source,
    })?;
    match pagemap.present_bytes() {
        needed if needed > size => Err(PageSourceError::PagesTooShort { path, size, needed }),
        _ => Ok(PagesFile {
            path,
            held: Some(file),
        }),
    }
}
