//! A chain over one raw file: the plainest disk there is.

use super::*;
use crate::{HostFile, RawImage};

fn raw(dir: &std::path::Path, size: u64) -> ChainDisk {
    let file = HostFile::create(&dir.join("disk")).unwrap();
    file.file().set_len(size).unwrap();
    let image = RawImage::open(Box::new(file), Access::ReadWrite, 1 << 16).unwrap();
    ChainDisk::new(vec![Arc::new(image)]).unwrap()
}

#[test]
fn a_raw_file_is_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = raw(dir.path(), 300_000);
    assert_eq!(disk.size_bytes(), 300_000);
    disk.write_at(&[7; 100_000], 65_000).unwrap();
    disk.write_zeroes(65_536, 65_536).unwrap();
    disk.flush().unwrap();
    let mut buf = vec![1; 100_002];
    disk.read_at(&mut buf, 64_999).unwrap();
    assert!(buf[0] == 0 && buf[100_001] == 0);
    assert!(buf[1..537].iter().all(|byte| *byte == 7));
    assert!(buf[537..537 + 65_536].iter().all(|byte| *byte == 0));
    assert!(buf[537 + 65_536..100_001].iter().all(|byte| *byte == 7));
    let kinds: Vec<ExtentKind> = disk
        .map(0, 300_000)
        .unwrap()
        .iter()
        .map(|e| e.kind)
        .collect();
    assert_eq!(
        kinds,
        [
            ExtentKind::Data,
            ExtentKind::Unallocated,
            ExtentKind::Data,
            ExtentKind::Unallocated
        ]
    );
    let beyond = disk.write_at(&[0; 2], 299_999);
    assert!(matches!(beyond, Err(DiskError::OutOfRange { .. })));
    disk.grow(400_000).unwrap();
    disk.write_at(&[1; 2], 299_999).unwrap();
    disk.close().unwrap();
    assert!(matches!(
        disk.write_at(&[0], 0),
        Err(DiskError::ReadOnly { .. })
    ));
}

#[test]
fn the_bitmap_remembers_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let disk = raw(dir.path(), 1 << 20);
    disk.swap_bitmap(Some(DirtyBitmap::new([1; 16], 1 << 20, 1 << 16)));
    disk.write_at(&[1], 3 << 16).unwrap();
    disk.discard(5 << 16, 1 << 16).unwrap();
    let old = disk.swap_bitmap(None).unwrap();
    assert_eq!(
        (old.bits.next(0), old.bits.next(4), old.bits.count()),
        (Some(3), Some(5), 2)
    );
}
