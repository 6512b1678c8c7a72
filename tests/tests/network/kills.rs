//! Restores that are killed when connections are about to run.

use std::cell::Cell;
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use firn_tests::{HERE, Network, Sandbox, Task, firn_path, isolated};

use super::{KEEP, Talk, connect, longest_silence, move_once, start, talk};

/// Calls of a restore that end connections, or let tasks and packets go.
const FINAL_CALLS: &str = "setsockopt,sendmsg,shutdown,ptrace";

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

/// Threads that no longer die with the restore, by the trace of its calls.
fn nr_released(calls: &str) -> usize {
    let released = |call: &&str| call.contains("PTRACE_SETOPTIONS") && call.ends_with(" = 0");
    calls.lines().filter(released).count()
}

/// Kills restores at each of their last calls, beginning before any connection is out of repair mode. The
/// next one works where nothing is left of the tree, and where the tree runs, it was complete.
fn kill_restores(sandbox: &Sandbox, name: &str, task: &Task<'_>, goes_on: &dyn Fn() -> bool) {
    let dump = |step: usize| {
        let images = sandbox.make_dir(&format!("images-{name}-{step}"));
        task.dump(&images, KEEP).expect_success("dump");
        images
    };
    let trace = |images: &Path| images.join("calls");
    let images = dump(0);
    let status = traced_restore(&images, &trace(&images), &[]);
    assert_eq!(status.code(), Some(0), "the traced restore");
    let calls = std::fs::read_to_string(trace(&images)).expect("the trace is written");
    let first = calls
        .lines()
        .position(|call| call.contains("TCP_REPAIR, [0]"));
    let first = first.expect("repair mode ends");
    let kinds: Vec<&str> = calls
        .lines()
        .filter_map(|call| Some(call.split_once('(')?.0))
        .collect();
    let nr_threads = nr_released(&calls);
    let (mut gone, mut lived) = (0, 0);
    for step in first - 1..kinds.len() {
        sandbox.wait_until(60, "the connections are silent", goes_on);
        let images = dump(step + 1);
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
        if nr_released(&calls) == nr_threads {
            lived += 1;
            let directory = images.to_str().expect("our own names are text");
            // The lock stays if it was not lifted yet.
            let _ = sandbox.firn(["unlock", "-D", directory]);
            // Connections that nobody has pushed may wait for ever, but not for another restore.
            let again = sandbox.make_dir(&format!("images-{name}-{step}-again"));
            move_once(task, &again, &[]);
        } else {
            assert_eq!(
                status.code(),
                None,
                "the restore was not killed in step {step}"
            );
            gone += 1;
            task.wait_until_gone();
            task.try_restore_with(&images, KEEP)
                .expect_success(&format!("restore after step {step}"));
        }
    }
    sandbox.wait_until(60, "the connections are silent", goes_on);
    move_once(task, &sandbox.make_dir(&format!("images-{name}")), &[]);
    println!("{name}: {gone} restores died with their trees, {lived} without");
    assert!(gone >= 2 && lived >= 2, "{calls}");
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
            kill_restores(sandbox, "busy", &task, &|| {
                let [one, other] = [0, 1].map(|n| {
                    let now = talks[n].returned.load(Ordering::Relaxed);
                    before[n].replace(now) < now
                });
                one && other
            });
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
        kill_restores(sandbox, "full", &task, &|| true);
        longest_silence(&mut stream, BYTES);
        let status = task.wait(60).exit_status();
        assert_eq!(status, Some(0), "the server has failed");
    });
}
