//! A checkpoint by CRIU, explained.

use std::path::Path;

use super::{DescriptorInfo, info};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/criu-4.2-sleep");

#[test]
fn a_checkpoint_of_criu_is_explained() {
    let info = info(Path::new(GOLDEN)).unwrap();
    assert!(info.complete);
    assert_eq!(info.unreadable, Vec::<String>::new());
    assert_eq!(info.made.image_version, Some(2));
    let task = &info.tasks[0];
    assert_eq!(
        (task.pid, task.ppid, task.state, &*task.name),
        (27751, 0, "running", "sleep")
    );
    assert_eq!(task.arguments, ["/usr/bin/sleep", "1000"]);
    assert_eq!(task.executable.as_deref(), Some("/usr/bin/sleep"));
    assert_eq!(task.directory.as_deref(), Some("/"));
    assert_eq!(task.threads, [27751]);
    let stored: u64 = info.memory.values().map(|memory| memory.stored).sum();
    assert_eq!((stored, info.sizes.pages), (114_688, 114_688));
    assert_eq!(info.memory["heap"].mapped, 135_168);
    let descriptor = |fd| DescriptorInfo { pid: 27751, fd };
    assert_eq!(info.files.len(), 1);
    assert_eq!(
        (info.files[0].kind, &*info.files[0].name),
        ("device", "/dev/null")
    );
    assert_eq!(
        info.files[0].descriptors,
        [descriptor(0), descriptor(1), descriptor(2)]
    );
}

#[test]
fn text_and_json_say_the_same() {
    let info = info(Path::new(GOLDEN)).unwrap();
    let text = info.to_string();
    for line in [
        "  27751 /usr/bin/sleep 1000  [running, 112.0 KiB]",
        "  stack          132.0 KiB    16.0 KiB",
        "    /dev/null  [27751:0 27751:1 27751:2]",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
    }
    let json = serde_json::to_value(&info).unwrap();
    assert_eq!(json["tasks"][0]["arguments"][1], "1000");
    assert_eq!(json["memory"]["stack"]["mapped"], 135_168);
    assert_eq!(json["files"][0]["descriptors"][2]["fd"], 2);
}

#[test]
fn a_damaged_checkpoint_is_explained_as_far_as_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(GOLDEN).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    std::fs::write(dir.path().join("mm-27751.img"), b"damaged").unwrap();
    std::fs::remove_file(dir.path().join("inventory.img")).unwrap();
    let info = info(dir.path()).unwrap();
    assert!(!info.complete);
    assert_eq!(info.unreadable.len(), 1);
    let text = info.to_string();
    assert!(text.contains("UNFINISHED"), "{text}");
    assert!(text.contains("27751 [sleep]  [running]"), "{text}");
}
