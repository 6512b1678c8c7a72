//! A chain over one raw file: the plainest disk there is.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::*;
use crate::format::expanded::{self, ExpandedImage, Preallocation, Unclosed};
use crate::recorder::MemoryFile;
use crate::{DirectFile, HostFile, PendingLog, RawImage};

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

/// Tells of each change of the table, and lets it wait until the gate is gone.
struct Gate {
    reached: Mutex<Sender<(u32, u32)>>,
    gate: Mutex<Receiver<()>>,
}

impl PendingLog for Gate {
    fn record(&self, cluster: u32, entry: u32) {
        self.reached.lock().unwrap().send((cluster, entry)).unwrap();
        // Ends with the other side of the gate; nothing is ever sent.
        let _ = self.gate.lock().unwrap().recv();
    }
    fn position(&self) -> u64 {
        0
    }
    fn forget(&self, _until: u64) {}
    fn entries(&self) -> Vec<(u32, u32)> {
        Vec::new()
    }
}

#[test]
fn requests_go_on_while_clusters_make_room_for_a_longer_table() {
    const CLUSTER: u32 = 1 << 16;
    let unit = u64::from(CLUSTER);
    let file = MemoryFile::default();
    expanded::create(&file, 16_000 * unit, CLUSTER, Preallocation::None).unwrap();
    let opened = ExpandedImage::open(Box::new(file), Access::ReadWrite, Unclosed::Refuse);
    let image = Arc::new(opened.unwrap());
    let disk = ChainDisk::new(vec![Arc::clone(&image) as Arc<dyn Image>]).unwrap();
    for cluster in 0..5 {
        disk.write_at(&[7; 100], cluster * unit).unwrap();
    }
    let (reached, moving) = channel();
    let (open, gate) = channel();
    image.set_log(Some(Arc::new(Gate {
        reached: Mutex::new(reached),
        gate: Mutex::new(gate),
    })));
    std::thread::scope(|scope| {
        let growing = scope.spawn(|| disk.grow(40_000 * unit));
        let (cluster, entry) = moving.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!(cluster, 0);
        assert_ne!(entry, 0, "a cluster that moves is never nowhere");
        let (done, answered) = channel();
        scope.spawn({
            let disk = &disk;
            move || {
                disk.write_at(&[8; 100], 4 * unit).unwrap();
                let mut buf = [0; 100];
                disk.read_at(&mut buf, 4 * unit).unwrap();
                done.send(buf).unwrap();
            }
        });
        let answered = answered.recv_timeout(Duration::from_secs(30));
        drop(open);
        growing.join().unwrap().unwrap();
        assert_eq!(answered.unwrap(), [8; 100]);
    });
    assert_eq!(disk.size_bytes(), 40_000 * unit);
    disk.write_at(&[9; 100], 39_999 * unit).unwrap();
    disk.flush().unwrap();
    let mut buf = [0; 100];
    for (cluster, expected) in [(0, 7), (3, 7), (4, 8), (39_999, 9)] {
        disk.read_at(&mut buf, cluster * unit).unwrap();
        assert_eq!(buf, [expected; 100]);
    }
}

/// An expanded image past the page cache; None where this directory's file system has no direct I/O.
fn direct(path: &std::path::Path, clusters: u64) -> Option<Arc<ExpandedImage>> {
    let file = HostFile::create(path).unwrap();
    expanded::create(&file, clusters << 16, 1 << 16, Preallocation::None).unwrap();
    drop(file);
    opened(path, Access::ReadWrite)
}

fn opened(path: &std::path::Path, access: Access) -> Option<Arc<ExpandedImage>> {
    let cached = HostFile::open(path, access).unwrap();
    let file = DirectFile::of(cached, access);
    let image = ExpandedImage::open(Box::new(file), access, Unclosed::Refuse).unwrap();
    if !image.knows_places() {
        eprintln!("skipped: {} has no direct I/O", path.display());
        return None;
    }
    Some(Arc::new(image))
}

/// Holds a place against what the disk reads there.
fn holds(disk: &ChainDisk, offset: u64, len: usize) {
    use std::os::unix::fs::FileExt;
    let mut wanted = vec![0; len];
    disk.read_at(&mut wanted, offset).unwrap();
    let placed = disk.place(offset, len as u64, Way::Read).unwrap();
    let mut found = crate::kernel::PageBuffer::new(len).unwrap();
    placed
        .file
        .read_exact_at(&mut found[..len], placed.offset)
        .unwrap();
    assert!(found[..len] == wanted[..]);
}

#[test]
fn a_place_is_known_where_bytes_lie_in_one_piece() {
    const UNIT: u64 = 1 << 16;
    let dir = tempfile::tempdir().unwrap();
    let Some(base) = direct(&dir.path().join("base"), 8) else {
        return;
    };
    let disk = ChainDisk::new(vec![base]).unwrap();
    for (cluster, byte) in [(5, 5), (1, 1)] {
        disk.write_at(&vec![byte; 1 << 16], cluster * UNIT).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    let base = opened(&dir.path().join("base"), Access::ReadOnly).unwrap();
    let top = direct(&dir.path().join("top"), 8).unwrap();
    let disk = ChainDisk::new(vec![base, top]).unwrap();
    disk.write_at(&[9; 4096], UNIT).unwrap();
    disk.swap_bitmap(Some(DirtyBitmap::new([1; 16], 8 * UNIT, UNIT)));
    for offset in [UNIT, UNIT + 4096, 5 * UNIT + 512] {
        holds(&disk, offset, 4096);
    }
    let is_known = |offset, len, way| disk.place(offset, len, way).is_some();
    let is_dirty = || disk.bitmap.read().unwrap().as_ref().unwrap().bits.count();
    // Nobody holds it, it goes over a border, or over the end.
    assert!(!is_known(0, 512, Way::Read) && !is_known(0, 512, Way::Write));
    assert!(!is_known(2 * UNIT - 512, 1024, Way::Read));
    assert!(!is_known(8 * UNIT, 512, Way::Read) && !is_known(u64::MAX, 512, Way::Read));
    // The base has it: to be read where it is, and to be written only after it was copied.
    assert!(!is_known(5 * UNIT, 512, Way::Write));
    assert_eq!(is_dirty(), 0, "what was refused was not written");
    assert!(is_known(UNIT + 512, 512, Way::Read));
    assert_eq!(is_dirty(), 0);
    assert!(is_known(UNIT + 512, 512, Way::Write));
    assert_eq!(is_dirty(), 1);
    // Whoever holds the cluster or the chain is not waited for.
    let held = disk.lock(1).write().unwrap();
    assert!(!is_known(UNIT, 512, Way::Read) && is_known(5 * UNIT, 512, Way::Read));
    drop(held);
    let held = disk.layers.write().unwrap();
    assert!(!is_known(UNIT, 512, Way::Read));
    drop(held);
    let held = disk.missed.write().unwrap();
    assert!(!is_known(UNIT, 512, Way::Write) && is_known(UNIT, 512, Way::Read));
    drop(held);
    disk.close().unwrap();
    assert!(!is_known(UNIT, 512, Way::Write) && is_known(UNIT, 512, Way::Read));
}

/// Something that would move a cluster.
type Mover<'a> = &'a (dyn Fn() -> Result<(), DiskError> + Sync);

#[test]
fn nothing_moves_a_place_that_is_held() {
    const UNIT: u64 = 1 << 16;
    let dir = tempfile::tempdir().unwrap();
    let Some(base) = direct(&dir.path().join("base"), 4) else {
        return;
    };
    let disk = ChainDisk::new(vec![base]).unwrap();
    let top = |name: &str| direct(&dir.path().join(name), 4).unwrap();
    let push = |name: &str| {
        let new = NewTop {
            image: top(name),
            bitmap: BitmapChange::Keep,
            commit: &mut || Ok(()),
        };
        disk.push_top(new).map(drop)
    };
    let merge = |level: usize, name: &str| {
        let lower = opened(&dir.path().join(name), Access::ReadWrite).unwrap();
        let merge = Merge {
            lower,
            progress: &mut |_, _| true,
            commit: &mut || Ok(()),
        };
        disk.merge_down(level, merge)
    };
    let movers: [(&str, Mover<'_>); 5] = [
        ("zeroes", &|| disk.write_zeroes(UNIT, UNIT)),
        ("discard", &|| disk.discard(UNIT, UNIT)),
        ("grow", &|| disk.grow(disk.size_bytes() + UNIT)),
        ("snapshot", &|| push("top")),
        ("merge", &|| merge(1, "base")),
    ];
    for (what, mover) in movers {
        disk.write_at(&vec![7; 1 << 16], UNIT).unwrap();
        let placed = disk.place(UNIT, 4096, Way::Write).unwrap();
        let is_free = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let moved = scope.spawn(|| {
                mover().unwrap();
                assert!(is_free.load(Ordering::SeqCst), "{what} did not wait");
            });
            // A mover that waits for nothing would have ended by now, on most machines.
            std::thread::sleep(Duration::from_millis(50));
            is_free.store(true, Ordering::SeqCst);
            drop(placed);
            moved.join().unwrap();
        });
    }
}
