//! Repairs that are killed: at each change of the file, in the middle of it, and with what a loss of power
//! leaves. Done once more, the image is whole, and no cluster that was sound has changed.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use firn_ploop::format::expanded::{Preallocation, Repair, Severity, check, create};
use firn_ploop::recorder::{Clock, MemoryFile};
use firn_ploop::{Access, ChainDisk, Disk, ExpandedImage, Unclosed};

const CLUSTER: u64 = 64 << 10;
const CLUSTERS: u64 = 24;
/// Where the table begins, and the mark of an image that is open.
const TABLE: usize = 64;
const MARK: usize = 44;
const OPEN: u32 = 0x746f_6e59;
/// Those that hold something.
const SOUND: [u64; 5] = [0, 2, 3, 9, 17];

fn disk(file: &MemoryFile, unclosed: Unclosed) -> ChainDisk {
    let image = ExpandedImage::open(Box::new(file.clone()), Access::ReadWrite, unclosed);
    ChainDisk::new(vec![Arc::new(image.unwrap())]).unwrap()
}

fn content(cluster: u64) -> Vec<u8> {
    let byte = u8::try_from(cluster + 1).unwrap();
    vec![byte; usize::try_from(CLUSTER).unwrap()]
}

/// A closed image.
fn whole() -> Vec<u8> {
    let file = MemoryFile::default();
    create(&file, CLUSTERS * CLUSTER, 64 << 10, Preallocation::None).unwrap();
    let disk = disk(&file, Unclosed::Refuse);
    for cluster in SOUND {
        disk.write_at(&content(cluster), cluster * CLUSTER).unwrap();
    }
    disk.close().unwrap();
    file.bytes()
}

fn entry(bytes: &[u8], cluster: usize) -> u32 {
    let at = TABLE + cluster * 4;
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn set(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// What can be wrong, and which sound clusters that costs.
type Damage = (&'static str, fn(&mut Vec<u8>), &'static [u64]);

const DAMAGES: [Damage; 6] = [
    ("double use", |bytes| double_use(bytes), &[]),
    ("out of range", |bytes| out_of_range(bytes), &[]),
    ("leak", |bytes| leak(bytes), &[9]),
    ("tail", tail, &[]),
    ("not closed", |bytes| set(bytes, MARK, OPEN), &[]),
    ("everything", everything, &[9]),
];

fn double_use(bytes: &mut [u8]) {
    let used = entry(bytes, 2);
    set(bytes, TABLE + 20 * 4, used);
}

fn out_of_range(bytes: &mut [u8]) {
    set(bytes, TABLE + 21 * 4, 9999);
}

fn leak(bytes: &mut [u8]) {
    set(bytes, TABLE + 9 * 4, 0);
}

fn tail(bytes: &mut Vec<u8>) {
    bytes.extend([7; 100_000]);
}

fn everything(bytes: &mut Vec<u8>) {
    for damage in [double_use, out_of_range, leak] {
        damage(bytes);
    }
    tail(bytes);
    set(bytes, MARK, OPEN);
}

/// Repairs what a killed repair left.
fn must_be_mended(what: &str, left: Vec<u8>, lost: &[u64]) {
    let file = MemoryFile::of(left);
    check(&file, Repair::Yes).unwrap_or_else(|error| panic!("{what}: {error}"));
    let checked = check(&file, Repair::No).unwrap();
    let worst = checked.worst();
    assert!(
        worst <= Some(Severity::Note),
        "{what}: {:?}",
        checked.findings
    );
    let disk = disk(&file, Unclosed::Refuse);
    let mut bytes = content(0);
    for cluster in SOUND.iter().filter(|cluster| !lost.contains(cluster)) {
        disk.read_at(&mut bytes, cluster * CLUSTER).unwrap();
        assert!(bytes == content(*cluster), "{what}: cluster {cluster}");
    }
}

#[test]
fn a_repair_that_is_killed_anywhere_is_done_again() {
    let mut chance = 1u64;
    let mut next = || {
        chance ^= chance << 13;
        chance ^= chance >> 7;
        chance ^= chance << 17;
        chance
    };
    for (name, damage, lost) in DAMAGES {
        let mut bytes = whole();
        damage(&mut bytes);
        let file = MemoryFile::of(bytes);
        let clock = Clock::new(AtomicUsize::new(0));
        file.record(&clock);
        check(&file, Repair::Yes).unwrap();
        let recording = file.recording();
        let last = clock.load(std::sync::atomic::Ordering::SeqCst);
        assert!(last > 0, "{name}: nothing was written");
        for moment in 0..=last {
            let sectors = recording.sectors_at(moment);
            for sectors in [0, sectors / 2] {
                let what = format!("{name}, change {moment} of {last}, {sectors} sectors of it");
                must_be_mended(&what, recording.torn(moment, sectors), lost);
            }
            for percent in [0, 50, 90] {
                let what = format!("{name}, power lost at {moment} of {last}, {percent} %");
                let left = recording.after_crash(moment, || next() % 100 < percent);
                must_be_mended(&what, left, lost);
            }
        }
        must_be_mended(name, file.bytes(), lost);
    }
}
