//! The image against memory: what is written comes back, also after being closed.

use super::*;
use crate::recorder::MemoryFile;

const CLUSTER: u32 = 64 << 10;

fn fresh(clusters: u64) -> MemoryFile {
    let file = MemoryFile::default();
    create(
        &file,
        clusters * u64::from(CLUSTER),
        CLUSTER,
        Preallocation::None,
    )
    .unwrap();
    file
}

fn open(file: &MemoryFile) -> ExpandedImage {
    ExpandedImage::open(Box::new(file.clone()), Access::ReadWrite, Unclosed::Refuse).unwrap()
}

fn findings(file: &MemoryFile) -> Vec<&'static str> {
    let checked = check(file, Repair::No).unwrap();
    checked.findings.iter().map(Finding::name).collect()
}

fn poke(file: &MemoryFile, at: u64, value: u32) {
    file.write_at(&value.to_le_bytes(), at).unwrap();
}

fn small(number: u32) -> u8 {
    u8::try_from(number).unwrap()
}

fn first_byte(image: &ExpandedImage, cluster: u32) -> u8 {
    let mut byte = [0];
    image.read(cluster, 0, &mut byte).unwrap();
    byte[0]
}

#[test]
fn clusters_come_back_after_closing() {
    let file = fresh(20);
    let image = open(&file);
    image.store(7, 5, &[1, 2, 3]).unwrap();
    image.store(0, 0, &vec![9; 64 << 10]).unwrap();
    image.overwrite(7, 6, &[8]).unwrap();
    assert_eq!(
        findings(&file),
        ["not-closed", "tail-leak"],
        "while it is open"
    );
    image.close().unwrap();
    assert!(findings(&file).is_empty());
    assert_eq!(file.bytes().len(), 3 * 65_536);
    let again = ExpandedImage::open(Box::new(file), Access::ReadOnly, Unclosed::Refuse).unwrap();
    let mut buf = [0; 5];
    again.read(7, 4, &mut buf).unwrap();
    assert_eq!((buf, first_byte(&again, 0)), ([0, 1, 8, 3, 0], 9));
    assert_eq!(again.slot(1).unwrap(), Slot::Absent);
    assert!(matches!(
        again.store(1, 0, &[1]),
        Err(DiskError::ReadOnly { .. })
    ));
}

#[test]
fn what_was_freed_is_used_again_after_a_flush() {
    let file = fresh(20);
    let image = open(&file);
    for cluster in 0..4 {
        image.store(cluster, 0, &[7; 1000]).unwrap();
    }
    image.unmap(1).unwrap();
    image.store(10, 0, &[1]).unwrap();
    assert_eq!(image.entry(10), 5, "not before the flush");
    image.flush().unwrap();
    image.store(11, 0, &[1]).unwrap();
    assert_eq!(image.entry(11), 2);
    let mut buf = [9; 1000];
    image.read(11, 0, &mut buf).unwrap();
    assert!(
        buf[1..].iter().all(|byte| *byte == 0),
        "old bytes show through"
    );
    for cluster in [3, 10] {
        image.unmap(cluster).unwrap();
    }
    image.close().unwrap();
    assert!(findings(&file).is_empty());
    assert_eq!(file.bytes().len(), 4 * 65_536, "the end is given back");
}

#[test]
fn an_image_that_was_not_closed_is_refused_or_recovered() {
    let file = fresh(4);
    let image = open(&file);
    image.store(2, 0, &[5]).unwrap();
    image.flush().unwrap();
    image.store(3, 0, &[6]).unwrap();
    drop(image);
    let boxed = || Box::new(file.clone());
    let refused = ExpandedImage::open(boxed(), Access::ReadWrite, Unclosed::Refuse);
    assert!(matches!(refused, Err(DiskError::InUse { .. })));
    let image = ExpandedImage::open(boxed(), Access::ReadWrite, Unclosed::Recover).unwrap();
    assert_eq!((image.notes().len(), first_byte(&image, 2)), (1, 5));
    assert_eq!(image.slot(3).unwrap(), Slot::Absent, "it was never flushed");
    image.close().unwrap();
    image.reopen().unwrap();
    image.store(3, 0, &[6]).unwrap();
    image.close().unwrap();
    assert!(findings(&file).is_empty());
}

#[test]
fn a_longer_bat_moves_clusters_out_of_its_way() {
    let file = fresh(16_000);
    let image = open(&file);
    for cluster in 0..3 {
        image.store(cluster, 0, &[small(cluster) + 1]).unwrap();
    }
    image.store(15_999, 0, &[77]).unwrap();
    image.grow(40_000 * u64::from(CLUSTER)).unwrap();
    image.store(39_999, 3, &[88]).unwrap();
    let seen: Vec<u8> = [0, 1, 2, 15_999].map(|c| first_byte(&image, c)).to_vec();
    assert_eq!(seen, [1, 2, 3, 77]);
    image.close().unwrap();
    assert_eq!(findings(&file).len(), 0);
    let image = open(&file);
    let seen: Vec<u8> = [0, 1, 2, 15_999].map(|c| first_byte(&image, c)).to_vec();
    assert_eq!(
        (seen, image.size_bytes()),
        (vec![1, 2, 3, 77], 40_000 * 65_536)
    );
    assert!(image.grow(65_536).is_err());
}

#[test]
fn a_bitmap_lives_in_the_closed_image() {
    let file = fresh(100);
    let image = open(&file);
    let bitmap = DirtyBitmap::new([3; 16], image.size_bytes(), 65_536);
    bitmap.bits.set(0..1);
    bitmap.bits.set(99 * 65_536..100 * 65_536);
    assert!(image.keep_bitmap(bitmap));
    image.store(0, 0, &[1]).unwrap();
    image.close().unwrap();
    assert!(findings(&file).is_empty());
    let image = open(&file);
    let bitmap = image.take_bitmap().unwrap();
    assert_eq!((bitmap.id, bitmap.bits.count()), ([3; 16], 2));
    assert_eq!(
        (bitmap.bits.next(1), bitmap.bits.next(100)),
        (Some(99), None)
    );
    drop(image);
    let image = ExpandedImage::open(Box::new(file), Access::ReadWrite, Unclosed::Recover).unwrap();
    assert!(
        image.take_bitmap().is_none(),
        "after a crash it says nothing"
    );
}

#[test]
fn every_broken_rule_is_found_and_mended() {
    let file = fresh(20);
    let image = open(&file);
    for cluster in 0..5 {
        image.store(cluster, 0, &[small(cluster) + 1]).unwrap();
    }
    image.close().unwrap();
    let whole = file.bytes();
    let entry = |cluster: u64| 64 + 4 * cluster;
    let long = whole.len() as u64;
    type Break<'a> = &'a dyn Fn(&MemoryFile);
    let cases: [(&str, Break<'_>); 12] = [
        ("double-use", &|f| poke(f, entry(3), 1)),
        ("beyond-end", &|f| poke(f, entry(3), 6)),
        ("beyond-end", &|f| poke(f, entry(3), u32::MAX)),
        ("below-data", &|f| {
            poke(f, 48, 256);
            poke(f, entry(9), 1);
        }),
        ("slot-beyond", &|f| poke(f, entry(20), 3)),
        ("not-closed", &|f| poke(f, 44, 0x746F_6E59)),
        ("unknown-mark", &|f| poke(f, 44, 12)),
        ("length", &|f| f.set_len(long - 1).unwrap()),
        ("tail-leak", &|f| f.set_len(long + 65_536).unwrap()),
        ("entries", &|f| poke(f, 32, 19)),
        ("entries", &|f| poke(f, 32, 21)),
        ("data-start", &|f| poke(f, 48, 1)),
    ];
    for (name, break_it) in cases {
        let file = MemoryFile::of(whole.clone());
        break_it(&file);
        assert!(
            findings(&file).contains(&name),
            "{name}: {:?}",
            findings(&file)
        );
        let strict = ExpandedImage::open(
            Box::new(MemoryFile::of(file.bytes())),
            Access::ReadWrite,
            Unclosed::Refuse,
        );
        assert_eq!(strict.is_ok(), name == "tail-leak", "{name}");
        let mended = check(&file, Repair::Yes).unwrap();
        assert!(
            mended.worst() <= Some(Severity::Note),
            "{name}: {:?}",
            mended.left
        );
        let image = open(&file);
        if name == "double-use" {
            assert_eq!((first_byte(&image, 0), first_byte(&image, 3)), (1, 1));
        }
        if mended.lost.is_empty() && name != "double-use" {
            let seen: Vec<u8> = (0..5).map(|c| first_byte(&image, c)).collect();
            assert_eq!(seen, [1, 2, 3, 4, 5], "{name}");
        }
    }
}

#[test]
fn a_full_file_system_loses_nothing() {
    let file = fresh(100);
    let image = open(&file);
    image.store(0, 0, &[1]).unwrap();
    file.limit(10 * 65_536);
    let stored = (1..50).take_while(|c| image.store(*c, 0, &[small(*c)]).is_ok());
    let stored = u8::try_from(stored.count()).unwrap();
    assert!((6..10).contains(&stored), "{stored}");
    image.unmap(1).unwrap();
    image.flush().unwrap();
    image.store(60, 0, &[60]).unwrap();
    image.close().unwrap();
    let image = open(&file);
    assert_eq!((first_byte(&image, 60), first_byte(&image, 2)), (60, 2));
}

#[test]
fn a_preallocated_image_has_every_cluster() {
    let file = MemoryFile::default();
    create(&file, 10 * 65_536, CLUSTER, Preallocation::Full).unwrap();
    assert!(findings(&file).is_empty());
    let image = open(&file);
    assert_eq!(image.allocated_clusters(), 10);
    assert_eq!(first_byte(&image, 9), 0);
    for wrong in [
        (100, 65_536),
        (65_536, 65_537),
        (131_072, 32_768),
        (0, 65_536),
    ] {
        let made = create(
            &MemoryFile::default(),
            wrong.0,
            wrong.1,
            Preallocation::None,
        );
        assert!(made.is_err(), "{wrong:?}");
    }
}

#[test]
fn version_1_is_read_with_odd_clusters() {
    // 63 sectors to a cluster, clusters right behind the BAT.
    let mut header = Header::new(0, 63 * 512);
    header.version = Version::V1;
    (header.size_sectors, header.entries, header.data_start) = (10 * 63, 10, 0);
    header.flags = 0;
    let mut bytes = header.encode().to_vec();
    bytes.resize(512 + 2 * 63 * 512, 0);
    bytes[64 + 4 * 4..64 + 4 * 5].copy_from_slice(&64u32.to_le_bytes());
    bytes[64..68].copy_from_slice(&1u32.to_le_bytes());
    bytes[512] = 5;
    bytes[64 * 512 + 10] = 6;
    let file = MemoryFile::of(bytes);
    assert!(findings(&file).is_empty(), "{:?}", findings(&file));
    let image =
        ExpandedImage::open(Box::new(file.clone()), Access::ReadOnly, Unclosed::Refuse).unwrap();
    let mut byte = [0];
    image.read(4, 10, &mut byte).unwrap();
    assert_eq!((byte[0], first_byte(&image, 0)), (6, 5));
    let write = ExpandedImage::open(Box::new(file.clone()), Access::ReadWrite, Unclosed::Refuse);
    assert!(matches!(write, Err(DiskError::Refused { .. })));
    poke(&file, 64 + 4 * 4, 65);
    assert_eq!(findings(&file)[0], "misaligned");
}
