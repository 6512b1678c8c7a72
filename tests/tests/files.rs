//! Files that change between dump and restore, limits, and what can't be saved and is told.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use firn_tests::{Sandbox, Task, firn_path, isolated};

/// Starts a Python program, which prints `ready` when it holds what it wants.
fn start<'a>(sandbox: &'a Sandbox, dir: &Path, script: &str) -> Task<'a> {
    let task = Task::spawn(sandbox, dir, "python3", ["-c", script]);
    sandbox.wait_until(60, "the program is not ready", || {
        let read = |name| fs::read_to_string(dir.join(name)).unwrap_or_default();
        assert!(task.is_alive(), "{}", read("stderr"));
        read("stdout").contains("ready")
    });
    task
}

const HOLDER: &str = r#"
import os, time
log = open("app.log", "a")
data = open("data.txt", "r+")
fixed = open("fixed.txt")
print("ready", flush=True)
while True:
    time.sleep(1000)
"#;

fn append(path: &Path, text: &str) {
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(path)
        .expect("the test has made it");
    file.write_all(text.as_bytes()).expect("there is room");
}

/// Files, and a tree that had them open, as a dump has left them.
fn dumped_holder(sandbox: &Sandbox) -> (PathBuf, PathBuf, Task<'_>) {
    let (dir, images) = (sandbox.make_dir("work"), sandbox.make_dir("images"));
    for name in ["app.log", "data.txt", "fixed.txt"] {
        fs::write(dir.join(name), "12345").expect("the directory is ours");
    }
    let task = start(sandbox, &dir, HOLDER);
    task.dump(&images, &[]).expect_success("dump");
    (dir, images, task)
}

#[test]
fn policies_say_what_may_have_changed() {
    isolated(
        "policies_say_what_may_have_changed",
        &["python3"],
        |sandbox| {
            let (dir, images, task) = dumped_holder(sandbox);
            let refused = |options: &[&str], words: &[&str]| {
                task.try_restore_with(&images, options)
                    .expect_refusal(words);
            };

            // A log may grow, unless it may not.
            append(&dir.join("app.log"), "6789");
            refused(
                &["--file-policy", "*/app.log=exact"],
                &["app.log", "5 bytes", "9"],
            );
            // Other files may not, unless they may.
            append(&dir.join("data.txt"), "6789");
            refused(&[], &["data.txt", "5 bytes", "9"]);
            refused(
                &["--file-policy", "*.txt=exact", "--file-policy", "*=ignore"],
                &["data.txt"],
            );
            fs::write(dir.join("fixed.txt"), "54321").expect("the directory is ours");
            let grown = ["--file-policy", "*/data.txt=grown"];
            refused(
                &[&grown[..], &["--file-policy", "*/fixed.txt=exact"]].concat(),
                &["fixed.txt", "last written to"],
            );
            fs::write(dir.join("data.txt"), "123").expect("the directory is ours");
            refused(&grown, &["data.txt", "only 3"]);
            task.try_restore_with(&images, &["--file-policy", "*.txt=ignore"])
                .expect_success("restore");
            task.kill();
        },
    );
}

const MANY: &str = r#"
import os, time
kept = [os.open("/etc/hostname" if n % 2 else "/dev/null", os.O_RDONLY) for n in range(150)]
kept += [fd for _ in range(75) for fd in os.pipe()]
print("ready", flush=True)
while True:
    time.sleep(1000)
"#;

/// The dumper has duplicates of what it looks at, and a limit of its own.
#[test]
fn few_descriptors_are_enough_to_dump_many() {
    isolated(
        "few_descriptors_are_enough_to_dump_many",
        &["python3", "prlimit"],
        |sandbox| {
            let (dir, images) = (sandbox.make_dir("work"), sandbox.make_dir("images"));
            let task = start(sandbox, &dir, MANY);
            let pid = task.pid().to_string();
            let mut command = Command::new("prlimit");
            command.args(["--nofile=40:40"]).arg(firn_path());
            command.args(["dump", "-t", &pid, "-D"]).arg(&images);
            sandbox.run(&mut command).expect_success("dump");
            task.wait_until_gone();
            task.restore(&images);
            let count = fs::read_dir(format!("/proc/{pid}/fd"))
                .expect("it lives")
                .count();
            assert!(count >= 300, "{count} descriptors are left");
            task.kill();
        },
    );
}

const WATCHER: &str = r#"
import ctypes, time
libc = ctypes.CDLL(None)
inotify = libc.inotify_init1(0)
libc.inotify_add_watch(inotify, b".", 0x100)
open("new", "w").close()
print("ready", flush=True)
while True:
    time.sleep(1000)
"#;

#[test]
fn events_that_wait_are_told() {
    isolated("events_that_wait_are_told", &["python3"], |sandbox| {
        let (dir, images) = (sandbox.make_dir("work"), sandbox.make_dir("images"));
        let task = start(sandbox, &dir, WATCHER);
        let dumped = task.dump(&images, &[]).expect_success("dump");
        let told = dumped
            .stderr
            .contains("bytes of events wait in it and are not saved");
        assert!(told, "{}", dumped.stderr);
        task.restore(&images);
        task.kill();
    });
}

/// Appends an entry to the table of a task: its first one again, with more fields at its end, of which the last
/// of a number counts.
fn append_descriptor(table: &Path, fields: &[u8]) {
    let bytes = fs::read(table).expect("the dump wrote it");
    // The magic numbers, then the length of the first entry.
    let len = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
    let end = 12 + usize::try_from(len).expect("it is short");
    let entry = [&bytes[12..end], fields].concat();
    let len = u32::try_from(entry.len()).expect("it is short");
    let all = [&bytes, &len.to_le_bytes()[..], &entry].concat();
    fs::write(table, all).expect("there is room");
}

#[test]
fn tables_that_no_process_can_have_are_refused() {
    isolated(
        "tables_that_no_process_can_have_are_refused",
        &["python3"],
        |sandbox| {
            let (_, images, task) = dumped_holder(sandbox);
            let is_table = |path: &PathBuf| path.to_string_lossy().contains("fdinfo-");
            let mut files = firn_tests::image_files(&images).into_iter();
            let table = files.find(is_table).expect("it has descriptors");
            let good = fs::read(&table).expect("the dump wrote it");
            let refused = |words: &[&str]| {
                task.try_restore(&images).expect_refusal(words);
                sandbox.assert_nothing_left();
            };

            // Field 4 is the descriptor's number.
            append_descriptor(&table, b"\x20\xfe\xff\xff\xff\x07");
            refused(&["descriptor 2147483646", "limit", "ulimit -n"]);
            fs::write(&table, &good).expect("there is room");
            append_descriptor(&table, b"\x20\xfe\xff\xff\xff\x0f");
            refused(&["descriptor number 4294967294", "not possible"]);
            // Four billion entries of no bytes each, behind the good ones.
            fs::write(&table, &good).expect("there is room");
            let file = fs::File::options().write(true).open(&table);
            let file = file.expect("the dump wrote it");
            file.set_len(16 << 30).expect("a file with a hole");
            refused(&["open file 0"]);

            fs::write(&table, &good).expect("there is room");
            task.restore(&images);
            task.kill();
        },
    );
}
