//! Debian's `crit`, a decoder that we had no hand in, reads our images and says what we say.

use std::path::Path;
use std::process::Command;

use firn_tests::{Sandbox, Task, image_files, isolated_server};
use serde_json::Value;

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");

/// Kinds of images that a tree with one of each object must give, by the start of the file name.
const KINDS: [&str; 20] = [
    "bpfmap-data",
    "core-",
    "fdinfo-",
    "fifo-data",
    "filelocks",
    "files",
    "fs-",
    "ghost-file-",
    "ids-",
    "inventory",
    "memfd",
    "mm-",
    "pagemap-",
    "pagemap-shmem-",
    "pipes-data",
    "pstree",
    "remap-fpath",
    "sk-queues",
    "stats-dump",
    "tcp-stream-",
];

/// Types of open files that files.img must have, as crit names them. Pidfds are younger than Debian's crit,
/// and files of plugins need a program that embeds the engine.
const FILES: [&str; 12] = [
    "BPFMAP",
    "EVENTFD",
    "EVENTPOLL",
    "FANOTIFY",
    "FIFO",
    "INOTIFY",
    "MEMFD",
    "NS",
    "PIPE",
    "REG",
    "SIGNALFD",
    "TIMERFD",
];
/// Kinds of sockets that files.img must have.
const SOCKETS: [&str; 4] = ["UNIXSK", "INETSK", "NETLINKSK", "PACKETSK"];

/// Dumps a program that has one of each object; returns once its tasks are gone.
fn dump_objects(sandbox: &Sandbox, images: &Path) {
    let dir = sandbox.make_dir("work");
    let task = Task::spawn(sandbox, &dir, "python3", [format!("{PROGRAMS}/objects.py")]);
    sandbox.wait_until(60, "the program is not ready", || {
        assert!(task.is_alive(), "{}", read(&dir.join("stderr")));
        read(&dir.join("stdout")).contains("ready")
    });
    task.dump(images, &["--file-locks"]).expect_success("dump");
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn crit_decode(sandbox: &Sandbox, image: &Path) -> Value {
    let mut command = Command::new("crit");
    let decoded = sandbox.run(command.args(["decode", "-i"]).arg(image));
    let decoded = decoded.expect_success(&format!("crit decode -i {}", image.display()));
    serde_json::from_str(&decoded.stdout).expect("crit prints JSON")
}

fn firn_decode(sandbox: &Sandbox, image: &Path) -> Value {
    let decoded = sandbox.firn(["image".as_ref(), "decode".as_ref(), image.as_os_str()]);
    let decoded = decoded.expect_success(&format!("firn image decode {}", image.display()));
    serde_json::from_str(&decoded.stdout).expect("firn image decode prints JSON")
}

/// Collects where `ours` lacks or contradicts what `theirs` says. What only we say is from a newer
/// schema than theirs.
fn compare(at: &str, theirs: &Value, ours: &Value, differences: &mut Vec<String>) {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => {
            for (name, value) in theirs {
                let at = format!("{at}.{name}");
                match ours.get(name) {
                    Some(our_value) => compare(&at, value, our_value, differences),
                    None => differences.push(format!("{at}: only crit has it, {value}")),
                }
            }
        }
        (Value::Array(theirs), Value::Array(ours)) if theirs.len() == ours.len() => {
            for (index, (their_value, our_value)) in theirs.iter().zip(ours).enumerate() {
                compare(
                    &format!("{at}[{index}]"),
                    their_value,
                    our_value,
                    differences,
                );
            }
        }
        _ if theirs == ours => {}
        _ => differences.push(format!("{at}: crit says {theirs}, we say {ours}")),
    }
}

#[test]
fn crit_decodes_what_we_dump() {
    // The dump's network lock stays, and goes with the network.
    isolated_server(
        "crit_decodes_what_we_dump",
        &["crit", "python3"],
        |sandbox| {
            let images = sandbox.make_dir("images");
            dump_objects(sandbox, &images);
            let files = image_files(&images);
            for kind in KINDS {
                let of_kind = |name: &str| name.starts_with(kind);
                let found = files.iter().any(|file| {
                    file.file_name()
                        .is_some_and(|name| of_kind(&name.to_string_lossy()))
                });
                assert!(found, "the dump has no {kind} image");
            }
            let decoded = crit_decode(sandbox, &images.join("files.img"));
            let entries = decoded["entries"].as_array().expect("a list");
            for wanted in FILES {
                let found = entries.iter().any(|entry| entry["type"] == wanted);
                assert!(found, "files.img has no {wanted}");
            }
            let mut differences = Vec::new();
            for file in &files {
                let name = file
                    .file_name()
                    .expect("image files have names")
                    .to_string_lossy();
                let (theirs, ours) = (crit_decode(sandbox, file), firn_decode(sandbox, file));
                if name == "files.img" {
                    let said = theirs.to_string();
                    let missing = SOCKETS.iter().find(|kind| !said.contains(**kind));
                    assert_eq!(missing, None, "a kind of sockets is missing");
                }
                compare(&name, &theirs, &ours, &mut differences);
            }
            assert!(differences.is_empty(), "{}", differences.join("\n"));
        },
    );
}

#[test]
fn our_own_check_finds_the_directory_whole() {
    // The dump's network lock stays, and goes with the network.
    isolated_server(
        "our_own_check_finds_the_directory_whole",
        &["python3"],
        |sandbox| {
            let images = sandbox.make_dir("images");
            dump_objects(sandbox, &images);
            let directory = images.as_os_str();
            sandbox
                .firn(["image".as_ref(), "check".as_ref(), directory])
                .expect_success("image check");
            let file = images.join("files.img");
            let whole = std::fs::read(&file).expect("the image is readable");
            std::fs::write(&file, &whole[..whole.len() - 3]).expect("the image is ours");
            let broken = sandbox.firn(["image".as_ref(), "check".as_ref(), directory]);
            assert!(
                !broken.status.success(),
                "a truncated files.img passed the check"
            );
            let said = format!("{}{}", broken.stdout, broken.stderr);
            assert!(said.contains("files.img"), "does not name the file: {said}");
        },
    );
}

#[test]
fn comparison_finds_what_is_missing_and_what_differs() {
    let theirs = serde_json::json!({"a": 1, "b": [1, 2], "c": {"d": "x"}});
    let ours = serde_json::json!({"a": 2, "b": [1], "c": {}, "newer": 1});
    let mut differences = Vec::new();
    compare("image", &theirs, &ours, &mut differences);
    let places: Vec<_> = differences
        .iter()
        .map(|line| line.split(':').next())
        .collect();
    assert_eq!(
        places,
        [Some("image.a"), Some("image.b"), Some("image.c.d")]
    );
    differences.clear();
    compare("image", &theirs, &theirs, &mut differences);
    assert!(differences.is_empty());
}
