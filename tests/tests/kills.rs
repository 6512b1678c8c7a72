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

/// Commands that must have been killed before their end, for a test to mean anything.
const MIN_KILLED: u32 = 5;
/// Commands that are run at least, each killed a little later than the one before.
const STEPS: u32 = 20;

/// When to kill: spread over the time that the last whole run took, whatever else the machine does.
struct Schedule {
    took: Duration,
    step: u32,
    killed: u32,
}

impl Schedule {
    fn new(took: Duration) -> Schedule {
        Schedule {
            took,
            step: 0,
            killed: 0,
        }
    }

    /// Counts the steps, until enough commands were killed.
    fn next(&mut self) -> Option<u32> {
        let enough = self.step >= STEPS && self.killed >= MIN_KILLED;
        assert!(
            enough || self.step < 10 * STEPS,
            "only {} of {} commands were killed before their end",
            self.killed,
            self.step
        );
        self.step += 1;
        (!enough).then_some(self.step)
    }

    /// Runs the command and kills it when this step is due; one that was faster says what a whole run
    /// takes.
    fn run(&mut self, command: &mut Command) {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let delay = self.took * (self.step % STEPS + 1) / STEPS;
        let start = Instant::now();
        let mut child = command.spawn().expect("the engine starts");
        while start.elapsed() < delay {
            if child.try_wait().expect("it is our child").is_some() {
                self.took = start.elapsed();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().expect("it is our child");
        let status = child.wait().expect("it is our child");
        self.killed += u32::from(!status.success());
    }
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
        let mut schedule = Schedule::new(took);
        while let Some(step) = schedule.next() {
            let images = sandbox.make_dir(&format!("images-{step}"));
            let mut dump = task.dump_command(&images);
            schedule.run(dump.arg("-R"));
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
        let mut schedule = Schedule::new(took);
        while schedule.next().is_some() {
            let mut restore = Command::new(firn_path());
            restore
                .args(["restore", "-d", "-o", "restore.log", "-D"])
                .arg(&images);
            schedule.run(&mut restore);
            settle(sandbox, &task, &dir);
        }
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
