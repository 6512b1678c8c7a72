//! The image against memory; `tests/qemu.rs` has the other reader's opinion.

use super::*;
use crate::recorder::MemoryFile;

const CLUSTER: u64 = 64 << 10;

fn open(file: &MemoryFile) -> Qcow2Image {
    Qcow2Image::open(Box::new(file.clone()), Access::ReadWrite, Unclosed::Refuse).unwrap()
}

fn first_byte(image: &Qcow2Image, cluster: u32) -> u8 {
    let mut byte = [0];
    image.read(cluster, 0, &mut byte).unwrap();
    byte[0]
}

#[test]
fn clusters_come_back_and_zeroes_are_marked() {
    let file = MemoryFile::default();
    create(&file, 20_000 * CLUSTER, 64 << 10).unwrap();
    let image = open(&file);
    image.store(7, 5, &[1, 2, 3]).unwrap();
    image.store(19_999, 0, &[9]).unwrap();
    assert!(image.mark_zero(8).unwrap() && image.mark_zero(7).unwrap());
    image.flush().unwrap();
    image.store(7, 0, &[4]).unwrap();
    let mut buf = [9; 8];
    image.read(7, 0, &mut buf).unwrap();
    assert_eq!(buf, [4, 0, 0, 0, 0, 0, 0, 0], "old bytes show through");
    image.grow(40_000_000 * CLUSTER).unwrap();
    image.store(39_999_999, 0, &[6]).unwrap();
    image.unmap(19_999).unwrap();
    image.close().unwrap();
    let image = open(&file);
    let slots = [7, 8, 9, 19_999].map(|cluster| image.slot(cluster).unwrap());
    assert_eq!(slots, [Slot::Data, Slot::Zero, Slot::Absent, Slot::Absent]);
    assert_eq!(
        (first_byte(&image, 7), first_byte(&image, 39_999_999)),
        (4, 6)
    );
}

#[test]
fn headers_of_any_bytes_are_answered() {
    let file = MemoryFile::default();
    create(&file, 20 * CLUSTER, 64 << 10).unwrap();
    let image = open(&file);
    image.store(3, 0, &[1]).unwrap();
    image.close().unwrap();
    let whole = file.bytes();
    let mut chance = 88_172_645_463_325_252u64;
    for _ in 0..400 {
        chance ^= chance << 13;
        chance ^= chance >> 7;
        chance ^= chance << 17;
        let mut bytes = whole.clone();
        // Header, refcount table, L1 table, in turn.
        let table = [0, 0, 65_536, 3 * 65_536][usize::try_from(chance % 4).unwrap()];
        let at = table + usize::try_from(chance >> 8 & 127).unwrap();
        bytes[at] = chance.to_le_bytes()[7];
        let file = MemoryFile::of(bytes);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let opened = Qcow2Image::open(Box::new(file.clone()), access, Unclosed::Recover);
            let Ok(image) = opened else { continue };
            for cluster in 0..20 {
                // Any answer will do.
                let _ = image.slot(cluster);
                let _ = image.read(cluster, 0, &mut [0; 16]);
            }
        }
    }
}
