//! Finding a landing in the code of a stopped task: in the page where it has just been, as a rule, or in one nearby.

use firn_sys::Pid;
use firn_sys::process_vm::{self, RemoteRange};

use super::remote;
use crate::arch::{Abi, Landing};
use crate::memory::{AddressRange, IA32_END, PAGE_SIZE};

/// A page's length in bytes.
const PAGE: usize = 4096;
/// Pages of one mapping that are looked at.
const MAX_PAGES: u64 = 64;

/// Finds a landing for a thread that runs such code, in this stretch of it as near to the address as there is one, or
/// else in any other code of the task.
pub(super) fn find(tid: Pid, near: u64, code: AddressRange, abi: Abi) -> Option<Landing> {
    let usable = |landing: &Landing| abi == Abi::Native || landing.address < IA32_END;
    let anywhere = || {
        let mut ranges = remote::executable_ranges(tid).into_iter();
        ranges.find_map(|range| around(tid, range.start, range).filter(usable))
    };
    around(tid, near, code).filter(usable).or_else(anywhere)
}

/// The page that has an address.
pub(super) fn page_of(address: u64) -> AddressRange {
    let start = address & !(PAGE_SIZE - 1);
    AddressRange::new(start, start + PAGE_SIZE)
}

fn around(tid: Pid, near: u64, code: AddressRange) -> Option<Landing> {
    let middle = page_of(near).start;
    let mut bytes = [0u8; PAGE];
    let mut search = |start: u64| {
        let page = AddressRange::new(start, start.checked_add(PAGE_SIZE)?);
        if !code.covers(page) {
            return None;
        }
        let range = RemoteRange {
            address: start,
            len: PAGE,
        };
        let read = process_vm::read(tid, &[range], &mut bytes).ok()?;
        Landing::in_code(&bytes[..read], start)
    };
    search(middle).or_else(|| {
        (1..MAX_PAGES).find_map(|nth| {
            let below = middle.checked_sub(nth * PAGE_SIZE);
            let above = middle.checked_add(nth * PAGE_SIZE);
            below
                .and_then(&mut search)
                .or_else(|| above.and_then(&mut search))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_one_near_its_code_and_one_elsewhere() {
        let me = Pid::this();
        let ranges = remote::executable_ranges(me);
        let here = u64::try_from(around as *const () as usize).unwrap();
        let code = ranges.iter().find(|range| range.contains(here)).unwrap();
        let found = find(me, here, *code, Abi::Native).unwrap();
        assert!(code.contains(found.address));
        let mut bytes = [0u8; 2];
        let range = RemoteRange {
            address: found.address,
            len: 2,
        };
        process_vm::read(me, &[range], &mut bytes).unwrap();
        assert_eq!(bytes, found.bytes);
        let nowhere = page_of(0);
        let elsewhere = find(me, 0, nowhere, Abi::Native).unwrap();
        let holds = |range: &AddressRange| range.contains(elsewhere.address);
        assert!(ranges.iter().any(holds));
    }
}
