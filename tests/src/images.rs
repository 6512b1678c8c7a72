//! The files of an image directory.

use std::path::{Path, PathBuf};

/// The image files that hold messages (not pages, logs or links), in the order of their names.
pub fn image_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("the image directory is readable");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("readable").path())
        .collect();
    files.retain(|path| {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        (name.ends_with(".img") && !name.starts_with("pages-")) || name.starts_with("stats-")
    });
    files.sort();
    files
}
