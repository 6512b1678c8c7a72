//! What the kernel does for 32-bit programs.

use std::arch::asm;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::ptr::without_provenance_mut;

use super::{IdleChild, clone_child, in_child};
use crate::{Errno, Pid, Result};

const ARCH_MAP_VDSO_32: i32 = 0x2002;
/// getpid of 32-bit code.
const IA32_GETPID: i64 = 20;
/// Somewhere below 4 GiB where nothing is mapped as a rule; the kernel takes it for a wish.
const WANTED: u64 = 0x4000_0000;

/// Makes a 32-bit call in a child.
///
/// # Errors
/// EFAULT: the kernel was built without CONFIG_IA32_EMULATION or told not to have it, and killed the child.
pub fn ia32_calls() -> Result<()> {
    // SAFETY: a system call that changes nothing.
    unsafe {
        in_child(|| {
            if ia32_getpid() > 0 {
                Ok(())
            } else {
                Err(Errno::ENOSYS)
            }
        })
    }
}

fn ia32_getpid() -> i64 {
    let result: i64;
    // SAFETY: the call takes no arguments; the registers that the entry of 32-bit calls clears are named.
    unsafe {
        asm!(
            "int 0x80",
            inlateout("rax") IA32_GETPID => result,
            lateout("r8") _,
            lateout("r9") _,
            lateout("r10") _,
            lateout("r11") _,
        );
    }
    result
}

/// Makes a child that has the vdso of 32-bit programs instead of the own one, whose areas `(start, length)`
/// are given.
///
/// # Errors
/// EINVAL: the kernel has none (CONFIG_IA32_EMULATION, CONFIG_CHECKPOINT_RESTORE).
pub fn with_ia32_vdso(own: &[(u64, u64)]) -> Result<IdleChild> {
    let mut areas = [(0usize, 0usize); 8];
    for (slot, (start, len)) in areas.iter_mut().zip(own) {
        let to_usize = |value: u64| usize::try_from(value).map_err(|_| Errno::EINVAL);
        *slot = (to_usize(*start)?, to_usize(*len)?);
    }
    let (reader, writer) = crate::pipe::create()?;
    let report = writer.as_raw_fd();
    // SAFETY: the child makes system calls only and has no use for its vdso.
    let pid: Pid = unsafe {
        clone_child(|| {
            for (start, len) in areas.iter().filter(|(_, len)| *len > 0) {
                libc::munmap(without_provenance_mut(*start), *len);
            }
            let mapped = libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_32, WANTED);
            let errno = Errno::check(mapped).err().map_or(0, Errno::raw);
            let byte = u8::try_from(errno).unwrap_or(u8::MAX);
            libc::write(report, (&raw const byte).cast(), 1);
            loop {
                libc::pause();
            }
        })
    }?;
    let child = IdleChild { pid };
    drop(writer);
    let mut errno = [0];
    std::fs::File::from(reader).read_exact(&mut errno)?;
    match errno[0] {
        0 => Ok(child),
        errno => Err(Errno::from_raw(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_gets_the_32_bit_vdso() {
        if ia32_calls().is_err() {
            eprintln!("skipped: this kernel runs no 32-bit programs");
            return;
        }
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let area = |line: &str| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let parse = |hex| u64::from_str_radix(hex, 16).ok();
            let is_vdso = line.ends_with("[vdso]") || line.contains("[vvar");
            is_vdso.then_some((parse(start)?, parse(end)? - parse(start)?))
        };
        let own: Vec<_> = maps.lines().filter_map(area).collect();
        let child = with_ia32_vdso(&own).unwrap();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.pid())).unwrap();
        let vdso = maps
            .lines()
            .find_map(|line| area(line).filter(|_| line.ends_with("[vdso]")));
        assert!(vdso.is_some_and(|(start, _)| start < 1 << 32), "{maps}");
    }
}
