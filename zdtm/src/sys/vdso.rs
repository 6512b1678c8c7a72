//! Functions of the vdso, found by name and called by address.

use std::io;
use std::time::Duration;

use super::Region;
use crate::proc::Vma;

/// The CPU this thread runs on, by the vdso where libc uses it.
pub fn cpu() -> usize {
    // SAFETY: no arguments.
    usize::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(usize::MAX)
}

/// Finds a function in the mapped vdso, wherever it lies now.
///
/// **Errors** when there is no vdso or no such function in it.
pub fn vdso_function(areas: &[Vma], name: &str) -> io::Result<usize> {
    let not_found = || io::Error::other(format!("no {name} in a vdso"));
    let vma = areas
        .iter()
        .find(|vma| vma.path == "[vdso]")
        .ok_or_else(not_found)?;
    let image = Region {
        addr: vma.start,
        len: vma.end - vma.start,
    };
    let image = image.get(0, image.len);
    let offset = symbol(&image, name).ok_or_else(not_found)?;
    Ok(vma.start + offset)
}

fn number(image: &[u8], at: usize, len: usize) -> Option<usize> {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(image.get(at..at + len)?);
    usize::try_from(u64::from_le_bytes(bytes)).ok()
}

/// Looks through the dynamic symbols of a 64-bit ELF image, by its section headers.
fn symbol(image: &[u8], wanted: &str) -> Option<usize> {
    const SHT_DYNSYM: usize = 11;
    let (table, entry_len) = (number(image, 0x28, 8)?, number(image, 0x3a, 2)?);
    let header = |index: usize| table + index * entry_len;
    let count = number(image, 0x3c, 2)?;
    let symbols = (0..count)
        .map(header)
        .find(|&at| number(image, at + 4, 4) == Some(SHT_DYNSYM))?;
    let names = number(image, header(number(image, symbols + 0x28, 4)?) + 0x18, 8)?;
    let (start, len) = (
        number(image, symbols + 0x18, 8)?,
        number(image, symbols + 0x20, 8)?,
    );
    (start..start + len).step_by(24).find_map(|at| {
        let name = names + number(image, at, 4)?;
        let name_end = name + wanted.len();
        let same =
            image.get(name..name_end)? == wanted.as_bytes() && image.get(name_end) == Some(&0);
        if same { number(image, at + 8, 8) } else { None }
    })
}

/// Calls a function of the shape of `clock_gettime` at an address.
pub fn call_clock_function(address: usize, clock: i32) -> io::Result<Duration> {
    type Function = unsafe extern "C" fn(i32, *mut libc::timespec) -> i32;
    let pointer: *const () = std::ptr::with_exposed_provenance(address);
    // SAFETY: the address is that of a vdso function of this shape.
    let function: Function = unsafe { std::mem::transmute(pointer) };
    let mut time = super::timespec(Duration::ZERO);
    // SAFETY: the time lives through the call.
    match unsafe { function(clock, &raw mut time) } {
        0 => Ok(super::duration(time)),
        error => Err(io::Error::other(format!("the vdso function gave {error}"))),
    }
}

/// Locks memory as `mlockall` does.
pub fn mlockall(flags: i32) -> io::Result<()> {
    // SAFETY: locking changes no contents.
    super::check(unsafe { libc::mlockall(flags) }).map(drop)
}
