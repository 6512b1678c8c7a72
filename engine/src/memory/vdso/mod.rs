//! The vdso: code and data that the kernel lends to every task.
//!
//! A restored task gets the running kernel's vdso at the old address when the code is the same, byte
//! for byte, and lies behind its data (vvar, vvar_vclock) at the same distance; how many parts there
//! are and how large they are is the kernel's business. Otherwise the old code stays as ordinary
//! memory, because return addresses and looked-up functions point into it; its entry points jump to
//! the new vdso, which is put somewhere else.

pub mod elf;
pub mod redirect;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use firn_sys::mm::{map, prot, remap};
use firn_sys::process_vm::{self, RemoteRange};
use firn_sys::{Errno, Pid, memfd, nr, procfs};

use super::image::MemoryImage;
use super::piece;
use super::range::{self, AddressRange};
use super::smaps;
use super::vma::status;
use crate::program::{Program, Rule};

/// A vdso of more pages than this is none.
const MAX_CODE_BYTES: u64 = 1 << 20;

/// Failure to look at a vdso.
#[derive(Debug, thiserror::Error)]
pub enum VdsoError {
    /// The own one can't be read.
    #[error("can't read the vdso of this process")]
    Own(#[source] Errno),
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
    #[error("task {pid} uses a vdso, and this kernel gives none (boot it with vdso=1)")]
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

/// The running kernel's vdso, as this process has it.
#[derive(Debug, Clone)]
pub struct KernelVdso {
    /// vvar, vvar_vclock, vdso: all parts, ascending.
    parts: Vec<AddressRange>,
    /// The part with the code.
    code_range: AddressRange,
    code: Vec<u8>,
}

impl KernelVdso {
    /// Finds and reads the own vdso; None where the kernel gives none.
    ///
    /// # Errors
    /// The own memory map can't be read.
    pub fn read() -> Result<Option<KernelVdso>, VdsoError> {
        let text = procfs::read("/proc/self/maps").map_err(|e| VdsoError::Own(e.into()))?;
        let mappings = smaps::parse(&text).map_err(|_| VdsoError::Own(Errno::EINVAL))?;
        let names: [&[u8]; 3] = [b"[vvar]", b"[vvar_vclock]", b"[vdso]"];
        let mine = mappings
            .iter()
            .filter(|mapping| names.contains(&mapping.name.as_slice()));
        let parts: Vec<AddressRange> = mine.map(|mapping| mapping.range).collect();
        let code = mappings.iter().find(|mapping| mapping.name == b"[vdso]");
        let Some(code_range) = code.map(|mapping| mapping.range) else {
            return Ok(None);
        };
        if code_range.len() > MAX_CODE_BYTES {
            return Err(VdsoError::Own(Errno::EINVAL));
        }
        let len = usize::try_from(code_range.len()).expect("checked");
        let mut code = vec![0; len];
        let range = RemoteRange {
            address: code_range.start,
            len,
        };
        match process_vm::read(Pid::this(), &[range], &mut code) {
            Ok(read) if read == len => {}
            Ok(_) => return Err(VdsoError::Own(Errno::EFAULT)),
            Err(error) => return Err(VdsoError::Own(error)),
        }
        Ok(Some(KernelVdso {
            parts,
            code_range,
            code,
        }))
    }

    /// Its code.
    pub fn code(&self) -> &[u8] {
        &self.code
    }

    /// Bytes from the first to the last part: so much has to be free where it is parked.
    pub fn len(&self) -> u64 {
        self.block().len()
    }

    /// Never true: there is at least the code.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Moves all parts from where this process has them to `at`, in a task just forked from it.
    ///
    /// Nothing else may use the addresses; the parts keep their distances.
    pub fn park(&self, p: &mut Program, at: u64) {
        self.move_parts(p, self.block().start, at);
    }

    fn move_parts(&self, p: &mut Program, from: u64, to: u64) {
        for part in &self.parts {
            let offset = part.start - self.block().start;
            let (source, target, len) = (from + offset, to + offset, part.len());
            let what = match *part == self.code_range {
                true => "vdso",
                false => "vvar",
            };
            let flags = remap::MAYMOVE | remap::FIXED;
            p.call(
                nr::MREMAP,
                &[
                    source.into(),
                    len.into(),
                    len.into(),
                    flags.into(),
                    target.into(),
                ],
                Rule::Exact(target.cast_signed()),
                format!("mremap of {what} to [{target:#x}]"),
            );
        }
    }

    fn block(&self) -> AddressRange {
        let first = self.parts.first().expect("there is at least the code");
        let last = self.parts.last().expect("there is at least the code");
        AddressRange::new(first.start, last.end)
    }

    fn code_offset(&self) -> u64 {
        self.code_range.start - self.block().start
    }

    /// Whether it can simply take the place of the image's.
    fn fits(&self, image: &MemoryImage, code_range: AddressRange, code: &[u8]) -> bool {
        let data = AddressRange::new(
            code_range.start.wrapping_sub(self.code_offset()),
            code_range.start,
        );
        let has_data = !data.is_empty();
        let is_in_order = self.code_range.end == self.block().end;
        let data_fits = match image.vvar() {
            Some(vvar) => vvar == data,
            None => !has_data,
        };
        is_in_order && data_fits && code == self.code
    }
}

/// What happens to the vdso of a task.
#[derive(Debug, Default)]
pub enum VdsoPlan {
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

/// Decides what happens to the vdso of a task. `inside` are the instruction pointers of its threads.
///
/// # Errors
/// The image's vdso can't be read, or there is no room.
pub fn plan(
    image: &MemoryImage,
    kernel: Option<&KernelVdso>,
    hole: AddressRange,
    inside: &[u64],
    choice: VdsoChoice,
) -> Result<VdsoPlan, VdsoError> {
    let Some(code_range) = image.vdso() else {
        return Ok(VdsoPlan::None);
    };
    let pid = image.pid();
    let kernel = kernel.ok_or(VdsoError::Missing { pid })?;
    let old = read_code(image, code_range).map_err(|source| VdsoError::Image { pid, source })?;
    if choice == VdsoChoice::ByContent && kernel.fits(image, code_range, &old) {
        return Ok(VdsoPlan::Move(code_range.start - kernel.code_offset()));
    }
    let to = find_room(image, hole, code_range, kernel.len()).ok_or(VdsoError::NoRoom { pid })?;
    let new_at = to + kernel.code_offset();
    let redirected = redirect::redirect(&old, code_range.start, &kernel.code, new_at, inside);
    let code = keep(&redirected.code).map_err(|source| VdsoError::Redirected { pid, source })?;
    tracing::debug!(
        "task {pid}: vdso of another kernel redirected, {} functions keep their code",
        redirected.kept.len()
    );
    Ok(VdsoPlan::Redirect {
        to,
        code,
        code_range,
        data: image.vvar(),
    })
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
    /// Puts the vdso into place, from where it was parked. After everything that the task inherits and
    /// does not want is gone.
    pub fn place(&self, p: &mut Program, kernel: &KernelVdso, parked_at: u64) {
        match self {
            VdsoPlan::None => {}
            VdsoPlan::Move(to) => kernel.move_parts(p, parked_at, *to),
            VdsoPlan::Redirect {
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
fn find_room(image: &MemoryImage, hole: AddressRange, near: AddressRange, len: u64) -> Option<u64> {
    const GAP: u64 = 64 << 10;
    const GROWTH: u64 = 1 << 30;
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
        let end = pair[1].start.checked_sub(GAP)?;
        (start.checked_add(len)? <= end).then_some(AddressRange::new(start, end))
    });
    let places = free.map(|gap| match gap.end <= near.start {
        true => gap.end - len,
        false => gap.start,
    });
    places.min_by_key(|at| at.abs_diff(near.start))
}
