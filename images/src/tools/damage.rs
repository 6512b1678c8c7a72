//! No damage to a directory makes any tool panic.

use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::{check, info, show};
use crate::ImageDir;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/criu-4.2-sleep");

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_directories_are_survived(
        hits in prop::collection::vec(
            (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..4
        ),
        cut: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let files = ImageDir::open(Path::new(GOLDEN)).unwrap().files().unwrap();
        for file in &files {
            fs::copy(Path::new(GOLDEN).join(&file.name), dir.path().join(&file.name)).unwrap();
        }
        for (file, at, byte) in hits {
            let path = dir.path().join(&files[file.index(files.len())].name);
            let mut bytes = fs::read(&path).unwrap();
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
                if cut {
                    bytes.truncate(at);
                }
                fs::write(&path, bytes).unwrap();
            }
        }
        let report = check(dir.path()).unwrap();
        prop_assert_eq!(report.is_whole(), report.problems.is_empty());
        let _ = info(dir.path()).unwrap().to_string();
        show(dir.path(), std::io::sink()).unwrap();
    }
}
