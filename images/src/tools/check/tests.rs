//! A whole directory passes; each way of damaging it is told.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::check;
use crate::tools::{JsonStyle, decode_file, encode};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/criu-4.2-sleep");

fn copied() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(GOLDEN).unwrap().map(Result::unwrap) {
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    dir
}

/// Edits an image by way of its JSON.
fn edit(dir: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(name);
    let mut text = Vec::new();
    decode_file(&path, JsonStyle::Compact, &mut text).unwrap();
    let mut image: Value = serde_json::from_slice(&text).unwrap();
    change(&mut image["entries"]);
    let mut bytes = Vec::new();
    encode(image.to_string().as_bytes(), &mut bytes).unwrap();
    fs::write(path, bytes).unwrap();
}

fn problems(dir: &Path) -> Vec<String> {
    let report = check(dir).unwrap();
    let path = format!("{}/", dir.canonicalize().unwrap().display());
    let told = report
        .problems
        .iter()
        .map(|p| p.to_string().replace(&path, ""));
    told.collect()
}

#[track_caller]
fn assert_told(change: impl FnOnce(&Path), expected: &[&str]) {
    let dir = copied();
    change(dir.path());
    assert_eq!(problems(dir.path()), expected);
}

#[test]
fn a_directory_of_criu_is_whole() {
    let report = check(Path::new(GOLDEN)).unwrap();
    assert!(report.is_whole(), "{report}");
    assert!(report.remarks.is_empty(), "{report}");
    let counts = (report.images, report.tasks, report.threads, report.pages);
    assert_eq!(counts, (13, 1, 1, 28));
    assert_eq!(
        report.to_string(),
        "whole: 13 images, 1 task, 1 thread, 28 pages\n"
    );
}

#[test]
fn every_missing_file_is_told() {
    let told = |name: &'static str| {
        let dir = copied();
        fs::remove_file(dir.path().join(name)).unwrap();
        problems(dir.path())
    };
    assert_eq!(
        told("inventory.img"),
        ["inventory.img: missing: the dump that wrote the directory did not finish"]
    );
    assert_eq!(
        told("pstree.img"),
        ["pstree.img: missing, and needed by every restore"]
    );
    assert_eq!(
        told("files.img"),
        ["files.img: missing, and needed by every process"]
    );
    for name in [
        "core-27751.img",
        "ids-27751.img",
        "mm-27751.img",
        "fs-27751.img",
    ] {
        assert_eq!(
            told(name),
            [format!("{name}: missing, and needed by process 27751")]
        );
    }
    assert_eq!(
        told("fdinfo-2.img"),
        ["fdinfo-2.img: missing, and needed by process 27751"]
    );
    assert_eq!(
        told("pages-1.img"),
        ["pages-1.img: missing, and needed by pagemap-27751.img"]
    );
}

#[test]
fn the_tree_has_one_root_and_parents_come_first() {
    let task = |pid, ppid| json!({"pid": pid, "ppid": ppid, "pgid": 27751, "sid": 27751, "threads": [pid]});
    let missing = |pid: u32, names: &[&str]| {
        let told = |name: &&str| format!("{name}-{pid}.img: missing, and needed by process {pid}");
        names.iter().map(told).collect::<Vec<_>>()
    };
    let needed = ["core", "ids", "mm", "fs", "pagemap"];
    let dir = copied();
    edit(dir.path(), "pstree.img", |entries| {
        *entries = json!([entries[0], task(7, 8), task(8, 27751), task(9, 0)]);
    });
    let mut expected = vec![
        "pstree.img: 2 processes without parent, where a tree has one, the first".to_owned(),
        "pstree.img, entry 1, byte 30: process 7 comes before its parent 8, or the parent is missing"
            .to_owned(),
    ];
    expected.extend([7, 8, 9].iter().flat_map(|pid| missing(*pid, &needed)));
    assert_eq!(problems(dir.path()), expected);
    let twice = |dir: &Path| {
        edit(dir, "pstree.img", |e| {
            e[0]["threads"] = json!([27751, 27751])
        })
    };
    assert_told(
        twice,
        &["pstree.img, entry 0, byte 8: task 27751 occurs a second time"],
    );
}

#[test]
fn a_session_without_leader_is_a_remark() {
    let dir = copied();
    edit(dir.path(), "pstree.img", |entries| {
        entries[0]["sid"] = json!(5)
    });
    let report = check(dir.path()).unwrap();
    assert!(report.is_whole());
    let remark = "pstree.img, entry 0, byte 8: no process of the tree leads session 5; a restore \
                  needs --shell-job";
    assert_eq!(report.remarks[0].to_string(), remark);
}

#[test]
fn numbers_that_lead_nowhere_are_told() {
    let fd = |dir: &Path| edit(dir, "fdinfo-2.img", |e| e[2]["id"] = json!(99));
    let told = "fdinfo-2.img, entry 2, byte 32: descriptor 2 of type REG refers to file 99, which \
                is not there";
    assert_told(fd, &[told]);
    let cwd = |dir: &Path| edit(dir, "fs-27751.img", |e| e[0]["cwd_id"] = json!(99));
    let told = "fs-27751.img: cwd_id refers to regular file 99, which is not there";
    assert_told(cwd, &[told]);
    let exe = |dir: &Path| edit(dir, "mm-27751.img", |e| e[0]["exe_file_id"] = json!(99));
    let told = "mm-27751.img: exe_file_id refers to regular file 99, which is not there";
    assert_told(exe, &[told]);
    let kind = |dir: &Path| edit(dir, "files.img", |e| e[5]["type"] = json!("PIPE"));
    assert_told(
        kind,
        &[
            "files.img, entry 5, byte 385: file 6 of type PIPE has no such part, or one with \
             another id",
            "fs-27751.img: root_id refers to regular file 6, which is not there",
        ],
    );
}

#[test]
fn mappings_and_runs_are_held_against_each_other() {
    let overlap = |dir: &Path| {
        edit(dir, "mm-27751.img", |e| {
            let end = e[0]["vmas"][0]["end"].as_u64().unwrap();
            e[0]["vmas"][0]["end"] = json!(end + 4096);
        });
    };
    let dir = copied();
    overlap(dir.path());
    let told = problems(dir.path());
    assert_eq!(told.len(), 1);
    assert!(
        told[0].ends_with("begins before the end of the one before it"),
        "{told:?}"
    );
    let unmapped = |dir: &Path| {
        edit(dir, "mm-27751.img", |e| {
            let vmas = e[0]["vmas"].as_array_mut().unwrap();
            vmas.retain(|vma| vma["status"] != json!(0x221));
        });
    };
    let dir = copied();
    unmapped(dir.path());
    let told = problems(dir.path());
    assert_eq!(told.len(), 1);
    assert!(
        told[0].starts_with("pagemap-27751.img: page run"),
        "{told:?}"
    );
    assert!(told[0].contains("is outside of every mapping"), "{told:?}");
}

#[test]
fn pages_files_fit_exactly() {
    let cut = |dir: &Path| {
        let file = fs::OpenOptions::new()
            .write(true)
            .open(dir.join("pages-1.img"))
            .unwrap();
        file.set_len(114_687).unwrap();
    };
    assert_told(
        cut,
        &["pages-1.img: 114687 bytes where the pagemap says 114688"],
    );
    let parent = |dir: &Path| {
        edit(dir, "pagemap-27751.img", |e| {
            e[1]["flags"] = json!(1);
        })
    };
    let dir = copied();
    parent(dir.path());
    let told = problems(dir.path());
    assert_eq!(told.len(), 1);
    assert!(
        told[0].starts_with("pages-1.img: 114688 bytes where the pagemap says"),
        "{told:?}"
    );
}

#[test]
fn pages_in_a_parent_are_looked_for_there() {
    let dir = copied();
    fs::create_dir(dir.path().join("before")).unwrap();
    for name in ["pagemap-27751.img", "pages-1.img"] {
        fs::copy(
            Path::new(GOLDEN).join(name),
            dir.path().join("before").join(name),
        )
        .unwrap();
    }
    edit(dir.path(), "pagemap-27751.img", |entries| {
        let runs = entries.as_array_mut().unwrap().iter_mut().skip(1);
        runs.for_each(|run| run["flags"] = json!(1));
    });
    fs::write(dir.path().join("pages-1.img"), "").unwrap();
    let told = problems(dir.path());
    assert!(
        told.len() == 1 && told[0].contains("is in no parent"),
        "{told:?}"
    );
    std::os::unix::fs::symlink("before", dir.path().join("parent")).unwrap();
    assert_eq!(problems(dir.path()), Vec::<String>::new());
}

#[test]
fn lists_have_their_lengths() {
    let change = |dir: &Path| {
        edit(dir, "core-27751.img", |e| {
            e[0]["tc"]["sigactions"].as_array_mut().unwrap().pop();
            e[0]["tc"]["rlimits"]["rlimits"]
                .as_array_mut()
                .unwrap()
                .pop();
            e[0]["thread_info"]["fpregs"]["st_space"]
                .as_array_mut()
                .unwrap()
                .pop();
            e[0]["thread_core"]["creds"]["cap_inh"] = json!([0]);
        });
    };
    let count = |field, found, expected| {
        format!("core-27751.img: {field} has {found} elements where {expected} are expected")
    };
    let dir = copied();
    change(dir.path());
    let expected = [
        count("creds.cap_inh", 1, 2),
        count("fpregs.st_space", 31, 32),
        count("tc.sigactions", 61, 62),
        count("tc.rlimits", 15, 16),
    ];
    assert_eq!(problems(dir.path()), expected);
}

#[test]
fn damaged_files_are_told_once_and_all_of_them() {
    let change = |dir: &Path| {
        let append = |name: &str, bytes: &[u8]| {
            let mut file = fs::read(dir.join(name)).unwrap();
            file.extend_from_slice(bytes);
            fs::write(dir.join(name), file).unwrap();
        };
        append("fs-27751.img", &[0; 2]);
        append("ids-27751.img", &[0; 4]);
        append("mm-27751.img", &[9, 0, 0, 0, 1]);
        fs::write(dir.join("pstree.img"), b"nonsense").unwrap();
    };
    let dir = copied();
    change(dir.path());
    let told = problems(dir.path());
    let expected = [
        "pstree.img is no image of a known kind",
        "ids-27751.img, entry 1, byte 36: task_kobj_ids_entry has no vm_id, which is required",
        "ids-27751.img: 2 entries where this kind has one",
        "mm-27751.img, entry 1, byte 1008: 9 bytes announced and 1 left in the file",
        "fs-27751.img, entry 1, byte 18: 2 stray bytes at the end of the file",
    ];
    for line in expected {
        assert!(told.iter().any(|l| l == line), "{line} in {told:#?}");
    }
}

#[test]
fn a_pre_dump_is_told_from_a_dump() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["pagemap-27751.img", "pages-1.img", "inventory.img"] {
        fs::copy(Path::new(GOLDEN).join(name), dir.path().join(name)).unwrap();
    }
    edit(dir.path(), "inventory.img", |e| {
        *e = json!([{"img_version": 0}])
    });
    let expected = "inventory.img: this is a pre-dump, which can only be a parent of a dump";
    assert_eq!(problems(dir.path()), [expected]);
}

#[test]
fn contents_of_bpf_maps_belong_to_them() {
    let map = json!({"type": "BPFMAP", "id": 900, "bpf": {
        "id": 900, "flags": 2, "pos": 0, "map_type": 1, "key_size": 4, "value_size": 8, "map_id": 7,
        "max_entries": 3, "map_flags": 0, "memlock": 0, "frozen": false, "map_name": "m", "ifindex": 0,
        "fown": {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0},
    }});
    let with_data = |map_id: u32, count: u32| {
        let map = map.clone();
        move |dir: &Path| {
            edit(dir, "files.img", |entries| {
                entries.as_array_mut().unwrap().push(map);
            });
            // Twelve bytes: one key and one value.
            let data = json!({"magic": "BPFMAP_DATA", "entries": [{
                "map_id": map_id, "keys_bytes": 4, "values_bytes": 8, "count": count,
                "extra": "AAAAAAAAAAAAAAAA",
            }]});
            let mut bytes = Vec::new();
            encode(data.to_string().as_bytes(), &mut bytes).unwrap();
            fs::write(dir.join("bpfmap-data.img"), bytes).unwrap();
        }
    };
    assert_told(with_data(7, 1), &[]);
    let dir = copied();
    with_data(8, 1)(dir.path());
    let told = problems(dir.path());
    assert!(told.len() == 1 && told[0].contains("BPF map 8"), "{told:?}");
    let dir = copied();
    with_data(7, 2)(dir.path());
    let told = problems(dir.path());
    assert!(
        told.len() == 2 && told[0].contains("keys_bytes"),
        "{told:?}"
    );
}
