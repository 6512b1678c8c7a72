//! The engine itself dies at any moment: the source goes on, or nothing of the copy is left.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use firn_tests::{Sandbox, Task, firn_path, isolated, isolated_server, skip};

const COUNTER: &str = env!("CARGO_BIN_EXE_counter");
const MANY_STATES: &str = env!("CARGO_BIN_EXE_many-states");
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

/// Calls between which the worker may be killed: those by which a tracer works, and those by which any of its threads
/// waits for others. The process that was called makes the former as well, but never as many.
const CALLS: [&str; 2] = ["ptrace", "futex"];

fn start_many_states<'a>(sandbox: &'a Sandbox, dir: &Path) -> Task<'a> {
    let task = Task::spawn(sandbox, dir, MANY_STATES, ["count"]);
    sandbox.wait_until(60, "the program does not count", || count(dir) > 10);
    at_rest(sandbox, &task);
    task
}

/// What shows of its tasks when all of them have come to rest in their calls.
fn at_rest(sandbox: &Sandbox, task: &Task<'_>) -> String {
    let mut seen = String::new();
    sandbox.wait_until(60, "not all threads wait in their calls", || {
        seen = visible(task);
        seen.matches("waits-").count() == 8 && !seen.contains("running")
    });
    seen
}

/// What shows of the tasks of a tree that are not as they were: mappings, what each thread blocks, who traces it,
/// and in which call it waits, with its arguments and the place where it was made.
fn visible(task: &Task<'_>) -> String {
    let mut seen = String::new();
    for pid in task.tree() {
        let dir = format!("/proc/{pid}/task");
        let threads = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        let mut threads: Vec<_> = threads.map(|entry| entry.path()).collect();
        threads.sort();
        for thread in threads {
            let read = |name| std::fs::read_to_string(thread.join(name)).unwrap_or_default();
            let status = read("status");
            let told = |line: &&str| line.starts_with("SigBlk") || line.starts_with("TracerPid");
            let told: Vec<&str> = status.lines().filter(told).collect();
            let name = read("comm");
            let call = if name.starts_with("waits-") {
                read("syscall")
            } else {
                String::new()
            };
            seen += &format!("{}: {name}{}\n{call}", thread.display(), told.join("\n"));
        }
        seen += &std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        seen += &std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    }
    seen
}

/// The process that works in the tasks is killed itself, at each call by which it does so: the one that was called
/// puts back what it had changed.
#[test]
fn killed_worker_leaves_the_source_as_it_was() {
    isolated(
        "killed_worker_leaves_the_source_as_it_was",
        &["strace"],
        |sandbox| {
            let dir = sandbox.make_dir("work");
            let task = start_many_states(sandbox, &dir);
            // A sleep that was interrupted once goes on by another call.
            let whole = sandbox.make_dir("whole");
            task.dump(&whole, &["-R"]).expect_success("dump");
            let before = at_rest(sandbox, &task);
            let (mut killed, mut put_back) = (0, 0);
            for call in CALLS {
                let mut nth = 1;
                loop {
                    let images = sandbox.make_dir(&format!("images-{call}-{nth}"));
                    let Some(said) = task.dump_killed_at(&images, call, nth, &["-R"]) else {
                        break;
                    };
                    killed += 1;
                    let is_put_back = said.contains("got back what it had changed");
                    put_back += u32::from(is_put_back);
                    // While nothing is changed, one moment is much like the next.
                    nth += if is_put_back { 1 } else { 4 };
                    assert_untouched(sandbox, &task, &dir, &before, &said);
                    std::fs::remove_dir_all(&images).expect("the images are ours");
                }
            }
            assert!(
                killed > 40 && put_back > 20,
                "{put_back} of {killed} kills were put back"
            );
            task.kill();
        },
    );
}

/// All threads are where they were, and those that compute go on.
#[track_caller]
fn assert_untouched(sandbox: &Sandbox, task: &Task<'_>, dir: &Path, before: &str, said: &str) {
    let last = count(dir);
    sandbox.wait_until(60, "the source is not as it was", || {
        assert!(task.is_alive(), "the source died: {said}{}", errors(dir));
        let now = visible(task);
        now == before && !task.is_stopped() && count(dir) > last
    });
}

fn errors(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("stderr")).unwrap_or_default()
}

/// Killed at any of these calls while its tree is to die, the dump has either taken nothing from it, or has complete
/// images, and the whole tree is dead.
#[test]
fn killed_worker_leaves_no_half_of_a_tree() {
    isolated(
        "killed_worker_leaves_no_half_of_a_tree",
        &["strace"],
        |sandbox| {
            let dir = sandbox.make_dir("work");
            let task = start_many_states(sandbox, &dir);
            let (mut nth, mut died) = (0, 0);
            loop {
                nth += 1;
                let images = sandbox.make_dir(&format!("images-{nth}"));
                let said = task.dump_killed_at(&images, "kill", nth, &[]);
                task.wait_until_gone();
                task.restore(&images);
                sandbox.wait_until(60, "what was restored does not go on", || task.is_alive());
                match said {
                    Some(said) => assert!(said.contains("was finished"), "kill {nth}: {said}"),
                    None => break,
                }
                died += 1;
            }
            assert_eq!(died, 2, "there are two processes to kill");
            task.kill();
        },
    );
}

/// The process that works is killed while TCP connections are in repair mode and their packets are held off: they go
/// on. The server waits for all of them at once; one that sleeps in a read of such a connection would be told EPERM
/// before anybody could do something.
#[test]
fn killed_worker_lets_connections_go_on() {
    let programs = ["strace", "python3"];
    isolated_server(
        "killed_worker_lets_connections_go_on",
        &programs,
        |sandbox| {
            let dir = sandbox.make_dir("server");
            let server = format!("{}/programs/echo-server.py", env!("CARGO_MANIFEST_DIR"));
            let task = Task::spawn(sandbox, &dir, "python3", [server]);
            let port = task.announced_port(&dir);
            let mut connections: Vec<TcpStream> = (0..3)
                .map(|_| {
                    TcpStream::connect(format!("127.0.0.1:{port}")).expect("the server listens")
                })
                .collect();
            let patience = Some(Duration::from_secs(60));
            let mut held = 0;
            for nth in 1.. {
                for (nr, stream) in connections.iter_mut().enumerate() {
                    stream.set_read_timeout(patience).expect("a duration");
                    let words = format!("{nth} {nr}");
                    stream.write_all(words.as_bytes()).expect("it is connected");
                    let mut heard = vec![0; words.len()];
                    stream.read_exact(&mut heard).expect("the server answers");
                    assert_eq!(heard, words.as_bytes(), "kill {nth}");
                }
                let images = sandbox.make_dir(&format!("images-{nth}"));
                let options = ["-R", "--tcp-established"];
                // By these calls queues are asked for their lengths, which the front does not.
                let Some(said) = task.dump_killed_at(&images, "ioctl", nth, &options) else {
                    break;
                };
                held += u32::from(said.contains("3 TCP connections went on"));
                let locks = sandbox.firn(["unlock", "--list"]).expect_success("list");
                assert!(
                    locks.stdout.is_empty(),
                    "kill {nth}, the lock stays: {said}"
                );
            }
            assert!(held >= 6, "connections were held {held} times");
            task.kill();
        },
    );
}

/// A cgroup (v2) of its own for a tree, which is gone with the value.
struct Group(PathBuf);

impl Group {
    /// Makes one where that hierarchy is; None where it is not, or no groups can be made.
    fn new(sandbox: &Sandbox) -> Option<Group> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let of_v2 = |line: &&str| line.contains(" - cgroup2 ");
        let mount = mounts.lines().find(of_v2)?.split(' ').nth(4)?;
        let path = Path::new(mount).join(sandbox.dir().file_name()?);
        std::fs::create_dir(&path).ok()?;
        Some(Group(path))
    }

    fn write(&self, file: &str, value: &str) {
        std::fs::write(self.0.join(file), value).expect("the group is ours");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.freeze"), "0");
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        // What was killed leaves it within a moment.
        for _ in 0..1000 {
            if std::fs::remove_dir(&self.0).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The worker is killed while the cgroup of the tree is frozen: it is thawed.
#[test]
fn killed_worker_leaves_no_frozen_group() {
    const NAME: &str = "killed_worker_leaves_no_frozen_group";
    isolated(NAME, &["strace"], |sandbox| {
        let Some(group) = Group::new(sandbox) else {
            return skip(NAME, "no cgroups of version 2 can be made here");
        };
        let dir = sandbox.make_dir("work");
        let task = start_many_states(sandbox, &dir);
        for pid in task.tree() {
            group.write("cgroup.procs", &pid.to_string());
        }
        let whole = sandbox.make_dir("whole");
        task.dump(&whole, &["-R"]).expect_success("dump");
        let before = at_rest(sandbox, &task);
        for nth in 1..=4 {
            let images = sandbox.make_dir(&format!("images-{nth}"));
            let said = task.dump_killed_at(&images, "ptrace", nth, &["-R"]);
            let said = said.expect("there are more threads to seize");
            assert!(said.contains("cgroup of the tasks was thawed"), "{said}");
            assert_untouched(sandbox, &task, &dir, &before, &said);
        }
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
