//! Reading images that are not as they should be.

use std::io;
use std::path::Path;

use firn_images::{Header, IMG_COMMON, IMG_SERVICE, ImageKind, ImageReadError, ImageReader};
use firn_proto::{FsEntry, Message, PipeDataEntry, PstreeEntry, core_entry};
use proptest::prelude::*;

/// An image as bytes: header, then entries, each followed by its payload.
fn image(kind: ImageKind, entries: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let info = kind.info();
    let mut bytes = Vec::new();
    match info.header {
        Header::Common => bytes.extend(IMG_COMMON.to_le_bytes()),
        Header::Service => bytes.extend(IMG_SERVICE.to_le_bytes()),
        Header::Bare | Header::Raw => {}
    }
    bytes.extend(info.magic.to_le_bytes());
    for (message, payload) in entries {
        bytes.extend(u32::try_from(message.len()).expect("small").to_le_bytes());
        bytes.extend(message);
        bytes.extend(payload);
    }
    bytes
}

fn open(bytes: &[u8], kind: ImageKind) -> Result<ImageReader<&[u8]>, ImageReadError> {
    let size = u64::try_from(bytes.len()).expect("small");
    ImageReader::new(bytes, size, Path::new("some.img"), kind)
}

fn fs() -> FsEntry {
    FsEntry {
        cwd_id: 300,
        root_id: 2,
        umask: Some(0o22),
    }
}

fn fs_image() -> Vec<u8> {
    image(ImageKind::Fs, &[(fs().encode_to_vec(), Vec::new())])
}

fn error_of(bytes: &[u8], kind: ImageKind) -> String {
    let result = open(bytes, kind).and_then(ImageReader::one::<FsEntry>);
    result.expect_err("damaged").to_string()
}

#[test]
fn headers_of_both_versions_are_read() {
    let bytes = fs_image();
    for bytes in [&bytes[..], &bytes[4..]] {
        let found: FsEntry = open(bytes, ImageKind::Fs)
            .expect("opens")
            .one()
            .expect("reads");
        assert_eq!(found, fs());
    }
}

#[test]
fn errors_name_file_entry_and_byte() {
    let good = fs_image();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    let cases = [
        (
            good[..3].to_vec(),
            "some.img has 3 bytes, which is too short for an image header",
        ),
        (
            good[..6].to_vec(),
            "some.img has 6 bytes, which is too short for an image header",
        ),
        (
            with(4, 0),
            "some.img begins with 0x51403900 where a FS image has 0x51403912",
        ),
        (
            with(0, 0x40),
            "some.img begins with 0x54564340 where a FS image has 0x51403912",
        ),
        (
            good[..8].to_vec(),
            "some.img, entry 0, byte 8: the file ends where a fs_entry is expected",
        ),
        (
            good[..10].to_vec(),
            "some.img, entry 0, byte 8: 2 stray bytes at the end of the file",
        ),
        (
            good[..14].to_vec(),
            "some.img, entry 0, byte 12: 7 bytes announced and 2 left in the file",
        ),
        (
            with(8, 9),
            "some.img, entry 0, byte 12: 9 bytes announced and 7 left in the file",
        ),
        (
            with(12, 7),
            "some.img, entry 0, byte 12: not a valid fs_entry",
        ),
        (
            [&good[..], b"x"].concat(),
            "some.img, entry 1, byte 19: 1 bytes more than a FS image has",
        ),
    ];
    for (bytes, message) in cases {
        assert_eq!(error_of(&bytes, ImageKind::Fs), message);
    }
    let service = [&IMG_SERVICE.to_le_bytes(), &good[4..]].concat();
    let message = "some.img has another first magic than FS images have";
    assert_eq!(error_of(&service, ImageKind::Fs), message);
}

#[test]
fn a_huge_length_allocates_nothing() {
    // The size claims 8 GiB, so that only the limit on messages stands in the way.
    let mut bytes = fs_image();
    bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let input = io::Cursor::new(bytes).chain_zeros();
    let mut reader =
        ImageReader::new(input, 8 << 30, Path::new("some.img"), ImageKind::Fs).expect("opens");
    let error = reader.next_bytes().expect_err("too long");
    assert!(matches!(error, ImageReadError::TooLong { .. }), "{error}");
}

/// Lets a short buffer pass for a long file.
trait ChainZeros: io::Read + Sized {
    fn chain_zeros(self) -> io::Chain<Self, io::Repeat> {
        self.chain(io::repeat(0))
    }
}

impl<R: io::Read> ChainZeros for R {}

#[test]
fn a_file_that_shrinks_is_an_error() {
    let bytes = fs_image();
    let claimed = u64::try_from(bytes.len()).expect("small");
    let mut reader = ImageReader::new(&bytes[..15], claimed, Path::new("some.img"), ImageKind::Fs)
        .expect("opens");
    let error = reader.next_bytes().expect_err("short");
    assert!(matches!(error, ImageReadError::Read { .. }), "{error}");
}

#[test]
fn payload_is_bounded_by_the_file() {
    let entry = PipeDataEntry {
        pipe_id: 1,
        bytes: 1 << 30,
        size: None,
        firn: None,
    };
    let bytes = image(
        ImageKind::PipesData,
        &[(entry.encode_to_vec(), b"abc".to_vec())],
    );
    let mut reader = open(&bytes, ImageKind::PipesData).expect("opens");
    let entry: PipeDataEntry = reader.expect_entry().expect("entry");
    let offset = bytes.len() - 3;
    let expected = format!(
        "some.img, entry 0, byte {offset}: 1073741824 bytes announced and 3 left in the file"
    );
    assert_eq!(
        reader
            .payload(entry.bytes.into())
            .expect_err("short")
            .to_string(),
        expected
    );
    let copied = reader.copy_payload(entry.bytes.into(), &mut io::sink());
    assert_eq!(copied.expect_err("short").to_string(), expected);
    assert_eq!(reader.payload(3).expect("there"), b"abc");
    reader.finish().expect("all read");
}

#[test]
fn the_kind_is_found_out_by_name_or_magic() {
    let bytes = image(ImageKind::ShmemPagemap, &[]);
    let kind = |name: &str| {
        let size = u64::try_from(bytes.len()).expect("small");
        ImageReader::new_unknown(&bytes[..], size, Path::new(name)).map(|r| r.kind())
    };
    assert_eq!(
        kind("dir/pagemap-shmem-3.img").expect("named"),
        ImageKind::ShmemPagemap
    );
    assert_eq!(
        kind("dir/pagemap-3.img").expect("named"),
        ImageKind::Pagemap
    );
    assert_eq!(kind("dir/core-3.img").expect("magic"), ImageKind::Pagemap);
    let raw = ImageReader::new_unknown(&[0u8; 64][..], 64, Path::new("pages-1.img"));
    assert!(matches!(raw, Err(ImageReadError::UnknownKind { .. })));
}

#[test]
#[should_panic(expected = "fs_entry is no entry of PSTREE images")]
fn a_message_of_another_image_is_a_bug() {
    let bytes = image(ImageKind::Pstree, &[]);
    let _ = open(&bytes, ImageKind::Pstree)
        .expect("opens")
        .next_entry::<FsEntry>();
}

/// A core image with something in most of its parts.
fn core_image() -> Vec<u8> {
    let queue = firn_proto::SignalQueueEntry {
        signals: vec![firn_proto::SiginfoEntry {
            siginfo: vec![7; 128],
        }],
    };
    let core = firn_proto::CoreEntry {
        mtype: core_entry::March::X8664.into(),
        thread_info: Some(firn_proto::ThreadInfoX86 {
            tls: vec![Default::default(); 3],
            ..Default::default()
        }),
        tc: Some(firn_proto::TaskCoreEntry {
            comm: b"odd \xff name".to_vec(),
            signals_s: Some(queue),
            sigactions: vec![Default::default(); 62],
            ..Default::default()
        }),
        ..Default::default()
    };
    image(ImageKind::Core, &[(core.encode_to_vec(), Vec::new())])
}

fn cgroup_image() -> Vec<u8> {
    let mut dir = firn_proto::CgroupDirEntry::default();
    for depth in 0..20 {
        let dir_name = format!("level{depth}").into_bytes();
        dir = firn_proto::CgroupDirEntry {
            dir_name,
            children: vec![dir],
            ..Default::default()
        };
    }
    let controller = firn_proto::CgControllerEntry {
        dirs: vec![dir],
        ..Default::default()
    };
    let entry = firn_proto::CgroupEntry {
        controllers: vec![controller],
        ..Default::default()
    };
    image(ImageKind::Cgroup, &[(entry.encode_to_vec(), Vec::new())])
}

fn tree_image() -> Vec<u8> {
    let task = |pid| PstreeEntry {
        pid,
        threads: vec![pid, pid + 1],
        ..Default::default()
    };
    let entries: Vec<_> = (1..9)
        .map(|pid| (task(pid).encode_to_vec(), Vec::new()))
        .collect();
    image(ImageKind::Pstree, &entries)
}

/// Reads an image in every way there is; what matters is that it returns.
fn read_all_ways(bytes: &[u8], kind: ImageKind) {
    if let Ok(mut reader) = open(bytes, kind) {
        while let Ok(Some(message)) = reader.next_bytes() {
            let len = message.len();
            assert!(len <= bytes.len());
            let payload = u64::try_from(len).expect("small") % 5;
            if reader.payload(payload).is_err() {
                break;
            }
        }
    }
    let _ = match kind {
        ImageKind::Core => open(bytes, kind)
            .and_then(|r| r.rest::<firn_proto::CoreEntry>())
            .is_ok(),
        ImageKind::Cgroup => open(bytes, kind)
            .and_then(|r| r.rest::<firn_proto::CgroupEntry>())
            .is_ok(),
        _ => open(bytes, kind)
            .and_then(|r| r.rest::<PstreeEntry>())
            .is_ok(),
    };
    let size = u64::try_from(bytes.len()).expect("small");
    let _ = ImageReader::new_unknown(bytes, size, Path::new("some.img"));
}

fn samples() -> [(ImageKind, Vec<u8>); 3] {
    [
        (ImageKind::Core, core_image()),
        (ImageKind::Cgroup, cgroup_image()),
        (ImageKind::Pstree, tree_image()),
    ]
}

#[test]
fn every_truncation_is_survived() {
    for (kind, bytes) in samples() {
        (0..bytes.len()).for_each(|len| read_all_ways(&bytes[..len], kind));
    }
}

proptest! {
    #[test]
    fn flipped_bits_are_survived(
        which in 0usize..3,
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u32..8), 1..6),
    ) {
        let (kind, mut bytes) = samples()[which].clone();
        for (index, bit) in flips {
            let at = index.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        read_all_ways(&bytes, kind);
    }

    #[test]
    fn noise_after_a_header_is_survived(noise in proptest::collection::vec(any::<u8>(), 0..300)) {
        for kind in [ImageKind::Core, ImageKind::Cgroup, ImageKind::Pstree] {
            let bytes = [image(kind, &[]), noise.clone()].concat();
            read_all_ways(&bytes, kind);
        }
    }

    #[test]
    fn encoding_and_decoding_a_tree_is_the_identity(pids in proptest::collection::vec(any::<u32>(), 0..40)) {
        let task = |pid: &u32| PstreeEntry { pid: *pid, threads: pids.clone(), ..Default::default() };
        let tasks: Vec<PstreeEntry> = pids.iter().map(task).collect();
        let entries: Vec<_> = tasks.iter().map(|t| (t.encode_to_vec(), Vec::new())).collect();
        let bytes = image(ImageKind::Pstree, &entries);
        let found: Vec<PstreeEntry> =
            open(&bytes, ImageKind::Pstree).expect("opens").rest().expect("reads");
        prop_assert_eq!(found, tasks);
    }
}
