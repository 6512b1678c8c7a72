//! The vdsos of the running kernel.

use firn_sys::mm::remap;
use firn_sys::process_vm::{self, RemoteRange};
use firn_sys::{Errno, Pid, nr, probe, procfs};

use super::{MAX_CODE_BYTES, VdsoError};
use crate::memory::image::MemoryImage;
use crate::memory::range::AddressRange;
use crate::memory::smaps;
use crate::program::{Program, Rule};

/// Code of arch_prctl that maps the 32-bit vdso (Linux 4.8).
const ARCH_MAP_VDSO_32: u32 = 0x2002;

/// A vdso of the running kernel, as a process has it.
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
        KernelVdso::of(Pid::this()).map_err(VdsoError::Own)
    }

    /// Finds and reads the vdso that 32-bit programs get, which a child maps for that purpose.
    ///
    /// # Errors
    /// The child can't be made, or there is no such vdso.
    pub fn read_ia32() -> Result<Option<KernelVdso>, VdsoError> {
        let own = KernelVdso::read()?;
        let parts = own.iter().flat_map(|own| &own.parts);
        let parts: Vec<(u64, u64)> = parts.map(|part| (part.start, part.len())).collect();
        let read = || {
            let child = probe::with_ia32_vdso(&parts)?;
            KernelVdso::of(child.pid())
        };
        read().map_err(VdsoError::Ia32)
    }

    fn of(pid: Pid) -> Result<Option<KernelVdso>, Errno> {
        let text = procfs::read(format!("/proc/{pid}/maps")).map_err(Errno::from)?;
        let mappings = smaps::parse(&text).map_err(|_| Errno::EINVAL)?;
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
            return Err(Errno::EINVAL);
        }
        let len = usize::try_from(code_range.len()).expect("checked");
        let mut code = vec![0; len];
        let range = RemoteRange {
            address: code_range.start,
            len,
        };
        if process_vm::read(pid, &[range], &mut code)? != len {
            return Err(Errno::EFAULT);
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

    pub(super) fn move_parts(&self, p: &mut Program, from: u64, to: u64) {
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

    /// Maps this 32-bit vdso at `at`, in place of the `parked` one: the kernel lets a task have one vdso.
    pub(super) fn exchange(&self, p: &mut Program, parked: Option<&KernelVdso>, at: u64) {
        if let Some(parked) = parked {
            let args = [at.into(), parked.len().into()];
            p.call(
                nr::MUNMAP,
                &args,
                Rule::Exact(0),
                "munmap of the 64-bit vdso",
            );
        }
        // Its result is the length of the code; where it is will show when it is moved.
        let args = [ARCH_MAP_VDSO_32.into(), at.into()];
        p.call(nr::ARCH_PRCTL, &args, Rule::Ok, "mapping the 32-bit vdso");
    }

    fn block(&self) -> AddressRange {
        let first = self.parts.first().expect("there is at least the code");
        let last = self.parts.last().expect("there is at least the code");
        AddressRange::new(first.start, last.end)
    }

    pub(super) fn code_offset(&self) -> u64 {
        self.code_range.start - self.block().start
    }

    /// Whether it can simply take the place of the image's.
    pub(super) fn fits(&self, image: &MemoryImage, code_range: AddressRange, code: &[u8]) -> bool {
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
