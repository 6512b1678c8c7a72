//! Ghosts: files that are open and have no name any more, saved with their content.
//!
//! Any file with a path can become one: regular files, directories, fifos, device nodes, symbolic links.
//! Several entries may stand for one ghost, with different old names. Only the data of a sparse file is
//! read and written; how it comes back is in [`super::ghost_restore`].

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;

use firn_images::{ImageKind, ImageSetWriter};
use firn_proto::{GhostChunkEntry, GhostFileEntry, RemapFilePathEntry, RemapType, Timeval};
use firn_sys::file::{self, S_IFBLK, S_IFCHR, S_IFLNK, S_IFREG, Stat};
use firn_sys::{Errno, Result, memfd};

use super::FileDumpOptions;
use super::error::FileDumpError;
use super::locate;
use super::open_file::{OpenFile, Trouble};

/// Smaller files are written without chunks, as CRIU does.
const CHUNKED_FROM: u64 = 3 * 4096;
const BLOCK: u64 = 512;

/// The ghosts met so far.
#[derive(Debug, Default)]
pub(super) struct Ghosts {
    known: HashMap<(u64, u64), u32>,
    list: Vec<Ghost>,
    remaps: Vec<RemapFilePathEntry>,
}

#[derive(Debug)]
struct Ghost {
    id: u32,
    /// Leads to the file while its task lives.
    source: PathBuf,
    /// Its last name, for messages.
    old: PathBuf,
    stat: Stat,
}

/// What keeps a nameless file from being saved.
pub(super) fn trouble(file: &OpenFile, options: &FileDumpOptions) -> Option<Trouble> {
    let limit = options.ghost_limit?;
    let allocated = file.stat.blocks.saturating_mul(BLOCK);
    let too_large = file.stat.file_type() == S_IFREG && allocated > limit;
    too_large.then(|| {
        Trouble::new(
            format!("the deleted file takes {allocated} bytes, more than the limit of {limit}"),
            format!("raise --ghost-limit to at least {allocated} or leave it out"),
        )
    })
}

impl Ghosts {
    /// Makes entry `orig_id` stand for the nameless file.
    pub(super) fn add(&mut self, file: &OpenFile, old: &[u8], orig_id: u32) {
        let next = u32::try_from(self.list.len()).expect("fewer ghosts than files") + 1;
        let key = (file.stat.dev, file.stat.ino);
        let id = *self.known.entry(key).or_insert(next);
        if id == next {
            self.list.push(Ghost {
                id,
                source: file.proc_path(),
                old: locate::to_path(old),
                stat: file.stat,
            });
        }
        self.remaps.push(RemapFilePathEntry {
            orig_id,
            remap_id: id,
            remap_type: Some(RemapType::Ghost.into()),
        });
    }

    /// Whether the file with that device, in the kernel's encoding, and inode is one of them.
    pub(super) fn has(&self, dev: u32, ino: u64) -> bool {
        let mut known = self.known.keys();
        known.any(|(other, inode)| file::kernel_device(*other) == dev && *inode == ino)
    }

    /// What remap-fpath says about them.
    pub(super) fn remaps(&self) -> &[RemapFilePathEntry] {
        &self.remaps
    }

    /// Writes one image for each; returns the bytes of content.
    pub(super) fn write(&self, images: &ImageSetWriter) -> std::result::Result<u64, FileDumpError> {
        self.list.iter().map(|ghost| ghost.write(images)).sum()
    }
}

impl Ghost {
    fn write(&self, images: &ImageSetWriter) -> std::result::Result<u64, FileDumpError> {
        let failed = |source| FileDumpError::Ghost {
            path: self.old.clone(),
            source,
        };
        let entry = self.entry().map_err(failed)?;
        let mut writer = images.writer(ImageKind::GhostFile, u64::from(self.id));
        writer.entry(&entry)?;
        let mut written = 0;
        if self.stat.file_type() == S_IFREG {
            let content = File::open(&self.source).map_err(|error| failed(error.into()))?;
            if entry.chunks == Some(true) {
                for (off, end) in data_runs(&content, self.stat.size).map_err(failed)? {
                    let len = end - off;
                    writer.entry(&GhostChunkEntry { len, off })?;
                    file::seek(&content, off).map_err(failed)?;
                    writer.payload_from(&content, len)?;
                    written += len;
                }
            } else if self.stat.size > 0 {
                writer.payload_from(&content, self.stat.size)?;
                written = self.stat.size;
            }
        }
        writer.finish()?;
        Ok(written)
    }

    fn entry(&self) -> Result<GhostFileEntry> {
        let stat = &self.stat;
        let is_node = matches!(stat.file_type(), S_IFCHR | S_IFBLK);
        let is_file = stat.file_type() == S_IFREG;
        let target = match stat.file_type() {
            S_IFLNK => {
                let link = file::open(&self.source, file::O_PATH.cast_unsigned())?;
                Some(file::read_link_at(link, c"")?)
            }
            _ => None,
        };
        Ok(GhostFileEntry {
            uid: stat.uid,
            gid: stat.gid,
            mode: stat.mode,
            dev: Some(file::kernel_device(stat.dev)),
            ino: Some(stat.ino),
            // The image has 32 bits for it, which hold majors below 4096.
            rdev: is_node.then(|| u32::try_from(stat.rdev & 0xffff_ffff).expect("masked")),
            atim: timeval(stat.atime),
            mtim: timeval(stat.mtime),
            chunks: is_file.then_some(stat.size >= CHUNKED_FROM),
            size: is_file.then_some(stat.size),
            symlnk_target: target,
        })
    }
}

/// The runs of data in a file, without its holes.
fn data_runs(content: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        match memfd::next_data(content, at) {
            Ok(Some((start, end))) => {
                runs.push((start, end.min(size)));
                at = end;
            }
            Ok(None) => break,
            // A filesystem that does not know its holes.
            Err(Errno::EINVAL) => return Ok(vec![(0, size)]),
            Err(errno) => return Err(errno),
        }
    }
    Ok(runs)
}

fn timeval((seconds, nanos): (i64, u32)) -> Option<Timeval> {
    Some(Timeval {
        tv_sec: u64::try_from(seconds).ok()?,
        tv_usec: u64::from(nanos / 1000),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_no_data() {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(64 << 20).expect("a hole");
        file.write_all_at(&[7; 4096], 32 << 20).expect("one page");
        let runs = data_runs(&file, 64 << 20).expect("lseek");
        let data: u64 = runs.iter().map(|(start, end)| end - start).sum();
        assert!(data < 1 << 20, "{runs:?}");
        assert!(runs.iter().any(|run| (run.0..run.1).contains(&(32 << 20))));
    }
}
