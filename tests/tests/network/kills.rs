//! Restores that are killed when connections are about to run.

use std::cell::Cell;
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use firn_tests::{HERE, Network, Sandbox, Task, firn_path, isolated};

use super::{KEEP, Talk, connect, longest_silence, move_once, start, talk};

/// Calls of a restore that end connections, or let tasks and packets go.
const FINAL_CALLS: &str = "setsockopt,sendmsg,shutdown,ptrace,write";

/// A restore whose calls are traced, with more options for the tracer.
fn traced_restore(images: &Path, trace: &Path, options: &[&str]) -> ExitStatus {
    let mut restore = Command::new("strace");
    restore.arg("-o").arg(trace);
    restore
        .args(["-e", &format!("trace={FINAL_CALLS}")])
        .args(options);
    restore
        .arg(firn_path())
        .args(["restore", "-d", "-D"])
        .arg(images)
        .args(KEEP);
    restore
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    restore.status().expect("the tracer starts")
}

/// Whether the restore has noted that all tasks live without it, by the trace of its calls: from then on somebody
/// finishes what it is killed in.
fn is_past_return(calls: &str) -> bool {
    let noted = |call: &str| {
        call.starts_with("write(") && call.contains(r#", "\2", 1)"#) && call.ends_with(" = 1")
    };
    calls.lines().any(noted)
}

/// A tree whose restores are killed.
struct Victim<'a> {
    sandbox: &'a Sandbox,
    name: &'a str,
    task: &'a Task<'a>,
    /// Whether there is news from every part of it since the last time.
    goes_on: &'a dyn Fn() -> bool,
}

impl Victim<'_> {
    fn dump(&self, step: usize) -> PathBuf {
        let images = self
            .sandbox
            .make_dir(&format!("images-{}-{step}", self.name));
        self.task.dump(&images, KEEP).expect_success("dump");
        images
    }

    fn wait_until_it_goes_on(&self) {
        // What was on its way counts only once.
        for _ in 0..2 {
            let silent = "some of the tree, or a connection, is silent";
            self.sandbox.wait_until(60, silent, self.goes_on);
        }
    }

    /// Kills restores at each of their last calls, from the one before the first that `begins` is true of. The next
    /// one works where nothing is left of the tree; else the tree goes on, all of it, and so do its connections.
    fn kill_restores(&self, begins: &dyn Fn(&str) -> bool) {
        let (sandbox, name) = (self.sandbox, self.name);
        let trace = |images: &Path| images.join("calls");
        let images = self.dump(0);
        let status = traced_restore(&images, &trace(&images), &[]);
        assert_eq!(status.code(), Some(0), "the traced restore");
        let calls = std::fs::read_to_string(trace(&images)).expect("the trace is written");
        let first = calls.lines().position(begins);
        let first = first.expect("it comes so far");
        let kinds: Vec<&str> = calls
            .lines()
            .filter_map(|call| Some(call.split_once('(')?.0))
            .collect();
        let (mut gone, mut lived) = (0, 0);
        // Restores differ by a few calls, so the same number may come later in one of them: where too few have been
        // killed early enough, earlier ones follow.
        let steps = (first - 1..kinds.len()).chain((0..first - 1).rev());
        for step in steps {
            if step < first - 1 && gone >= 2 {
                break;
            }
            self.wait_until_it_goes_on();
            let images = self.dump(step + 1);
            // The tracer counts the calls of each kind.
            let kind = kinds[step];
            let nth = kinds[..=step]
                .iter()
                .filter(|other| **other == kind)
                .count();
            let kill = format!("inject={kind}:signal=KILL:when={nth}");
            let status = traced_restore(&images, &trace(&images), &["-e", &kill]);
            let calls = std::fs::read_to_string(trace(&images)).expect("the trace is written");
            let last = calls
                .lines()
                .rfind(|call| call.contains('('))
                .unwrap_or_default();
            println!("{name}, step {step}, killed at {kind} {nth}: {last:.120}");
            if is_past_return(&calls) {
                lived += 1;
                sandbox.wait_until(60, "the lock stays", || {
                    let locks = sandbox.firn(["unlock", "--list"]).expect_success("list");
                    locks.stdout.is_empty()
                });
            } else {
                let was_killed = "the restore was not killed";
                assert_eq!(status.code(), None, "{was_killed} in step {step}");
                gone += 1;
                self.task.wait_until_gone();
                self.task
                    .try_restore_with(&images, KEEP)
                    .expect_success(&format!("restore after step {step}"));
            }
        }
        self.wait_until_it_goes_on();
        move_once(self.task, &sandbox.make_dir(&format!("images-{name}")), &[]);
        println!("{name}: {gone} restores died with their trees, {lived} without");
        assert!(gone >= 2 && lived >= 2, "{calls}");
    }
}

/// The end of the first connection's repair.
fn ends_repair(call: &str) -> bool {
    call.contains("TCP_REPAIR, [0]")
}

/// Ends the talks when it is dropped, also by a failed assertion: somebody waits for their threads, whatever has
/// become of the server.
struct Enough<'a> {
    is_enough: &'a AtomicBool,
    streams: &'a [TcpStream],
}

impl Drop for Enough<'_> {
    fn drop(&mut self) {
        self.is_enough.store(true, Ordering::Relaxed);
        if thread::panicking() {
            for stream in self.streams {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }
}

/// Whether more has come back than the last time.
fn has_heard(talk: &Talk, before: &Cell<u64>) -> bool {
    let now = talk.returned.load(Ordering::Relaxed);
    before.replace(now) < now
}

/// A restore is killed while it lets many tasks go: they live all or none.
#[test]
fn a_killed_restore_parts_no_tree() {
    let name = "kills::a_killed_restore_parts_no_tree";
    isolated(name, &["ip", "nsenter", "strace"], |sandbox| {
        const CHILDREN: usize = 5;
        let network = Network::enter(sandbox);
        let (task, port) = start(sandbox, "server", &["crowd", &CHILDREN.to_string()]);
        let stream = connect(&network, HERE[0], port);
        let one = Talk::default();
        let enough = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| talk(&stream, &one, &enough));
            let _enough = Enough {
                is_enough: &enough,
                streams: std::slice::from_ref(&stream),
            };
            let before: [Cell<u64>; CHILDREN] = Default::default();
            let heard = Cell::new(0);
            let goes_on = || {
                let has_counted = |nr: usize| {
                    let path = sandbox.dir().join(format!("server/count-{nr}"));
                    let text = std::fs::read_to_string(path).unwrap_or_default();
                    let now = text.parse().unwrap_or(0);
                    before[nr].replace(now) < now
                };
                let counted: Vec<bool> = (0..CHILDREN).map(has_counted).collect();
                has_heard(&one, &heard) && counted.into_iter().all(|one| one)
            };
            let victim = Victim {
                sandbox,
                name: "crowd",
                task: &task,
                goes_on: &goes_on,
            };
            victim.kill_restores(&ends_repair);
        });
        let status = task.wait(60).exit_status();
        assert_eq!(status, Some(0), "the server has failed");
    });
}

/// A restore is killed when connections are about to run: no peer is told, and no byte is lost.
#[test]
fn a_killed_restore_keeps_its_connections() {
    let name = "kills::a_killed_restore_keeps_its_connections";
    isolated(name, &["ip", "nsenter", "strace"], |sandbox| {
        let network = Network::enter(sandbox);
        let (task, port) = start(sandbox, "server", &["echo", "2"]);
        let streams = HERE.map(|address| connect(&network, address, port));
        let talks = [Talk::default(), Talk::default()];
        let enough = AtomicBool::new(false);
        thread::scope(|scope| {
            for (stream, one) in streams.iter().zip(&talks) {
                scope.spawn(|| talk(stream, one, &enough));
            }
            let _enough = Enough {
                is_enough: &enough,
                streams: &streams,
            };
            let before = [Cell::new(0), Cell::new(0)];
            let goes_on = || {
                let [one, other] = [0, 1].map(|n| has_heard(&talks[n], &before[n]));
                one && other
            };
            let victim = Victim {
                sandbox,
                name: "busy",
                task: &task,
                goes_on: &goes_on,
            };
            victim.kill_restores(&ends_repair);
        });
        let status = task.wait(60).exit_status();
        assert_eq!(status, Some(0), "the server has failed");
    });
}

/// The same where the peer does not read, so that the queues are full.
#[test]
fn a_killed_restore_keeps_full_queues() {
    let name = "kills::a_killed_restore_keeps_full_queues";
    isolated(name, &["ip", "nsenter", "strace"], |sandbox| {
        const BYTES: u64 = 16 << 20;
        let network = Network::enter(sandbox);
        let (task, port) = start(sandbox, "server", &["pour", &BYTES.to_string()]);
        let mut stream = connect(&network, HERE[1], port);
        // Until both queues are full; with less in them fewer calls are made.
        thread::sleep(Duration::from_millis(300));
        let victim = Victim {
            sandbox,
            name: "full",
            task: &task,
            goes_on: &|| true,
        };
        victim.kill_restores(&ends_repair);
        longest_silence(&mut stream, BYTES);
        let status = task.wait(60).exit_status();
        assert_eq!(status, Some(0), "the server has failed");
    });
}
