//! Memory of real tasks, dumped and rebuilt beside the original, which is still there to compare with.
//!
//! The originals are children that run syscall programs, so that their address spaces hold exactly what
//! the test puts there.

mod rebuilt;
mod victim;

use firn_engine::memory::{AddressRange, VdsoChoice};
use firn_sys::mm::{advice, map, prot};
use firn_sys::{nr, process_vm};

use rebuilt::Rebuilt;
use victim::{Mapping, PAGE, Victim, page};

const RW: u32 = prot::READ | prot::WRITE;
const ANONYMOUS: u32 = map::PRIVATE | map::ANONYMOUS;

fn anonymous(start: u64, nr_pages: u64) -> Mapping {
    Mapping {
        range: AddressRange::new(start, start + nr_pages * PAGE),
        prot: RW,
        flags: ANONYMOUS,
        fd: -1,
    }
}

#[test]
fn private_memory_comes_back_with_flags_and_contents() {
    let at = 0x30_0000_0000;
    let kinds = [
        anonymous(at, 16),
        Mapping {
            flags: ANONYMOUS | map::NORESERVE,
            ..anonymous(at + 0x10_0000, 4)
        },
        Mapping {
            flags: ANONYMOUS | map::STACK,
            ..anonymous(at + 0x20_0000, 4)
        },
        Mapping {
            flags: ANONYMOUS | map::GROWSDOWN,
            ..anonymous(at + 0x80_0000, 4)
        },
        Mapping {
            prot: prot::READ,
            ..anonymous(at + 0x90_0000, 4)
        },
        Mapping {
            prot: 0,
            ..anonymous(at + 0xa0_0000, 4)
        },
    ];
    let mut victim = Victim::spawn(&kinds, |_| {});
    for mapping in &kinds {
        victim.write(mapping.range.start + PAGE, &page(mapping.range.start));
    }
    victim.write(at + 7 * PAGE, &page(7));
    let dumped = victim.dump();
    let rebuilt = Rebuilt::of(&dumped, VdsoChoice::ByContent);
    rebuilt.assert_same_maps(&dumped);
    rebuilt.assert_same_contents(&dumped);
    // Pages that were never touched are not there now.
    assert_eq!(rebuilt.resident(at), 2);
}

#[test]
fn protection_changed_after_writing_comes_back() {
    let at = 0x31_0000_0000;
    let kinds = [anonymous(at, 8)];
    let range = kinds[0].range;
    let mut victim = Victim::spawn(&kinds, |_| {});
    for n in 0..8 {
        victim.write(at + n * PAGE, &page(n));
    }
    drop(victim);
    let mut victim = Victim::spawn(&kinds, |p| {
        let args = [(at + 2 * PAGE).into(), (2 * PAGE).into(), 0u32.into()];
        p.call(nr::MPROTECT, &args, firn_engine::program::Rule::Ok, "hide");
    });
    victim.write(range.start, &page(1));
    victim.write(range.start + 2 * PAGE, &page(2));
    let dumped = victim.dump();
    let rebuilt = Rebuilt::of(&dumped, VdsoChoice::ByContent);
    rebuilt.assert_same_maps(&dumped);
    rebuilt.assert_same_contents(&dumped);
}

#[test]
fn advice_locks_and_guards_come_back() {
    let at = 0x32_0000_0000;
    let kinds: Vec<Mapping> = (0..8).map(|n| anonymous(at + n * 0x10_0000, 8)).collect();
    let advices = [
        advice::DONTFORK,
        advice::DONTDUMP,
        advice::WIPEONFORK,
        advice::HUGEPAGE,
        advice::NOHUGEPAGE,
        advice::GUARD_INSTALL,
    ];
    let mut victim = Victim::spawn(&kinds, |p| {
        use firn_engine::program::Rule;
        for (kind, advice) in kinds.iter().zip(advices) {
            // Guards take two pages out of the middle.
            let (start, len) = match advice {
                advice::GUARD_INSTALL => (kind.range.start + 2 * PAGE, 2 * PAGE),
                _ => (kind.range.start, kind.range.len()),
            };
            let args = [start.into(), len.into(), advice.into()];
            p.call(nr::MADVISE, &args, Rule::Exact(0), "advise");
        }
        let locked = kinds[6].range;
        let args = [locked.start.into(), locked.len().into()];
        p.call(nr::MLOCK, &args, Rule::Exact(0), "lock");
        let later = kinds[7].range;
        let args = [later.start.into(), later.len().into(), 1u32.into()];
        p.call(nr::MLOCK2, &args, Rule::Exact(0), "lock on fault");
    });
    for kind in &kinds {
        victim.write(kind.range.start, &page(kind.range.start));
    }
    let dumped = victim.dump();
    let rebuilt = Rebuilt::of(&dumped, VdsoChoice::ByContent);
    rebuilt.assert_same_maps(&dumped);
    rebuilt.assert_same_contents(&dumped);
    let guard = kinds[5].range.start + 2 * PAGE;
    let mut byte = [0];
    let range = process_vm::RemoteRange {
        address: guard,
        len: 1,
    };
    let read = process_vm::read(rebuilt.pid(), &[range], &mut byte);
    assert_eq!(
        read,
        Err(firn_sys::Errno::EFAULT),
        "the guard region guards"
    );
}

#[test]
fn files_and_shared_memory_come_back() {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let at = 0x33_0000_0000;
    let mut file = tempfile::tempfile().expect("file");
    file.write_all(&[7u8; 16 * 4096]).expect("write");
    let memfd = firn_sys::memfd::create(c"object", 3).expect("memfd");
    memfd.set_len(64 * PAGE - 100).expect("size");
    let mapping = |start, flags, fd| Mapping {
        range: AddressRange::new(start, start + 8 * PAGE),
        prot: RW,
        flags,
        fd,
    };
    let kinds = [
        mapping(at, map::PRIVATE, file.as_raw_fd()),
        mapping(at + 0x10_0000, map::SHARED, file.as_raw_fd()),
        mapping(at + 0x20_0000, map::SHARED, memfd.as_raw_fd()),
        mapping(at + 0x30_0000, map::PRIVATE, memfd.as_raw_fd()),
        mapping(at + 0x40_0000, map::SHARED | map::ANONYMOUS, -1),
    ];
    let mut victim = Victim::spawn(&kinds, |_| {});
    for kind in &kinds {
        victim.write(kind.range.start + 3 * PAGE, &page(kind.range.start));
    }
    let dumped = victim.dump();
    let rebuilt = Rebuilt::of(&dumped, VdsoChoice::ByContent);
    rebuilt.assert_same_maps(&dumped);
    rebuilt.assert_same_contents(&dumped);
}

#[test]
fn a_foreign_vdso_leads_to_the_own_one() {
    let at = 0x34_0000_0000;
    let mut victim = Victim::spawn(&[anonymous(at, 4)], |_| {});
    victim.write(at, &page(1));
    let dumped = victim.dump();
    let rebuilt = Rebuilt::of(&dumped, VdsoChoice::Redirect);
    rebuilt.assert_vdso_redirected(&dumped);
}

#[test]
fn large_memory_is_filled_with_huge_pages() {
    let at = 0x35_0000_0000;
    let nr_pages = 80 * 256 + 3;
    let mut victim = Victim::spawn(&[anonymous(at + PAGE, nr_pages)], |_| {});
    let contents: Vec<u8> = (0..nr_pages).flat_map(page).collect();
    victim.write(at + PAGE, &contents);
    let dumped = victim.dump();
    let rebuilt = Rebuilt::of(&dumped, VdsoChoice::ByContent);
    rebuilt.assert_same_maps(&dumped);
    rebuilt.assert_same_contents(&dumped);
    assert_eq!(rebuilt.resident(at + PAGE), nr_pages);
}

#[test]
fn a_child_shares_the_pages_it_had_in_common() {
    let at = 0x36_0000_0000;
    let mut victim = Victim::spawn_with_child(&[anonymous(at, 16)]);
    for n in 0..10 {
        victim.write(at + n * PAGE, &page(n));
    }
    let child = victim.fork_child();
    // One page changes, one is new.
    victim.write_to(child, at + 3 * PAGE, &page(33));
    victim.write_to(child, at + 12 * PAGE, &page(12));
    let own = victim.child.0;
    let frames = |pid| (0..16).map(move |n| rebuilt::frame(pid, at + n * PAGE));
    let before: Vec<u64> = frames(own).chain(frames(child)).collect();
    let dumped = victim.dump_tree(child);
    let after: Vec<u64> = frames(own).chain(frames(child)).collect();
    assert_eq!(before, after, "the dump leaves shared pages shared");
    let (parent, rebuilt) = Rebuilt::of_tree(&dumped);
    // Before anything reads, which would bring the common page of zeros in.
    let shared: Vec<bool> = (0..16)
        .map(|n| {
            let own = rebuilt.frame(at + n * PAGE);
            own != 0 && own == parent.frame(at + n * PAGE)
        })
        .collect();
    let expected: Vec<bool> = (0..16).map(|n| n < 10 && n != 3).collect();
    assert_eq!(shared, expected);
    rebuilt.assert_same_contents(&dumped[1]);
    parent.assert_same_contents(&dumped[0]);
}
