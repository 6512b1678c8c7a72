//! Sending the calls to a foreign vdso on to the one of the running kernel.

use super::elf::{self, Function};
use crate::arch;

/// What the bytes of a vdso become so that its functions lead to those of another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirected {
    /// The old vdso with jumps at its entry points.
    pub code: Vec<u8>,
    /// Names of functions that keep their own code: the new vdso lacks them, a jump does not fit, or a
    /// thread is inside the bytes that the jump takes.
    pub kept: Vec<Vec<u8>>,
}

/// Writes jumps over the entry points of the vdso `old`, which stands at `old_at`, to the functions of
/// the same name of `new`, which will stand at `new_at`. `inside` are the instruction pointers of
/// threads.
///
/// A function that keeps its own code reads data of the old kernel's format. It finds zeros there,
/// which means "no clock source", and asks the kernel by a system call.
pub fn redirect(old: &[u8], old_at: u64, new: &[u8], new_at: u64, inside: &[u64]) -> Redirected {
    let abi = elf::abi(old);
    let functions = elf::functions(old);
    let targets = elf::functions(new);
    let mut result = Redirected {
        code: old.to_vec(),
        kept: Vec::new(),
    };
    // Several names of one function follow each other and need one jump.
    for names in functions.chunk_by(|a, b| a.offset == b.offset) {
        let entry = &names[0];
        let from = old_at + entry.offset;
        let target = targets
            .iter()
            .find(|target| names.iter().any(|name| name.name == target.name));
        let code = target.and_then(|target| {
            let room = room(&functions, entry, old);
            arch::jump(abi, from, new_at + target.offset, room)
        });
        match code.filter(|code| !is_disturbed(inside, from, code.len())) {
            Some(code) => {
                let at = usize::try_from(entry.offset).expect("inside the image");
                result.code[at..at + code.len()].copy_from_slice(&code);
            }
            None => result
                .kept
                .extend(names.iter().map(|function| function.name.clone())),
        }
    }
    result
}

/// Bytes that may be overwritten from the entry point on: up to the next function, or to the end.
fn room(functions: &[Function], entry: &Function, old: &[u8]) -> u64 {
    let len = u64::try_from(old.len()).expect("lengths fit 64 bits");
    let next = functions
        .iter()
        .map(|function| function.offset)
        .find(|offset| *offset > entry.offset);
    next.unwrap_or(len).min(len) - entry.offset
}

/// Whether a thread stands behind the first of the overwritten bytes. At the first one it takes the
/// jump.
fn is_disturbed(inside: &[u64], from: u64, len: usize) -> bool {
    let end = from + u64::try_from(len).expect("a few bytes");
    inside.iter().any(|at| from < *at && *at < end)
}

#[cfg(test)]
mod tests {
    use super::super::KernelVdso;
    use super::*;

    fn function(code: &[u8], name: &[u8]) -> Function {
        let found = elf::functions(code);
        let mut named = found.into_iter().filter(|f| f.name == name);
        named.next().expect("every vdso has it")
    }

    #[test]
    fn every_function_of_a_doctored_copy_leads_to_the_real_one() {
        let Some(vdso) = KernelVdso::read().expect("own maps") else {
            eprintln!("skipped: this kernel gives no vdso");
            return;
        };
        // Another kernel's: the same functions with other code.
        let mut old = vdso.code().to_vec();
        let clock = function(&old, b"__vdso_clock_gettime");
        let at = usize::try_from(clock.offset).expect("small");
        old[at + 8] ^= 0xff;
        let (old_at, new_at) = (0x7f00_0000_0000, 0x7e00_0000_0000);
        let redirected = redirect(&old, old_at, vdso.code(), new_at, &[]);
        assert_eq!(redirected.kept, Vec::<Vec<u8>>::new());
        for function in elf::functions(&old) {
            let at = usize::try_from(function.offset).expect("small");
            let code = &redirected.code[at..at + 14];
            assert_eq!(code[..6], [0xff, 0x25, 0, 0, 0, 0]);
            assert_eq!(code[6..], (new_at + function.offset).to_le_bytes());
        }
        // The ELF header and the symbols stay readable: programs look functions up again.
        assert_eq!(elf::functions(&redirected.code), elf::functions(&old));
    }

    #[test]
    fn a_function_that_a_thread_is_entering_keeps_its_code() {
        let Some(vdso) = KernelVdso::read().expect("own maps") else {
            eprintln!("skipped: this kernel gives no vdso");
            return;
        };
        let old = vdso.code();
        let clock = function(old, b"__vdso_clock_gettime");
        let old_at = 0x7f00_0000_0000;
        let inside = [old_at + clock.offset + 4];
        let redirected = redirect(old, old_at, old, 0x7e00_0000_0000, &inside);
        assert!(redirected.kept.contains(&b"__vdso_clock_gettime".to_vec()));
        let at_entry = [old_at + clock.offset];
        let redirected = redirect(old, old_at, old, 0x7e00_0000_0000, &at_entry);
        assert!(redirected.kept.is_empty());
    }
    #[test]
    fn functions_of_32_bit_code_lead_to_those_of_the_real_one() {
        let Ok(Some(vdso)) = KernelVdso::read_ia32() else {
            eprintln!("skipped: this kernel runs no 32-bit programs");
            return;
        };
        let (old_at, new_at) = (0xf7f0_0000, 0x1000_0000);
        let redirected = redirect(vdso.code(), old_at, vdso.code(), new_at, &[]);
        let clock = function(vdso.code(), b"__vdso_clock_gettime");
        let at = usize::try_from(clock.offset).expect("small");
        assert_eq!(redirected.code[at], 0xe9);
        let distance = &redirected.code[at + 1..at + 5];
        let distance = u32::from_le_bytes(distance.try_into().expect("four bytes"));
        let from = u32::try_from(old_at + clock.offset + 5).expect("below 4 GiB");
        let to = u32::try_from(new_at + clock.offset).expect("below 4 GiB");
        assert_eq!(from.wrapping_add(distance), to);
    }
}
