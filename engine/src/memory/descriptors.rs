//! Descriptors for the mappings of restored tasks.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use firn_sys::Pid;

use super::error::SourceError;
use super::shared_restore::SharedRestore;
use super::sources::{MappingFds, MappingSource};
use super::vma::{Vma, status};
use crate::files::FileStore;

/// Files and shared memory of a restore, as mappings ask for them.
pub struct Descriptors<'a> {
    /// Open files.
    pub files: &'a mut FileStore,
    /// Shared memory.
    pub shared: &'a SharedRestore,
}

impl MappingFds for Descriptors<'_> {
    fn mapping_source(&mut self, vma: &Vma) -> Result<MappingSource, SourceError> {
        if vma.is(status::ANON_SHARED) {
            let missing = || format!("there is no shared memory {}", vma.shmid);
            return Ok(self.shared.anonymous(vma.shmid).ok_or_else(missing)?);
        }
        let id = file_id(vma)?;
        if vma.is(status::SOCKET) {
            let missing = || format!("there is no packet socket {id}");
            return Ok(MappingSource::Fd(
                self.files.packet_fd(id).ok_or_else(missing)?,
            ));
        }
        let Some(inode_id) = self.files.memfd_inode(id) else {
            return Ok(MappingSource::Fd(self.files.link_fd(id, vma.open_flags)?));
        };
        let missing = || format!("memfd.img has no memory file {inode_id}");
        let source = self.shared.mapping_source(inode_id, vma.open_flags)?;
        Ok(source.ok_or_else(missing)?)
    }

    fn ring_fd(&mut self, vma: &Vma) -> Result<i32, SourceError> {
        let id = file_id(vma)?;
        let missing = || format!("files.img has no io_uring ring {id}");
        Ok(self.files.ring_fd(id).ok_or_else(missing)?)
    }

    fn own_ring_fd(&self, pid: Pid, vma: &Vma) -> Option<i32> {
        let id = u32::try_from(vma.shmid).ok()?;
        let is_own = vma.is_ring && self.files.is_own_ring(id);
        let number = is_own.then(|| self.files.ring_number(pid, id))??;
        i32::try_from(number).ok()
    }

    fn exe_fd(&mut self, file_id: u32) -> Result<i32, SourceError> {
        let fd = self.files.link_fd(file_id, Some(0))?;
        Ok(if is_own_executable(fd) { KEPT } else { fd })
    }

    fn null_fd(&mut self) -> Result<i32, SourceError> {
        Ok(self.files.null_fd()?)
    }
}

/// The number in files.img of what a mapping is of.
fn file_id(vma: &Vma) -> Result<u32, SourceError> {
    let impossible = |_| format!("there is no file {}", vma.shmid);
    Ok(u32::try_from(vma.shmid).map_err(impossible)?)
}

/// What tells the kernel to leave a task its executable.
const KEPT: i32 = -1;

/// Whether the descriptor is of the program that restores. A task is born with that one as its
/// executable, and the kernel refuses to exchange an executable for itself once it is mapped.
fn is_own_executable(fd: i32) -> bool {
    let own = Path::new("/proc/self/exe");
    let other = PathBuf::from(format!("/proc/self/fd/{fd}"));
    let file = |path: &Path| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.dev(), meta.ino(), std::fs::read_link(path).ok()?))
    };
    file(own).is_some_and(|own| file(&other) == Some(own))
}
