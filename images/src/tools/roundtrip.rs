//! Decode and encode give every image back byte for byte.

use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::made_up::{Extent, Maker};
use super::wire::{put_tag, put_varint};
use super::{JsonStyle, decode, encode};
use crate::framing::header_bytes;
use crate::{ImageDir, ImageKind, ImageReader, Payload};

pub(crate) const STYLES: [JsonStyle; 2] = [JsonStyle::Compact, JsonStyle::Pretty];

fn decoded(bytes: &[u8], kind: ImageKind, style: JsonStyle) -> Result<Vec<u8>, String> {
    let size = u64::try_from(bytes.len()).unwrap();
    let path = kind.file_name(1);
    let reader =
        ImageReader::new(bytes, size, Path::new(&path), kind).map_err(|e| e.to_string())?;
    let mut json = Vec::new();
    decode(reader, style, &mut json).map_err(|e| e.to_string())?;
    Ok(json)
}

fn there_and_back(bytes: &[u8], kind: ImageKind, style: JsonStyle) -> Vec<u8> {
    let json = decoded(bytes, kind, style).unwrap();
    let mut back = Vec::new();
    if let Err(error) = encode(&json[..], &mut back) {
        panic!("{error:?} of {}", String::from_utf8_lossy(&json));
    }
    back
}

pub(crate) fn image_of(kind: ImageKind, entries: &[Vec<u8>]) -> Vec<u8> {
    let mut image = header_bytes(kind.info());
    for entry in entries {
        image.extend_from_slice(&u32::try_from(entry.len()).unwrap().to_le_bytes());
        image.extend_from_slice(entry);
    }
    image
}

/// Kinds whose entries follow each other without payload.
pub(crate) fn plain_kinds() -> Vec<ImageKind> {
    let plain = |kind: &ImageKind| {
        let info = kind.info();
        info.payload == Payload::Nothing && !info.messages.is_empty()
    };
    ImageKind::all().filter(plain).collect()
}

#[test]
fn every_kind_with_every_field_comes_back() {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut maker = Maker::new(rng, Extent::Full);
    for kind in plain_kinds() {
        for style in STYLES {
            let entries: Vec<_> = (0..3)
                .map(|index| maker.message(decode::shape_of(kind, index), 4))
                .collect();
            let image = image_of(kind, &entries);
            assert_eq!(there_and_back(&image, kind, style), image, "{kind:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn made_up_images_come_back(which: prop::sample::Index, pretty: bool, count in 0u64..4, rng in any::<u64>().prop_perturb(|_, rng| rng)) {
        let mut maker = Maker::new(rng, Extent::Some);
        let kinds = plain_kinds();
        let kind = kinds[which.index(kinds.len())];
        let entries: Vec<_> = (0..count)
            .map(|index| maker.message(decode::shape_of(kind, index), 3))
            .collect();
        let image = image_of(kind, &entries);
        prop_assert_eq!(there_and_back(&image, kind, STYLES[usize::from(pretty)]), image);
    }

    #[test]
    fn unknown_fields_come_back(extra in prop::collection::vec((1000u32..30000, any::<u64>()), 0..5)) {
        let mut extra = extra;
        extra.sort_by_key(|(number, _)| *number);
        let mut entry = vec![0x08, 1, 0x10, 2, 0x18, 0o22];
        for (number, value) in extra {
            put_tag(&mut entry, number, 0);
            put_varint(&mut entry, value);
        }
        let image = image_of(ImageKind::Fs, &[entry]);
        prop_assert_eq!(there_and_back(&image, ImageKind::Fs, JsonStyle::Compact), image);
    }

    #[test]
    fn damaged_images_are_refused_without_panic(which: prop::sample::Index, at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
        let images = golden();
        let (kind, mut image) = images[which.index(images.len())].clone();
        let index = at.index(image.len());
        image[index] = byte;
        let _ = decoded(&image, kind, JsonStyle::Pretty);
        image.truncate(cut.index(image.len() + 1));
        if let Ok(json) = decoded(&image, kind, JsonStyle::Compact) {
            let _ = encode(&json[..], std::io::sink());
        }
    }
}

pub(crate) fn golden() -> Vec<(ImageKind, Vec<u8>)> {
    let dir = ImageDir::open(Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/golden/criu-4.2-sleep"
    )));
    let dir = dir.unwrap();
    let files = dir.files().unwrap().into_iter();
    files
        .filter(|file| file.kind.info().magic != 0)
        .map(|file| {
            (
                file.kind,
                std::fs::read(dir.path().join(&file.name)).unwrap(),
            )
        })
        .collect()
}

#[test]
fn images_of_criu_come_back() {
    let images = golden();
    assert_eq!(images.len(), 12);
    for (kind, image) in images {
        for style in STYLES {
            assert_eq!(there_and_back(&image, kind, style), image, "{kind:?}");
        }
    }
}

fn with_payload(kind: ImageKind, parts: &[&[u8]]) -> Vec<u8> {
    [&header_bytes(kind.info())[..], &parts.concat()].concat()
}

#[track_caller]
fn assert_payload(kind: ImageKind, parts: &[&[u8]], extra: &str) {
    let image = with_payload(kind, parts);
    let json = String::from_utf8(decoded(&image, kind, JsonStyle::Compact).unwrap()).unwrap();
    assert!(json.contains(&format!("\"extra\": {extra}")), "{json}");
    assert_eq!(there_and_back(&image, kind, JsonStyle::Compact), image);
}

const DESC: &[u8] = b"\x0a\x0f\x08\x01\x10\x00\x18\x00\x20\x00\x28\x00\x30\x80\x03\x38\x05";

#[test]
fn payloads_are_shown_as_crit_shows_them() {
    let pipe: &[u8] = b"\x07\x00\x00\x00\x08\x07\x10\x04\x18\x80\x20";
    assert_payload(
        ImageKind::PipesData,
        &[pipe, b"abcd", pipe, b"defg"],
        r#""YWJjZA==\n""#,
    );
    let map: &[u8] = b"\x08\x00\x00\x00\x08\x01\x10\x04\x18\x03\x20\x01";
    assert_payload(
        ImageKind::BpfmapData,
        &[map, b"abcddef"],
        r#""YWJjZGRlZg==\n""#,
    );
    let tcp: &[u8] =
        b"\x10\x00\x00\x00\x08\x03\x10\x01\x18\x04\x20\x02\x28\x00\x30\x07\x38\x01\x48\x01";
    let queues = r#"{"inq": "YWJj\n", "outq": "ZGVmZw==\n"}"#;
    assert_payload(ImageKind::TcpStream, &[tcp, b"abcdefg"], queues);
    let sem: &[u8] = &[b"\x13\x00\x00\x00", DESC, b"\x10\x03"].concat();
    assert_payload(
        ImageKind::IpcnsSem,
        &[sem, &[1, 0, 2, 0, 3, 0, 0, 0]],
        "[1, 2, 3]",
    );
    assert_payload(
        ImageKind::IpcnsSem,
        &[sem, &[1, 0, 2, 0, 3, 0, 9, 0]],
        "[1, 2, 3, 9]",
    );
    let shm: &[u8] = &[b"\x13\x00\x00\x00", DESC, b"\x10\x05"].concat();
    assert_payload(
        ImageKind::IpcnsShm,
        &[shm, b"hello\0\0\0", shm, b"hellogar"],
        r#""aGVsbG8=\n""#,
    );
    let mapped: &[u8] = &[b"\x15\x00\x00\x00", DESC, b"\x10\x05\x18\x01"].concat();
    assert_payload(ImageKind::IpcnsShm, &[mapped, mapped], r#""""#);
    let queue: &[u8] = &[b"\x15\x00\x00\x00", DESC, b"\x10\x40\x18\x02"].concat();
    let first: &[u8] = b"\x04\x00\x00\x00\x08\x03\x10\x05hello\0\0\0";
    let second: &[u8] = b"\x04\x00\x00\x00\x08\x04\x10\x09hellowor\0\xff\0\0\0\0\0\0";
    let shown = r#"[{"mtype": 3, "msize": 5}, "aGVsbG8=\n", {"mtype": 4, "msize": 9}, "#;
    assert_payload(
        ImageKind::IpcnsMsg,
        &[queue, first, second, queue, first, first],
        shown,
    );
}

#[test]
fn ghosts_are_shown_whole_or_in_chunks() {
    let whole: &[u8] = b"\x08\x00\x00\x00\x08\x00\x10\x00\x18\xa4\x83\x02";
    assert_payload(ImageKind::GhostFile, &[whole, b"abcd"], r#""YWJjZA==\n""#);
    assert_payload(ImageKind::GhostFile, &[whole], r#""""#);
    let chunked: &[u8] = b"\x0c\x00\x00\x00\x08\x00\x10\x00\x18\xa4\x83\x02\x48\x01\x50\x08";
    let chunk: &[u8] = b"\x04\x00\x00\x00\x08\x04\x10\x04abcd";
    let image = with_payload(ImageKind::GhostFile, &[chunked, chunk, chunk]);
    let json = decoded(&image, ImageKind::GhostFile, JsonStyle::Compact).unwrap();
    let json = String::from_utf8(json).unwrap();
    let shown =
        "\"chunks\": true, \"size\": 8}, {\"len\": 4, \"off\": 4, \"extra\": \"YWJjZA==\\n\"}, {";
    assert!(json.contains(shown), "{json}");
    assert_eq!(
        there_and_back(&image, ImageKind::GhostFile, JsonStyle::Pretty),
        image
    );
}

#[test]
fn what_the_schema_cannot_say_is_kept() {
    // In turn: a uint32 of 33 bits, a varint longer than it need be, a field given twice, a
    // field of another wire type, elements packed into one record that are too large.
    for entry in [
        &b"\x08\x80\x80\x80\x80\x10\x10\x01\x18\x02"[..],
        b"\x08\x81\x00\x10\x01\x18\x02",
        b"\x08\x01\x08\x02\x10\x01\x18\x02",
        b"\x0a\x01a\x10\x01\x18\x02",
    ] {
        let image = image_of(ImageKind::Fs, &[entry.to_vec()]);
        assert_eq!(
            there_and_back(&image, ImageKind::Fs, JsonStyle::Compact),
            image
        );
    }
}

#[test]
fn packed_numbers_are_read() {
    let entry = b"\x08\x05\x10\x00\x18\x05\x20\x05\x2a\x02\x05\x06".to_vec();
    let image = image_of(ImageKind::Pstree, &[entry]);
    let json = decoded(&image, ImageKind::Pstree, JsonStyle::Compact).unwrap();
    let json = String::from_utf8(json).unwrap();
    assert!(json.contains("\"threads\": [5, 6]"), "{json}");
}

#[test]
fn damage_is_told_with_entry_and_offset() {
    let image = image_of(
        ImageKind::Fs,
        &[b"\x08\x01\x10\x02".to_vec(), b"\x08\x01\x10".to_vec()],
    );
    let error = decoded(&image, ImageKind::Fs, JsonStyle::Compact).unwrap_err();
    assert_eq!(error, "fs-1.img, entry 1, byte 22: not a valid fs_entry");
}

#[test]
fn wrong_json_is_told_with_its_place() {
    let error = |json: &str| {
        let error = encode(json.as_bytes(), std::io::sink()).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    };
    let required = error(r#"{"magic": "FS", "entries": [{"cwd_id": 1}]}"#);
    assert_eq!(
        required,
        "entry 0: root_id: this field is required in fs_entry"
    );
    let unknown = error(r#"{"magic": "FS", "entries": [{"cwd_id": 1, "root_id": 2, "x": 1}]}"#);
    assert_eq!(unknown, "entry 0: x: fs_entry has no such field");
    let wrong = error(r#"{"magic": "FS", "entries": [{"cwd_id": -1, "root_id": 2}]}"#);
    assert!(
        wrong.starts_with("entry 0: cwd_id: -1 where a 32-bit number"),
        "{wrong}"
    );
    let nested = error(
        r#"{"magic": "PSTREE", "entries": [{"pid": 1, "ppid": 0, "pgid": 1, "sid": 1, "threads": [1, "x"]}]}"#,
    );
    assert!(
        nested.starts_with("entry 0: threads.1: \"x\" where"),
        "{nested}"
    );
    assert!(error(r#"{"magic": "NONSENSE", "entries": []}"#).starts_with("magic \"NONSENSE\""));
    assert!(error(r#"{"entries": []}"#).starts_with("not the JSON of an image"));
    assert!(error(r#"{"magic": "FS"}"#).starts_with("not the JSON of an image"));
    assert!(error("[").starts_with("not the JSON of an image"));
}

#[test]
fn entries_may_come_before_the_magic() {
    let mut image = Vec::new();
    encode(
        &br#"{"entries": [{"cwd_id": 1, "root_id": 2}], "magic": "FS"}"#[..],
        &mut image,
    )
    .unwrap();
    assert_eq!(
        image,
        image_of(ImageKind::Fs, &[b"\x08\x01\x10\x02".to_vec()])
    );
}
