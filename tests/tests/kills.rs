//! The engine itself dies at any moment: the source goes on, or nothing of the copy is left.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use firn_tests::{Sandbox, Task, firn_path, isolated};

const COUNTER: &str = env!("CARGO_BIN_EXE_counter");
/// Memory of the source: enough that a dump and a restore last tens of milliseconds.
const MIB: &str = "256";

fn start<'a>(sandbox: &'a Sandbox, dir: &Path) -> Task<'a> {
    let task = Task::spawn(sandbox, dir, COUNTER, ["count", MIB]);
    sandbox.wait_until(60, "the program does not count", || count(dir) > 10);
    task
}

fn count(dir: &Path) -> u64 {
    let text = std::fs::read_to_string(dir.join("count")).unwrap_or_default();
    text.parse().unwrap_or(0)
}

/// Runs the command and kills it after `delay`; returns whether it was killed before its end.
fn kill_after(command: &mut Command, delay: Duration) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().expect("the engine starts");
    std::thread::sleep(delay);
    child.kill().expect("it is our child");
    !child.wait().expect("it is our child").success()
}

/// How long the command takes when it is left alone.
fn time(command: impl FnOnce()) -> Duration {
    let start = Instant::now();
    command();
    start.elapsed()
}

#[test]
fn killed_dump_leaves_the_source_running() {
    isolated("killed_dump_leaves_the_source_running", &[], |sandbox| {
        let dir = sandbox.make_dir("work");
        let task = start(sandbox, &dir);
        let whole = sandbox.make_dir("whole");
        let took = time(|| drop(task.dump(&whole, &["-R"]).expect_success("dump")));
        let mut killed = 0;
        for step in 1..=20u32 {
            let images = sandbox.make_dir(&format!("images-{step}"));
            let mut dump = task.dump_command(&images);
            killed += u32::from(kill_after(dump.arg("-R"), took * step / 20));
            // The rest of the engine takes back what was done.
            sandbox.wait_until(60, "the dump goes on after its death", || {
                sandbox.pids() == [task.pid()]
            });
            assert_all_or_nothing(&images);
            let before = count(&dir);
            sandbox.wait_until(60, "the source does not run after its dumper died", || {
                assert!(
                    task.is_alive(),
                    "the source died with its dumper in step {step}: {}",
                    std::fs::read_to_string(dir.join("stderr")).unwrap_or_default()
                );
                !task.is_stopped() && count(&dir) > before
            });
            std::fs::remove_dir_all(&images).expect("the images are ours");
        }
        assert!(
            killed >= 5,
            "only {killed} of 20 dumps were killed before their end"
        );
        let images = sandbox.make_dir("images");
        task.dump(&images, &[]).expect_success("dump after all");
        task.restore(&images);
        let before = count(&dir);
        sandbox.wait_until(60, "the restored task does not count", || {
            count(&dir) > before
        });
        task.kill();
    });
}

/// A dump that was killed is complete if it had come that far, and else leaves no images.
#[track_caller]
fn assert_all_or_nothing(images: &Path) {
    if images.join("inventory.img").exists() {
        return;
    }
    let entries = std::fs::read_dir(images).expect("the directory is readable");
    let names = entries.map(|entry| entry.expect("readable").file_name());
    let left: Vec<_> = names.filter(|name| *name != "dump.log").collect();
    assert!(left.is_empty(), "the killed dump left {left:?}");
}

#[test]
fn killed_restore_leaves_no_tasks() {
    isolated("killed_restore_leaves_no_tasks", &[], |sandbox| {
        let dir = sandbox.make_dir("work");
        let task = start(sandbox, &dir);
        let images = sandbox.make_dir("images");
        task.dump(&images, &[]).expect_success("dump");
        let took = time(|| task.restore(&images));
        task.kill();
        let mut killed = 0;
        for step in 1..=20u32 {
            let mut restore = Command::new(firn_path());
            restore
                .args(["restore", "-d", "-o", "restore.log", "-D"])
                .arg(&images);
            if kill_after(&mut restore, took * step / 20) {
                killed += 1;
            }
            settle(sandbox, &task, &dir);
        }
        assert!(
            killed >= 5,
            "only {killed} of 20 restores were killed before their end"
        );
        task.restore(&images);
        task.kill();
    });
}

/// After a restorer died, either nothing is left of the tree, or the restore was complete and the
/// task works; in no case a half-made or stopped task.
#[track_caller]
fn settle(sandbox: &Sandbox, task: &Task<'_>, dir: &Path) {
    let before = count(dir);
    sandbox.wait_until(60, "a half-restored task is left", || {
        sandbox.pids().is_empty() || (!task.is_stopped() && count(dir) > before)
    });
    task.kill();
    sandbox.assert_nothing_left();
}

/// A restore that fails while its tasks are being born takes all of them back, also those that have
/// not yet said a word.
#[test]
fn failed_restore_leaves_no_newborn_tasks() {
    isolated(
        "failed_restore_leaves_no_newborn_tasks",
        &["sh"],
        |sandbox| {
            let dir = sandbox.make_dir("work");
            let script =
                "i=0; while [ $i -lt 24 ]; do sleep 1000 & i=$((i + 1)); done; : > ready; wait";
            let task = Task::spawn(sandbox, &dir, "sh", ["-c", script]);
            sandbox.wait_until(60, "the tree does not stand", || dir.join("ready").exists());
            let images = sandbox.make_dir("images");
            task.dump(&images, &[]).expect_success("dump");
            // The root has a regular file for its root directory, which it notices after its forks.
            let pid = task.pid();
            let mm = decode(sandbox, &images.join(format!("mm-{pid}.img")));
            let exe = number_after(&mm, "\"exe_file_id\":");
            let path = images.join(format!("fs-{pid}.img"));
            let fs = decode(sandbox, &path);
            let root = number_after(&fs, "\"root_id\":");
            let changed = fs.replace(
                &format!("\"root_id\": {root}"),
                &format!("\"root_id\": {exe}"),
            );
            assert_ne!(changed, fs);
            let json = sandbox.dir().join("fs.json");
            std::fs::write(&json, changed).expect("the scratch directory is writable");
            let mut encode = Command::new(firn_path());
            encode.args(["image", "encode", "-i"]).arg(&json).arg("-o");
            sandbox.run(encode.arg(&path)).expect_success("encode");
            for _ in 0..12 {
                let refused = task.try_restore(&images);
                refused.expect_refusal(&["root directory"]);
                sandbox.assert_nothing_left();
            }
        },
    );
}

fn decode(sandbox: &Sandbox, image: &Path) -> String {
    let mut decode = Command::new(firn_path());
    let decoded = sandbox.run(decode.args(["image", "decode", "--pretty"]).arg(image));
    decoded.expect_success("decode").stdout
}

/// The number that follows a key in JSON text.
#[track_caller]
fn number_after(json: &str, key: &str) -> u64 {
    let (_, rest) = json.split_once(key).expect("the key is there");
    let digits: String = rest
        .trim_start()
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().expect("a number follows it")
}
