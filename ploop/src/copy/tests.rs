//! Copies through a pipe, under a writer, cut off, and from hostile senders.

use std::io::{Cursor, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use proptest::prelude::*;

use super::wire::{Encoder, Hello, Kind, MAX_SIZE};
use super::*;
use crate::device::Export;
use crate::tracker::{Begin, ListenerSpec};
use crate::{Access, ChainDisk, Disk, HostFile, RawImage, Storage};

const UNIT: u32 = 1 << 16;
const SIZE: u64 = 64 << 16;

fn raw_disk(path: &Path) -> Arc<dyn Disk> {
    let file = match path.exists() {
        true => HostFile::open(path, Access::ReadWrite).unwrap(),
        false => HostFile::create(path).unwrap(),
    };
    file.set_len(SIZE).unwrap();
    let image = RawImage::open(Box::new(file), Access::ReadWrite, UNIT).unwrap();
    Arc::new(ChainDisk::new(vec![Arc::new(image)]).unwrap())
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_le_bytes()[7]
        })
        .collect()
}

/// A served disk without its server.
struct Live(Arc<Export>);

impl CopySource for Live {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn unit_bytes(&self) -> u32 {
        UNIT
    }
    fn data_in(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>, CopyError> {
        OfflineSource::new(Arc::clone(self.0.disk())).data_in(range)
    }
    fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<(), CopyError> {
        self.0
            .disk()
            .read_at(buf, offset)
            .map_err(CopyError::Source)
    }
    fn track(&mut self) -> Result<(), CopyError> {
        let spec = ListenerSpec {
            name: "copy".to_owned(),
            unit_bytes: UNIT.into(),
        };
        self.0.trackers().start(spec, Begin::Clean).unwrap();
        Ok(())
    }
    fn written(&mut self) -> Result<Vec<Range<u64>>, CopyError> {
        Ok(self.0.trackers().take("copy", 0, u64::MAX).unwrap())
    }
    fn untrack(&mut self) -> Result<u64, CopyError> {
        Ok(self.0.trackers().stop("copy").unwrap())
    }
    fn freeze(&mut self) -> Result<(), CopyError> {
        Ok(())
    }
    fn thaw(&mut self) {}
}

fn options() -> CopyOptions {
    CopyOptions {
        small_enough_bytes: u64::from(UNIT),
        ..CopyOptions::new("test-1")
    }
}

fn all(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.size_bytes()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A receiver in a thread of its own.
fn receiving(
    mut from: UnixStream,
    mut back: UnixStream,
    target: FileTarget,
) -> JoinHandle<Result<ReceiveReport, CopyError>> {
    std::thread::spawn(move || {
        let options = ReceiveOptions::default();
        receive(&mut from, Some(&mut back), target, &options, &mut |_| {})
    })
}

/// Sends through a socket to a receiver in another thread.
fn through_socket(
    source: &mut dyn CopySource,
    target: FileTarget,
    zstd: Option<i32>,
    stop: &mut dyn FnMut() -> Result<(), CopyError>,
) -> (
    Result<CopyReport, CopyError>,
    Result<ReceiveReport, CopyError>,
) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs_back = theirs.try_clone().unwrap();
    let receiver = receiving(theirs, theirs_back, target);
    let back = Box::new(ours.try_clone().unwrap());
    let cut = ours.try_clone().unwrap();
    let mut sink = StreamSink::new(Box::new(ours), Some(back), "test-1", zstd, Rate::new(0));
    let sent = copy(source, &mut sink, &options(), stop, &mut |_| {});
    drop(sink);
    cut.shutdown(std::net::Shutdown::Write).unwrap();
    (sent, receiver.join().unwrap())
}

fn opened(path: &Path, format: TargetFormat) -> Vec<u8> {
    let file = Box::new(HostFile::open(path, Access::ReadOnly).unwrap());
    let image: Arc<dyn crate::Image> = match format {
        TargetFormat::Raw => Arc::new(RawImage::open(file, Access::ReadOnly, UNIT).unwrap()),
        TargetFormat::Expanded => {
            let refuse = crate::Unclosed::Refuse;
            Arc::new(crate::ExpandedImage::open(file, Access::ReadOnly, refuse).unwrap())
        }
    };
    all(&ChainDisk::new(vec![image]).unwrap())
}

#[test]
fn a_copy_under_a_writer_equals_its_source_at_the_freeze() {
    for (format, zstd) in [(TargetFormat::Expanded, Some(1)), (TargetFormat::Raw, None)] {
        let dir = tempfile::tempdir().unwrap();
        let disk = raw_disk(&dir.path().join("source"));
        disk.write_at(&pattern(1, 20 << 16), 0).unwrap();
        let export = Arc::new(Export::new(disk));
        let is_over = Arc::new(AtomicBool::new(false));
        let writer = {
            let (export, is_over) = (Arc::clone(&export), Arc::clone(&is_over));
            std::thread::spawn(move || {
                for seed in 0.. {
                    if is_over.load(Ordering::Acquire) {
                        return;
                    }
                    let at = seed * 7919 % (SIZE - 9000);
                    match seed % 5 {
                        0 => export.write_zeroes(at & !0xffff, UNIT.into()).unwrap(),
                        _ => export.write(&pattern(seed, 9000), at).unwrap(),
                    }
                }
            })
        };
        let mut writer = Some(writer);
        let file = dir.path().join("copy");
        let target = FileTarget::new(&file, format, MAX_SIZE);
        let mut stop = || {
            is_over.store(true, Ordering::Release);
            writer.take().unwrap().join().unwrap();
            Ok(())
        };
        let mut source = Live(Arc::clone(&export));
        let (sent, received) = through_socket(&mut source, target, zstd, &mut stop);
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert!(!sent.rounds.is_empty() && received.barriers == 1);
        assert!(opened(&file, format) == all(&**export.disk()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}

#[test]
fn a_writer_that_goes_on_after_the_freeze_fails_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let export = Arc::new(Export::new(raw_disk(&dir.path().join("source"))));
    struct Late(Live);
    impl CopySource for Late {
        fn size_bytes(&self) -> u64 {
            self.0.size_bytes()
        }
        fn unit_bytes(&self) -> u32 {
            UNIT
        }
        fn data_in(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>, CopyError> {
            self.0.data_in(range)
        }
        fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<(), CopyError> {
            self.0.read(buf, offset)
        }
        fn track(&mut self) -> Result<(), CopyError> {
            self.0.track()
        }
        fn written(&mut self) -> Result<Vec<Range<u64>>, CopyError> {
            let written = self.0.written();
            self.0.0.write(&[1; 512], 0).unwrap();
            written
        }
        fn untrack(&mut self) -> Result<u64, CopyError> {
            self.0.untrack()
        }
        fn freeze(&mut self) -> Result<(), CopyError> {
            Ok(())
        }
        fn thaw(&mut self) {}
    }
    let file = dir.path().join("copy");
    let target = FileTarget::new(&file, TargetFormat::Raw, MAX_SIZE);
    let mut source = Late(Live(export));
    let (sent, received) = through_socket(&mut source, target, None, &mut || Ok(()));
    assert!(matches!(sent, Err(CopyError::StillWritten { .. })));
    assert_eq!(sent.unwrap_err().exit_code(), 14);
    assert!(matches!(received, Err(CopyError::CutOff { .. })));
    assert!(!file.exists() && dir.path().join("copy.partial").exists());
}

/// A pipe that breaks after so many bytes.
struct Breaking<W> {
    to: W,
    left: usize,
}

impl<W: Write> Write for Breaking<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.left);
        if len == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.left -= len;
        self.to.write(&bytes[..len])
    }
    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Sends to a receiver until the pipe breaks after so many bytes.
fn breaks_off(disk: &Arc<dyn Disk>, target: FileTarget, left: usize, hears: bool) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs_back = theirs.try_clone().unwrap();
    let receiver = receiving(theirs, theirs_back, target);
    let back = hears.then(|| Box::new(ours.try_clone().unwrap()) as Box<dyn Read + Send>);
    let cut = ours.try_clone().unwrap();
    let to = Breaking { to: ours, left };
    let mut source = OfflineSource::new(Arc::clone(disk));
    let mut sink = StreamSink::new(Box::new(to), back, "test-1", None, Rate::new(0));
    let sent = copy(
        &mut source,
        &mut sink,
        &options(),
        &mut || Ok(()),
        &mut |_| {},
    );
    assert!(matches!(sent, Err(CopyError::Pipe { .. })));
    drop(sink);
    cut.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(receiver.join().unwrap().is_err());
}

#[test]
fn a_copy_that_broke_off_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let disk = raw_disk(&dir.path().join("source"));
    disk.write_at(&pattern(1, 40 << 16), 0).unwrap();
    let file = dir.path().join("copy");
    let target = || FileTarget::new(&file, TargetFormat::Expanded, MAX_SIZE);
    breaks_off(&disk, target(), 20 << 16, true);
    assert!(!file.exists());

    // Meanwhile a block changes and another one goes.
    disk.write_at(&[9; 5], 3).unwrap();
    disk.write_zeroes(5 << 16, UNIT.into()).unwrap();
    let mut source = OfflineSource::new(Arc::clone(&disk));
    let (sent, received) = through_socket(&mut source, target(), None, &mut || Ok(()));
    let sent = sent.unwrap();
    received.unwrap();
    assert!(sent.sent_bytes > sent.first_bytes);
    assert!(sent.resumed_bytes >= 10 << 16 && sent.first_bytes < 40 << 16);
    assert!(opened(&file, TargetFormat::Expanded) == all(&*disk));
}

#[test]
fn a_copy_that_goes_on_without_a_way_back_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let disk = raw_disk(&dir.path().join("source"));
    disk.write_at(&pattern(1, 40 << 16), 0).unwrap();
    let file = dir.path().join("copy");
    let target = || FileTarget::new(&file, TargetFormat::Raw, MAX_SIZE);
    breaks_off(&disk, target(), 20 << 16, false);

    // Nobody tells the sender that the receiver has this block, and zeroes are not sent.
    disk.write_zeroes(5 << 16, UNIT.into()).unwrap();
    let mut source = OfflineSource::new(Arc::clone(&disk));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (back, _kept) = UnixStream::pair().unwrap();
    let receiver = receiving(theirs, back, target());
    let mut sink = StreamSink::new(Box::new(ours), None, "test-1", None, Rate::new(0));
    let sent = copy(
        &mut source,
        &mut sink,
        &options(),
        &mut || Ok(()),
        &mut |_| {},
    );
    assert_eq!(sent.unwrap().resumed_bytes, 0);
    receiver.join().unwrap().unwrap();
    assert!(opened(&file, TargetFormat::Raw) == all(&*disk));
}

#[test]
fn what_a_killed_receiver_did_not_write_down_is_gone_when_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let hello: Hello = serde_json::from_slice(&hello()).unwrap();
    let mut killed = FileTarget::new(&dir.path().join("killed"), TargetFormat::Raw, SIZE);
    assert!(killed.begin(&hello).unwrap().is_empty());
    killed.data(3 << 16, pattern(1, 5000)).unwrap();
    killed.barrier().unwrap();
    killed.data(7 << 16, pattern(2, 5000)).unwrap();
    // What a kill leaves: the file as it is, and the map of the barrier.
    for suffix in [".partial", ".partial.map"] {
        let name = |stem: &str| dir.path().join(format!("{stem}{suffix}"));
        std::fs::copy(name("killed"), name("next")).unwrap();
    }
    let file = dir.path().join("next");
    let mut next = FileTarget::new(&file, TargetFormat::Raw, SIZE);
    let have = next.begin(&hello).unwrap();
    assert_eq!(have.keys().collect::<Vec<_>>(), [&3]);
    next.end().unwrap();
    let bytes = opened(&file, TargetFormat::Raw);
    assert!(bytes[3 << 16..][..5000] == pattern(1, 5000));
    assert!(bytes[4 << 16..].iter().all(|byte| *byte == 0));
}

fn stream(packets: &[(Kind, u64, Vec<u8>)]) -> Vec<u8> {
    let mut encoder = Encoder::new(None);
    let encoded = packets
        .iter()
        .map(|(kind, offset, payload)| encoder.encode(*kind, *offset, payload).unwrap().0);
    encoded.flatten().collect()
}

fn hello() -> Vec<u8> {
    let hello = Hello {
        version: wire::VERSION,
        session: "s".to_owned(),
        size_bytes: SIZE,
        unit_bytes: UNIT,
        hears: true,
    };
    serde_json::to_vec(&hello).unwrap()
}

fn received(bytes: &[u8]) -> Result<ReceiveReport, CopyError> {
    let dir = tempfile::tempdir().unwrap();
    let target = FileTarget::new(&dir.path().join("copy"), TargetFormat::Raw, SIZE);
    let options = ReceiveOptions { max_size: 1 << 30 };
    receive(&mut Cursor::new(bytes), None, target, &options, &mut |_| {})
}

#[test]
fn streams_that_break_the_rules_are_refused() {
    let good = stream(&[
        (Kind::Hello, 0, hello()),
        (Kind::Data, 0, vec![1; 100]),
        (Kind::End, 0, vec![]),
    ]);
    assert_eq!(received(&good).unwrap().data_bytes, 100);
    let outside = (Kind::Data, SIZE - 50, vec![1; 100]);
    let wrapping = (Kind::Zero, u64::MAX - 5, u64::MAX.to_le_bytes().to_vec());
    let too_long = (Kind::Data, 0, vec![1; UNIT as usize + 1]);
    for bad in [outside, wrapping, too_long] {
        let bytes = stream(&[(Kind::Hello, 0, hello()), bad]);
        assert!(matches!(received(&bytes), Err(CopyError::Stream { .. })));
    }
    let early = stream(&[(Kind::Data, 0, vec![1])]);
    assert!(matches!(received(&early), Err(CopyError::Stream { .. })));
    let twice = stream(&[(Kind::Hello, 0, hello()), (Kind::Hello, 0, hello())]);
    assert!(matches!(received(&twice), Err(CopyError::Stream { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_damaged_stream_never_passes(at in 0usize..300, bit in 0u8..8, cut in any::<bool>()) {
        let mut bytes = stream(&[
            (Kind::Hello, 0, hello()),
            (Kind::Data, 4096, pattern(3, 64)),
            (Kind::Zero, 0, 512u64.to_le_bytes().to_vec()),
            (Kind::End, 0, vec![]),
        ]);
        let at = at % bytes.len();
        match cut {
            true => bytes.truncate(at),
            false => bytes[at] ^= 1 << bit,
        }
        prop_assert!(received(&bytes).is_err());
    }

    #[test]
    fn noise_is_refused(noise in proptest::collection::vec(any::<u8>(), 0..300), mark in 0..3) {
        let mut bytes = match mark {
            0 => vec![],
            1 => wire::MAGIC.to_le_bytes().to_vec(),
            _ => legacy::LEGACY_MAGIC.to_le_bytes().to_vec(),
        };
        bytes.extend(noise);
        // A legacy end packet is five zero words after its mark: noise of that kind is a stream.
        let is_empty_legacy = mark == 2 && bytes.get(4..8) == Some(&[0; 4]);
        prop_assert!(is_empty_legacy || received(&bytes).is_err());
    }
}

fn legacy_packet(place: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = legacy::LEGACY_MAGIC.to_le_bytes().to_vec();
    out.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
    out.extend(place.to_le_bytes());
    out.extend(payload);
    out
}

#[test]
fn the_originals_stream_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root.hdd");
    let block = pattern(4, 5000);
    let packets = [
        legacy_packet(4096, &block),
        legacy_packet(0, &[7; 512]),
        legacy_packet(0, b"With"),
        legacy_packet(0, &[]),
    ];
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let target = FileTarget::new(&path, TargetFormat::Expanded, SIZE);
    let mut from = Cursor::new(packets.concat());
    let options = ReceiveOptions::default();
    let report = receive(&mut from, Some(&mut theirs), target, &options, &mut |_| {}).unwrap();
    assert!(report.is_legacy && report.barriers == 1);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!((&bytes[..512], &bytes[4096..]), (&[7; 512][..], &block[..]));
    let mut answer = [0; 8];
    ours.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"SUCCESS\n");
}

#[test]
fn a_legacy_stream_that_breaks_off_or_asks_too_much_is_refused() {
    let cut = legacy_packet(0, &[1; 100]);
    assert!(matches!(received(&cut), Err(CopyError::CutOff { .. })));
    let mut long = legacy_packet(0, &[]);
    long[4..8].fill(0xff);
    assert!(matches!(received(&long), Err(CopyError::Stream { .. })));
    let far = legacy_packet(u64::MAX - 3, &[1; 100]);
    assert!(matches!(received(&far), Err(CopyError::Stream { .. })));
}
