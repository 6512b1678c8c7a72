//! From what the kernel shows of a mapping to what an image says of it.
//!
//! | shown | status | flags |
//! |---|---|---|
//! | `[vdso]` | REGULAR, VDSO, ANON_PRIVATE | PRIVATE, ANONYMOUS |
//! | `[vvar]`, `[vvar_vclock]`, joined | REGULAR, VVAR, ANON_PRIVATE | PRIVATE, ANONYMOUS |
//! | `[vsyscall]` | VSYSCALL, ANON_PRIVATE | PRIVATE, ANONYMOUS |
//! | nameless | REGULAR, ANON_PRIVATE | PRIVATE, ANONYMOUS |
//! | `[heap]` | and HEAP | PRIVATE, ANONYMOUS |
//! | a shadow stack | and SHSTK | PRIVATE, ANONYMOUS |
//! | `[stack]` | as nameless | and GROWSDOWN |
//! | a file | REGULAR, FILE_PRIVATE or FILE_SHARED | PRIVATE or SHARED |
//! | a memory file, shared memory | and MEMFD | |
//! | a System V segment | REGULAR, ANON_SHARED, SYSVIPC | SHARED, ANONYMOUS |
//! | the ring of an AIO context | AIORING | SHARED |
//! | a part of an io_uring ring | REGULAR, FILE_SHARED and a flag of ours | SHARED |
//! | rings of a packet socket | REGULAR, SOCKET | SHARED |
//! | private huge pages | REGULAR, ANON_PRIVATE | and HUGETLB with the size |

use firn_sys::io_uring;
use firn_sys::mm::{advice, map};

use super::aio;
use super::smaps::{Mapping, VmFlags};
use super::sysv;
use super::vma::{Vma, status};

/// What stands behind a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Nothing but memory of the process.
    Memory,
    /// Something of the kernel's own: vdso, vvar, vsyscall.
    Kernel,
    /// A file with a name, or one that was deleted.
    File,
    /// A memory file or shared anonymous memory.
    SharedMemory,
    /// A System V segment.
    Segment,
    /// The ring of an asynchronous I/O context.
    AioRing,
    /// A part of an io_uring ring.
    IoUring,
    /// A socket: the rings of a packet socket, or something that is not saved.
    Socket,
    /// Nothing that is saved or restored: the page of user probes.
    Nothing,
}

/// Why a mapping can't be dumped: reason, and what to do where there is something.
pub type Refusal = (&'static str, Option<&'static str>);

/// Says what stands behind a mapping.
///
/// # Errors
/// The mapping is of a kind that can't be dumped.
pub fn backing(mapping: &Mapping, shmem_device: (u32, u32)) -> Result<Backing, Refusal> {
    let flags = mapping.flags;
    if flags.has(
        VmFlags::UFFD_MISSING
            .or(VmFlags::UFFD_MINOR)
            .or(VmFlags::UFFD_WP),
    ) {
        return Err(("it is registered with a userfaultfd", None));
    }
    let name = mapping.name.as_slice();
    match name {
        b"[vdso]" | b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]" => return Ok(Backing::Kernel),
        b"[uprobes]" => return Ok(Backing::Nothing),
        _ => {}
    }
    if mapping.inode == 0 && !name.starts_with(b"/") {
        return device_free(flags, Backing::Memory);
    }
    if name == b"anon_inode:[io_uring]" {
        return io_uring_part(mapping);
    }
    if aio::is_ring(mapping) {
        return Ok(Backing::AioRing);
    }
    if name.starts_with(b"socket:[") {
        return Ok(Backing::Socket);
    }
    if let Some(refusal) = refusal_by_name(name) {
        return Err(refusal);
    }
    if sysv::is_segment(mapping, shmem_device) {
        return Ok(Backing::Segment);
    }
    let is_kernel_mount = mapping.device.0 == 0;
    if flags.has(VmFlags::HUGETLB) && is_kernel_mount && name.starts_with(b"/anon_hugepage") {
        return Ok(match mapping.is_shared {
            true => Backing::SharedMemory,
            false => Backing::Memory,
        });
    }
    let hugetlb_memfd = flags.has(VmFlags::HUGETLB) && name.starts_with(b"/memfd:");
    if mapping.device == shmem_device || hugetlb_memfd && is_kernel_mount {
        return Ok(Backing::SharedMemory);
    }
    device_free(flags, Backing::File)
}

fn device_free(flags: VmFlags, backing: Backing) -> Result<Backing, Refusal> {
    if flags.has(VmFlags::PFN_MAP.or(VmFlags::IO)) {
        return Err(("it is memory of a device", None));
    }
    Ok(backing)
}

const NO_IO_URING: &str = "let the program close its ring before the dump, or start it without io_uring, \
                           such as with UV_USE_IO_URING=0 for Node";

/// What belongs to a ring is mapped from its beginning: only so can it be mapped again.
fn io_uring_part(mapping: &Mapping) -> Result<Backing, Refusal> {
    let parts = [
        io_uring::OFFSET_RINGS,
        io_uring::OFFSET_COMPLETIONS,
        io_uring::OFFSET_ENTRIES,
    ];
    if parts.contains(&mapping.offset) {
        return Ok(Backing::IoUring);
    }
    let reason = match mapping.offset < io_uring::OFFSET_BUFFERS {
        true => "a part of an io_uring ring's memory is mapped without its beginning",
        false => "it is a ring of buffers that the program provides to io_uring",
    };
    Err((reason, Some(NO_IO_URING)))
}

fn refusal_by_name(name: &[u8]) -> Option<Refusal> {
    let starts = |prefix: &str| name.starts_with(prefix.as_bytes());
    let refusal: Refusal = if starts("anon_inode:[perf_event]") {
        (
            "performance counters are not supported",
            Some("stop the profiler before the dump"),
        )
    } else if starts("anon_inode:") {
        ("mappings of this kernel object are not supported", None)
    } else if starts("/secretmem") {
        ("secret memory can't be read from outside", None)
    } else if starts("/dev/") && !starts("/dev/zero") && !starts("/dev/shm/") {
        ("mappings of devices are not supported", None)
    } else {
        return None;
    };
    Some(refusal)
}

/// Describes a mapping for an image. The file id is still 0.
pub fn describe(mapping: &Mapping, backing: Backing) -> Vma {
    let mut vma = Vma {
        range: mapping.range,
        offset: 0,
        shmid: 0,
        prot: mapping.prot,
        flags: flags(mapping),
        status: status::REGULAR,
        advice: advice_bits(mapping.flags),
        open_flags: None,
        lock_on_fault: mapping.flags.has(VmFlags::LOCK_ON_FAULT),
        is_sealed: mapping.flags.has(VmFlags::SEALED),
        is_ring: backing == Backing::IoUring,
    };
    match backing {
        Backing::Memory | Backing::Nothing => {
            vma.flags |= map::ANONYMOUS;
            vma.status |= status::ANON_PRIVATE;
            if mapping.name == b"[heap]" {
                vma.status |= status::HEAP;
            }
            if mapping.flags.has(VmFlags::SHADOW_STACK) {
                vma.status |= status::SHSTK;
            }
        }
        Backing::Kernel => describe_kernel(mapping, &mut vma),
        Backing::AioRing => vma.status = status::AIORING,
        Backing::Socket => {
            vma.offset = mapping.offset;
            vma.status |= status::SOCKET;
        }
        Backing::Segment => {
            vma.offset = mapping.offset;
            vma.flags |= map::ANONYMOUS;
            vma.status |= status::ANON_SHARED | status::SYSVIPC;
            vma.open_flags = Some(open_flags(mapping));
        }
        Backing::File | Backing::SharedMemory | Backing::IoUring => {
            vma.offset = mapping.offset;
            vma.status |= match mapping.is_shared {
                true => status::FILE_SHARED,
                false => status::FILE_PRIVATE,
            };
            if backing == Backing::SharedMemory {
                vma.status |= status::MEMFD;
            }
            vma.open_flags = Some(open_flags(mapping));
        }
    }
    if vma.has_flag(map::DROPPABLE) {
        // Both come with droppable memory and can't be given to it.
        vma.advice &= !(1 << advice::WIPEONFORK | 1 << advice::DONTDUMP);
        vma.flags &= !(map::PRIVATE | map::NORESERVE);
        vma.lock_on_fault = false;
    }
    vma
}

fn describe_kernel(mapping: &Mapping, vma: &mut Vma) {
    vma.flags |= map::ANONYMOUS;
    vma.status = match mapping.name.as_slice() {
        b"[vsyscall]" => status::VSYSCALL | status::ANON_PRIVATE,
        b"[vdso]" => status::REGULAR | status::VDSO | status::ANON_PRIVATE,
        _ => status::REGULAR | status::VVAR | status::ANON_PRIVATE,
    };
}

/// Joins neighbours that are one thing to an image: vvar and vvar_vclock.
pub fn join_vvar(vmas: &mut Vec<Vma>) {
    vmas.dedup_by(|next, last| {
        let join =
            next.is(status::VVAR) && last.is(status::VVAR) && last.range.end == next.range.start;
        if join {
            last.range.end = next.range.end;
            last.advice |= next.advice;
        }
        join
    });
}

fn flags(mapping: &Mapping) -> u32 {
    let vm = mapping.flags;
    let given = [
        (VmFlags::GROWS_DOWN, map::GROWSDOWN),
        (VmFlags::LOCKED, map::LOCKED),
        (VmFlags::NO_RESERVE, map::NORESERVE),
        (VmFlags::HUGETLB, map::HUGETLB),
        (VmFlags::DROPPABLE, map::DROPPABLE),
    ];
    let mut flags = match mapping.is_shared {
        true => map::SHARED,
        false => map::PRIVATE,
    };
    for (flag, bit) in given {
        if vm.has(flag) {
            flags |= bit;
        }
    }
    if vm.has(VmFlags::HUGETLB) && mapping.page_size > 0 {
        flags |= mapping.page_size.trailing_zeros() << map::HUGE_SHIFT;
    }
    flags
}

fn advice_bits(vm: VmFlags) -> u64 {
    let given = [
        (VmFlags::SEQUENTIAL, advice::SEQUENTIAL),
        (VmFlags::RANDOM, advice::RANDOM),
        (VmFlags::DONT_COPY, advice::DONTFORK),
        (VmFlags::MERGEABLE, advice::MERGEABLE),
        (VmFlags::HUGE_PAGE, advice::HUGEPAGE),
        (VmFlags::NO_HUGE_PAGE, advice::NOHUGEPAGE),
        (VmFlags::DONT_DUMP, advice::DONTDUMP),
        (VmFlags::WIPE_ON_FORK, advice::WIPEONFORK),
    ];
    given
        .iter()
        .filter(|(flag, _)| vm.has(*flag))
        .fold(0, |bits, (_, advice)| bits | 1 << advice)
}

/// How the file has to be open for the mapping to be as it is: writable where a shared mapping may be
/// made writable, else only readable.
fn open_flags(mapping: &Mapping) -> u32 {
    const O_RDONLY: u32 = 0;
    const O_RDWR: u32 = 2;
    match mapping.is_shared && mapping.flags.has(VmFlags::MAY_WRITE) {
        true => O_RDWR,
        false => O_RDONLY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::smaps;

    const SHMEM: (u32, u32) = (0, 1);

    fn one(text: &str) -> (Mapping, Result<Backing, Refusal>) {
        let mapping = smaps::parse(text.as_bytes()).expect("text").remove(0);
        let backing = backing(&mapping, SHMEM);
        (mapping, backing)
    }

    fn described(text: &str) -> Vma {
        let (mapping, backing) = one(text);
        describe(&mapping, backing.expect("dumpable"))
    }

    #[test]
    fn gives_the_numbers_that_images_have() {
        let cases = [
            (
                "1000-2000 r--p 0 fe:00 7 /bin/x\nVmFlags: rd mr mw me\n",
                0x41,
                0x2,
            ),
            (
                "1000-2000 r--s 0 fe:00 7 /etc/x\nVmFlags: rd sh mr me ms\n",
                0x81,
                0x1,
            ),
            ("1000-2000 rw-p 0 00:00 0 \nVmFlags: rd wr\n", 0x201, 0x22),
            (
                "1000-2000 rw-p 0 00:00 0 [heap]\nVmFlags: rd wr\n",
                0x221,
                0x22,
            ),
            (
                "1000-2000 rw-p 0 00:00 0 [stack]\nVmFlags: rd wr gd\n",
                0x201,
                0x122,
            ),
            (
                "1000-2000 rw-p 0 00:00 0 \nVmFlags: rd wr mr mw me ss\n",
                0x8201,
                0x22,
            ),
            (
                "1000-2000 r-xp 0 00:00 0 [vdso]\nVmFlags: rd ex\n",
                0x209,
                0x22,
            ),
            (
                "1000-2000 r--p 0 00:00 0 [vvar]\nVmFlags: rd io de dd pf\n",
                0x1201,
                0x22,
            ),
            (
                "1000-2000 --xp 0 00:00 0 [vsyscall]\nVmFlags: ex\n",
                0x204,
                0x22,
            ),
            (
                "1000-2000 rw-s 0 00:01 9 /dev/zero (deleted)\nVmFlags: rd wr sh mw\n",
                0x4081,
                0x1,
            ),
            (
                "200000-400000 rw-p 0 00:10 9 /anon_hugepage (deleted)\n\
                 KernelPageSize: 2048 kB\nVmFlags: rd wr ht\n",
                0x201,
                0x22 | 0x40000 | 21 << 26,
            ),
        ];
        for (text, status, flags) in cases {
            let vma = described(text);
            assert_eq!((vma.status, vma.flags), (status, flags), "{text}");
        }
    }

    #[test]
    fn keeps_advice_and_open_flags() {
        let vma =
            described("1000-2000 rw-s 1000 fe:00 9 /tmp/f\nVmFlags: rd wr sh mw dc dd lo lf\n");
        assert_eq!(vma.advice, 1 << 10 | 1 << 16);
        assert_eq!((vma.open_flags, vma.offset), (Some(2), 0x1000));
        assert!(vma.lock_on_fault && vma.has_flag(map::LOCKED));
        let vma = described("1000-2000 r--s 0 fe:00 9 /tmp/f\nVmFlags: rd sh\n");
        assert_eq!(vma.open_flags, Some(0));
    }

    #[test]
    fn refuses_what_it_cannot_restore() {
        for name in [
            "anon_inode:[perf_event]",
            "/dev/mem",
            "/secretmem (deleted)",
        ] {
            let (_, backing) = one(&format!("1000-2000 rw-s 0 00:05 9 {name}\n"));
            assert!(backing.is_err(), "{name}");
        }
        let (_, backing) = one("1000-2000 rw-p 0 00:00 0 \nVmFlags: rd wr um\n");
        assert!(backing.is_err());
        let (_, backing) = one("1000-2000 rw-s 0 fe:05 9 /tmp/x\nVmFlags: io pf\n");
        assert!(backing.is_err());
        let (_, backing) = one("1000-2000 rw-s 0 00:14 9 /dev/shm/segment\nVmFlags: rd\n");
        assert_eq!(backing, Ok(Backing::File));
    }

    #[test]
    fn rings_of_sockets_are_what_criu_says_of_them() {
        let vma = described("1000-3000 rw-s 0 00:09 44 socket:[44]\nVmFlags: rd wr sh mm\n");
        assert_eq!(vma.status, status::REGULAR | status::SOCKET);
        assert_eq!((vma.flags, vma.open_flags), (map::SHARED, None));
        assert!(!vma.has_own_pages() && vma.has_object());
    }

    #[test]
    fn a_segment_is_told_by_name_and_device() {
        let text = "1000-2000 r--s 0 00:01 9 /SYSV0000002a (deleted)\nVmFlags: rd sh mr\n";
        let vma = described(text);
        assert_eq!((vma.status, vma.flags), (0x501, 0x21));
        assert_eq!(vma.open_flags, Some(0));
        let (_, other) = one("1000-2000 rw-s 0 fe:05 9 /SYSV0000002a\nVmFlags: rd\n");
        assert_eq!(other, Ok(Backing::File));
    }

    #[test]
    fn droppable_memory_has_no_private_flag() {
        let vma = described("1000-2000 rw-p 0 00:00 0 \nVmFlags: rd wr nr wf dd dp\n");
        assert_eq!(
            (vma.flags, vma.advice),
            (map::DROPPABLE | map::ANONYMOUS, 0)
        );
        assert!(!vma.has_own_pages());
    }

    #[test]
    fn joins_the_parts_of_vvar() {
        let text = "1000-5000 r--p 0 00:00 0 [vvar]\nVmFlags: dd\n\
                    5000-7000 r--p 0 00:00 0 [vvar_vclock]\nVmFlags: dd\n\
                    7000-9000 r-xp 0 00:00 0 [vdso]\n";
        let mut vmas: Vec<Vma> = smaps::parse(text.as_bytes())
            .expect("text")
            .iter()
            .map(|m| describe(m, backing(m, SHMEM).expect("dumpable")))
            .collect();
        join_vvar(&mut vmas);
        assert_eq!(vmas.len(), 2);
        assert_eq!((vmas[0].range.start, vmas[0].range.end), (0x1000, 0x7000));
    }
}
