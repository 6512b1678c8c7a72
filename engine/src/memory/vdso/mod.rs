//! The vdso: code and data that the kernel lends to every task.
//!
//! A restored task gets the running kernel's vdso at the old address when the code is the same, byte
//! for byte, and lies behind its data (vvar, vvar_vclock) at the same distance; how many parts there
//! are and how large they are is the kernel's business. Otherwise the old code stays as ordinary
//! memory, because return addresses and looked-up functions point into it; its entry points jump to
//! the new vdso, which is put somewhere else. A 32-bit program has a vdso of 32-bit code, which is mapped
//! anew where its task had inherited the 64-bit one, and then goes the same way.

pub mod elf;
mod kernel;
pub mod redirect;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use firn_sys::mm::{map, prot};
use firn_sys::{Errno, Pid, memfd, nr};

use super::image::MemoryImage;
use super::piece;
use super::range::{self, AddressRange};
use super::vma::status;
use crate::arch::Abi;
use crate::program::{Program, Rule};

pub use kernel::KernelVdso;

/// A vdso of more pages than this is none.
const MAX_CODE_BYTES: u64 = 1 << 20;

/// Failure to look at a vdso.
#[derive(Debug, thiserror::Error)]
pub enum VdsoError {
    /// The own one can't be read.
    #[error("can't read the vdso of this process")]
    Own(#[source] Errno),
    /// The one of 32-bit programs can't be mapped or read.
    #[error("can't get the vdso that this kernel gives to 32-bit programs")]
    Ia32(#[source] Errno),
    /// The one of the image can't be read.
    #[error("can't read the vdso of task {pid} out of its image")]
    Image {
        /// The task.
        pid: Pid,
        /// Cause.
        source: Errno,
    },
    /// The redirected code can't be kept.
    #[error("can't make a memory file for the vdso of task {pid}")]
    Redirected {
        /// The task.
        pid: Pid,
        /// Cause.
        source: Errno,
    },
    /// The task had a vdso, this kernel has none.
    #[error("task {pid} uses a vdso, and this kernel gives none (boot it with vdso=1 vdso32=1)")]
    Missing {
        /// The task.
        pid: Pid,
    },
    /// There is no free place for the new one.
    #[error("no room for the vdso of this kernel in task {pid}")]
    NoRoom {
        /// The task.
        pid: Pid,
    },
}

/// What happens to the vdso of a task.
#[derive(Debug, Default)]
pub struct VdsoPlan {
    /// The vdso of a 32-bit program, if it is one.
    ia32: Option<Arc<KernelVdso>>,
    way: Way,
}

#[derive(Debug, Default)]
enum Way {
    /// The task has none.
    #[default]
    None,
    /// All parts go to the old place, which begins here.
    Move(u64),
    /// The old code stays and leads to the new one.
    Redirect {
        /// Where the parts of the new one go.
        to: u64,
        /// The old code with its jumps.
        code: File,
        /// Where the old code stays.
        code_range: AddressRange,
        /// Its old data, which become zeros.
        data: Option<AddressRange>,
    },
}

/// The vdsos that the running kernel gives.
#[derive(Debug, Default)]
pub struct KernelVdsos {
    /// To this process and other 64-bit programs.
    pub native: Option<KernelVdso>,
    /// To 32-bit programs, if it was read.
    pub ia32: Option<Arc<KernelVdso>>,
}

/// Decides what happens to the vdso of a task. `inside` are the instruction pointers of its threads.
///
/// # Errors
/// The image's vdso can't be read, or there is no room.
pub fn plan(
    image: &MemoryImage,
    kernel: &KernelVdsos,
    hole: AddressRange,
    inside: &[u64],
    choice: VdsoChoice,
) -> Result<VdsoPlan, VdsoError> {
    let Some(code_range) = image.vdso() else {
        return Ok(VdsoPlan::default());
    };
    let pid = image.pid();
    let old = read_code(image, code_range).map_err(|source| VdsoError::Image { pid, source })?;
    let abi = elf::abi(&old);
    let ia32 = kernel.ia32.clone().filter(|_| abi == Abi::Ia32);
    let kernel = match abi {
        Abi::Native => kernel.native.as_ref(),
        Abi::Ia32 => ia32.as_deref(),
    };
    let kernel = kernel.ok_or(VdsoError::Missing { pid })?;
    if choice == VdsoChoice::ByContent && kernel.fits(image, code_range, &old) {
        let way = Way::Move(code_range.start - kernel.code_offset());
        return Ok(VdsoPlan { ia32, way });
    }
    let room = find_room(image, hole, code_range, kernel.len(), abi);
    let to = room.ok_or(VdsoError::NoRoom { pid })?;
    let new_at = to + kernel.code_offset();
    let redirected = redirect::redirect(&old, code_range.start, kernel.code(), new_at, inside);
    let code = keep(&redirected.code).map_err(|source| VdsoError::Redirected { pid, source })?;
    tracing::debug!(
        "task {pid}: vdso of another kernel redirected, {} functions keep their code",
        redirected.kept.len()
    );
    let way = Way::Redirect {
        to,
        code,
        code_range,
        data: image.vvar(),
    };
    Ok(VdsoPlan { ia32, way })
}

/// How the way of a vdso is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VdsoChoice {
    /// Move it where the code is the same, else redirect.
    #[default]
    ByContent,
    /// Always redirect, as if the image came from another kernel.
    Redirect,
}

impl VdsoPlan {
    /// Puts the vdso into place, from where the 64-bit one was parked. After everything that the task
    /// inherits and does not want is gone.
    pub fn place(&self, p: &mut Program, native: Option<&KernelVdso>, parked_at: u64) {
        if matches!(self.way, Way::None) {
            return;
        }
        if let Some(ia32) = &self.ia32 {
            ia32.exchange(p, native, parked_at);
        }
        let Some(kernel) = self.ia32.as_deref().or(native) else {
            return;
        };
        match &self.way {
            Way::None => {}
            Way::Move(to) => kernel.move_parts(p, parked_at, *to),
            Way::Redirect {
                to,
                code,
                code_range,
                data,
            } => {
                kernel.move_parts(p, parked_at, *to);
                if let Some(data) = data {
                    map_zeros(p, *data, prot::READ, "the old vvar");
                }
                let writable = prot::READ | prot::WRITE;
                map_zeros(p, *code_range, writable, "the old vdso");
                read_redirected(p, code, *code_range);
            }
        }
    }
}

fn map_zeros(p: &mut Program, range: AddressRange, prot: u32, what: &str) {
    let flags = map::PRIVATE | map::ANONYMOUS | map::FIXED_NOREPLACE;
    p.call(
        nr::MMAP,
        &[
            range.start.into(),
            range.len().into(),
            prot.into(),
            flags.into(),
            (-1).into(),
        ],
        Rule::Exact(range.start.cast_signed()),
        format!("mmap in place of {what} [{range}]"),
    );
}

fn read_redirected(p: &mut Program, code: &File, range: AddressRange) {
    let iovec = p.table(&[range.start.into(), range.len().into()]);
    p.call_retrying(
        nr::PREADV,
        &[code.as_raw_fd().into(), iovec.into(), 1u64.into()],
        Rule::Exact(range.len().cast_signed()),
        format!("reading the redirected vdso [{range}]"),
    );
    let executable = prot::READ | prot::EXEC;
    p.call(
        nr::MPROTECT,
        &[range.start.into(), range.len().into(), executable.into()],
        Rule::Exact(0),
        format!("mprotect of the old vdso [{range}]"),
    );
}

fn read_code(image: &MemoryImage, range: AddressRange) -> firn_sys::Result<Vec<u8>> {
    if range.len() > MAX_CODE_BYTES {
        return Err(Errno::EINVAL);
    }
    let mut code = vec![0; usize::try_from(range.len()).expect("checked")];
    for piece in piece::pieces_in(image.pages(), range) {
        let at = usize::try_from(piece.range.start - range.start).expect("inside");
        let len = usize::try_from(piece.len()).expect("inside");
        let file = &image.pages().files()[piece.file];
        file.read_exact_at(&mut code[at..at + len], piece.offset)?;
    }
    Ok(code)
}

fn keep(code: &[u8]) -> firn_sys::Result<File> {
    let mut file = memfd::create(c"firn-vdso", memfd::flag::CLOEXEC)?;
    file.write_all(code)?;
    Ok(file)
}

/// The free place of `len` bytes that is nearest to the old vdso, away from what grows.
fn find_room(
    image: &MemoryImage,
    hole: AddressRange,
    near: AddressRange,
    len: u64,
    abi: Abi,
) -> Option<u64> {
    const GAP: u64 = 64 << 10;
    const GROWTH: u64 = 1 << 30;
    let limit = match abi {
        Abi::Native => u64::MAX,
        Abi::Ia32 => range::IA32_END,
    };
    let mut used = image.used_ranges();
    used.push(hole);
    for vma in image.vmas() {
        if vma.has_flag(map::GROWSDOWN) {
            used.push(AddressRange::new(
                vma.range.start.saturating_sub(GROWTH),
                vma.range.end,
            ));
        } else if vma.is(status::HEAP) {
            used.push(AddressRange::new(
                vma.range.start,
                vma.range.end.saturating_add(GROWTH),
            ));
        }
    }
    let used = range::union(used);
    let free = used.windows(2).filter_map(|pair| {
        let start = pair[0].end.checked_add(GAP)?;
        let end = pair[1].start.min(limit).checked_sub(GAP)?;
        (start.checked_add(len)? <= end).then_some(AddressRange::new(start, end))
    });
    let places = free.map(|gap| match gap.end <= near.start {
        true => gap.end - len,
        false => gap.start,
    });
    places.min_by_key(|at| at.abs_diff(near.start))
}
