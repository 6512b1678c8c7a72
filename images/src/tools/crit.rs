//! Comparison with the crit of this machine, where there is one.

use std::path::Path;
use std::process::Command;

use proptest::test_runner::{RngAlgorithm, TestRng};
use serde_json::Value;

use super::decode::shape_of;
use super::made_up::{Extent, Maker};
use super::roundtrip::{STYLES, golden, image_of, plain_kinds};
use super::{JsonStyle, decode};
use crate::{ImageKind, ImageReader};

const CRIT: &str = "/usr/bin/crit";

/// Asks crit, unless it does not know the image.
fn crit_decode(path: &Path, style: JsonStyle) -> Option<String> {
    let mut command = Command::new(CRIT);
    command.arg("decode").arg("-i").arg(path);
    if style == JsonStyle::Pretty {
        command.arg("--pretty");
    }
    let output = command.output().expect("crit runs");
    output
        .status
        .success()
        .then(|| String::from_utf8(output.stdout).expect("crit writes ASCII"))
}

fn ours(path: &Path, kind: ImageKind, style: JsonStyle) -> String {
    let mut json = Vec::new();
    decode(ImageReader::open(path, kind).unwrap(), style, &mut json).unwrap();
    String::from_utf8(json).unwrap()
}

/// Fields that the two call by different names or show differently on purpose.
fn is_known_difference(path: &str, theirs: &Value) -> bool {
    let field = path.rsplit('.').next().unwrap_or(path);
    match field {
        // Its older name.
        "nr_pages" => path.contains("PAGEMAP"),
        // crit swaps the words for stopped and dead tasks; ours are numbers.
        "task_state" => theirs == "Zombie" || theirs == "Stopped",
        _ => false,
    }
}

/// Lists where crit says something that we do not.
fn differences(path: &str, theirs: &Value, ours: &Value, found: &mut Vec<String>) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            for (key, value) in theirs {
                let path = format!("{path}.{key}");
                match ours.get(key) {
                    _ if is_known_difference(&path, value) => {}
                    Some(other) => differences(&path, value, other, found),
                    None => found.push(format!("{path}: {value} is missing")),
                }
            }
        }
        (Value::Array(theirs), Value::Array(ours)) if theirs.len() == ours.len() => {
            for (index, (a, b)) in theirs.iter().zip(ours).enumerate() {
                differences(&format!("{path}.{index}"), a, b, found);
            }
        }
        (theirs, ours) if theirs == ours => {}
        (theirs, ours) => found.push(format!("{path}: {theirs}, ours {ours}")),
    }
}

/// Compares one image in both styles; says whether crit knew it.
fn compare(kind: ImageKind, image: &[u8], dir: &Path) -> bool {
    let path = dir.join(kind.file_name(1));
    std::fs::write(&path, image).unwrap();
    for style in STYLES {
        let Some(theirs) = crit_decode(&path, style) else {
            return false;
        };
        let ours = ours(&path, kind, style);
        if theirs == ours {
            continue;
        }
        let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let mut found = Vec::new();
        let tag = kind.info().tag;
        differences(tag, &parsed(&theirs), &parsed(&ours), &mut found);
        found.truncate(10);
        assert_eq!(found, Vec::<String>::new(), "{kind:?} {style:?}");
    }
    true
}

fn crit_is_here() -> bool {
    let here = Path::new(CRIT).exists();
    if !here {
        eprintln!("skipped: no {CRIT} to compare with (Debian package criu)");
    }
    here
}

#[test]
fn crit_says_the_same_of_images_by_criu() {
    if !crit_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (kind, image) in golden() {
        assert!(compare(kind, &image, dir.path()), "crit decodes {kind:?}");
    }
}

#[test]
fn crit_says_the_same_of_made_up_images() {
    if !crit_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut maker = Maker::new(rng, Extent::Plain);
    let mut known = Vec::new();
    for kind in plain_kinds() {
        let entries: Vec<_> = (0..2)
            .map(|index| maker.message(shape_of(kind, index), 3))
            .collect();
        if compare(kind, &image_of(kind, &entries), dir.path()) {
            known.push(kind.info().tag);
        }
    }
    assert!(known.len() > 40, "{known:?}");
    eprintln!(
        "crit does not know {:?}",
        plain_kinds()
            .iter()
            .map(|k| k.info().tag)
            .filter(|t| !known.contains(t))
            .collect::<Vec<_>>()
    );
}
