//! Mappings that the kernel puts where it likes: those of io_uring rings.
//!
//! A ring can't be mapped at an address of one's choice, nor moved afterwards: the kernel answers EINVAL. It takes
//! the highest or lowest room that is large enough, so the old place is made the only one: all other room is filled
//! with mappings that can't be used and cost nothing, and emptied again.
//!
//! Source: linux io_uring/memmap.c, io_uring_get_unmapped_area (Linux 6.4).

use firn_sys::mm::{TASK_SIZE, map};
use firn_sys::nr;

use super::range::{self, AddressRange, PAGE_SIZE};
use super::vma::Vma;
use crate::program::{Arg, Program, Rule, Slot};

/// The lowest address that anybody may map at.
const FIRST: u64 = 0x1_0000;
/// Below it the kernel does not look when it is told so.
const FOUR_GIB: u64 = 1 << 32;
/// Tells it so.
const MAP_ABOVE4G: u32 = 0x80;
/// More than is left around the arena.
const LONGEST: u64 = 8 << 30;
const ENOMEM: i32 = 12;
const EINVAL: i32 = 22;

/// What is filled so that only `wanted` is left, in an address space in which `taken` is mapped.
fn filler(taken: &[AddressRange], wanted: &[AddressRange]) -> Vec<AddressRange> {
    let shortest = wanted.iter().map(|range| range.len()).min();
    let shortest = shortest.unwrap_or(PAGE_SIZE);
    let room = range::subtract(&[AddressRange::new(FIRST, TASK_SIZE)], taken);
    let room = room.into_iter();
    room.filter(|range| range.len() >= shortest).collect()
}

/// A part of a ring to be mapped, and from which descriptor.
pub(super) struct Part<'a> {
    pub(super) vma: &'a Vma,
    pub(super) prot: u32,
    pub(super) fd: i32,
}

/// Adds the records that map parts of rings at their places. `taken` is everything that is mapped then.
pub(super) fn map_rings(p: &mut Program, rings: &[Part<'_>], taken: &[AddressRange]) {
    if rings.is_empty() {
        return;
    }
    let wanted: Vec<AddressRange> = rings.iter().map(|part| part.vma.range).collect();
    let filler = filler(taken, &wanted);
    for range in &filler {
        fill(p, *range);
    }
    let shortest = wanted.iter().map(|range| range.len()).min();
    let rest = fill_rest(p, shortest.unwrap_or(PAGE_SIZE));
    for Part { vma, prot, fd } in rings {
        empty(p, vma.range);
        let mut flags = map::SHARED;
        if vma.range.start >= FOUR_GIB {
            flags |= MAP_ABOVE4G;
        }
        let args = [
            0.into(),
            vma.range.len().into(),
            (*prot).into(),
            flags.into(),
            (*fd).into(),
            vma.offset.into(),
        ];
        let why = format!("mmap of {} into the only room", vma.title());
        p.call(
            nr::MMAP,
            &args,
            Rule::Exact(vma.range.start.cast_signed()),
            why,
        );
    }
    for (place, len) in rest {
        let why = "emptying room beside the arena";
        // Where there was no room the place is an errno, which is no address.
        p.call(
            nr::MUNMAP,
            &[place.into(), len.into()],
            Rule::OkOr(EINVAL),
            why,
        );
    }
    for range in range::subtract(&filler, &range::union(wanted)) {
        empty(p, range);
    }
}

/// Fills what is left around the arena, whose length is not known yet: with ever shorter mappings where the kernel
/// likes, until none is as long as the shortest that is wanted.
fn fill_rest(p: &mut Program, shortest: u64) -> Vec<(Slot, u64)> {
    let mut filled = Vec::new();
    let mut len = LONGEST;
    let mut is_last = false;
    while !is_last {
        is_last = len <= shortest;
        // Room before the arena and behind it.
        for _ in 0..2 {
            let flags = map::PRIVATE | map::ANONYMOUS | map::NORESERVE | MAP_ABOVE4G;
            let args = [
                0.into(),
                len.into(),
                0.into(),
                flags.into(),
                (-1).into(),
                0.into(),
            ];
            let why = "filling room beside the arena";
            let place = p.call_to_slot(nr::MMAP, &args, Rule::OkOr(ENOMEM), why);
            filled.push((place, len));
        }
        len /= 2;
    }
    filled
}

fn fill(p: &mut Program, range: AddressRange) {
    let flags = map::PRIVATE | map::ANONYMOUS | map::NORESERVE | map::FIXED_NOREPLACE;
    let args = [
        Arg::from(range.start),
        range.len().into(),
        0.into(),
        flags.into(),
        (-1).into(),
        0.into(),
    ];
    let why = format!("filling the room [{range}]");
    p.call(nr::MMAP, &args, Rule::Exact(range.start.cast_signed()), why);
}

fn empty(p: &mut Program, range: AddressRange) {
    let args = [range.start.into(), range.len().into()];
    let why = format!("emptying the room [{range}]");
    p.call(nr::MUNMAP, &args, Rule::Exact(0), why);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_room_is_filled_that_is_large_enough() {
        let at = |start, end| AddressRange::new(start, end);
        let taken = [at(0x20000, 0x30000), at(0x31000, 0x40000)];
        let wanted = [at(0x50000, 0x52000)];
        assert_eq!(
            filler(&taken, &wanted),
            [at(FIRST, 0x20000), at(0x40000, TASK_SIZE)]
        );
        let small = [at(0x30000, 0x31000)];
        assert_eq!(filler(&taken, &small).len(), 3);
    }
}
