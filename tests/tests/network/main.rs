//! Connections to peers on another host (a network namespace), through dumps and restores.

mod acknowledgements;
mod kills;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use firn_tests::{HERE, Network, Sandbox, Task, isolated, rounds, sequence};

const TALK: &str = env!("CARGO_BIN_EXE_talk");
const KEEP: &[&str] = &["--tcp-established"];

/// Starts the program and returns its port.
fn start<'a>(sandbox: &'a Sandbox, name: &str, arguments: &[&str]) -> (Task<'a>, u16) {
    let dir = sandbox.make_dir(name);
    let task = Task::spawn(sandbox, &dir, TALK, arguments);
    let mut port = String::new();
    sandbox.wait_until(20, "the program does not listen", || {
        port = std::fs::read_to_string(dir.join("port")).unwrap_or_default();
        !port.is_empty()
    });
    (task, port.parse().expect("a port"))
}

/// A connection from the other host.
fn connect(network: &Network, to: IpAddr, port: u16) -> TcpStream {
    thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            network.cross();
            let stream = TcpStream::connect(SocketAddr::new(to, port)).expect("the server listens");
            let patience = Some(Duration::from_secs(60));
            stream.set_read_timeout(patience).expect("a duration");
            stream
        });
        connecting.join().expect("it can connect")
    })
}

#[track_caller]
fn move_once(task: &Task<'_>, images: &Path, options: &[&str]) {
    task.dump(images, &[KEEP, options].concat())
        .expect_success("dump");
    task.try_restore_with(images, KEEP)
        .expect_success("restore");
}

/// What a peer knows of its connection.
#[derive(Default)]
struct Talk {
    sent: AtomicU64,
    returned: AtomicU64,
    /// When the last bytes came.
    heard: Mutex<Option<Instant>>,
}

/// Sends a sequence all the time, and checks that exactly it comes back.
fn talk(stream: &TcpStream, talk: &Talk, enough: &AtomicBool) {
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut writer = stream;
            while !enough.load(Ordering::Relaxed) {
                let start = talk.sent.load(Ordering::Relaxed);
                let bytes = sequence(start, 5000);
                writer.write_all(&bytes).expect("the connection stands");
                talk.sent.fetch_add(5000, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(500));
            }
            writer
                .shutdown(Shutdown::Write)
                .expect("the connection stands");
        });
        let (mut reader, mut room) = (stream, vec![0; 1 << 16]);
        loop {
            let len = reader.read(&mut room).expect("the connection stands");
            if len == 0 {
                break;
            }
            let start = talk.returned.fetch_add(len as u64, Ordering::Relaxed);
            assert!(
                room[..len] == sequence(start, len),
                "other bytes after {start}"
            );
            *talk.heard.lock().expect("nobody panics with it") = Some(Instant::now());
        }
    });
    let (sent, returned) = (&talk.sent, &talk.returned);
    assert_eq!(
        sent.load(Ordering::Relaxed),
        returned.load(Ordering::Relaxed),
        "bytes"
    );
}

/// `FIRN_TESTS_ROUNDS=200` is what a release goes through.
#[test]
fn peers_that_go_on_sending_lose_nothing() {
    let name = "peers_that_go_on_sending_lose_nothing";
    isolated(name, &["ip", "nsenter"], |sandbox| {
        let network = Network::enter(sandbox);
        let (task, port) = start(sandbox, "server", &["echo", "2"]);
        let streams = HERE.map(|address| connect(&network, address, port));
        let talks = [Talk::default(), Talk::default()];
        let enough = AtomicBool::new(false);
        let mut pauses = Vec::new();
        thread::scope(|scope| {
            for (stream, one) in streams.iter().zip(&talks) {
                scope.spawn(|| talk(stream, one, &enough));
            }
            for round in 1..=rounds() {
                let returned = || {
                    talks
                        .each_ref()
                        .map(|talk| talk.returned.load(Ordering::Relaxed))
                };
                let before = returned();
                sandbox.wait_until(60, "a connection is silent", || {
                    returned()
                        .iter()
                        .zip(&before)
                        .all(|(now, before)| now > before)
                });
                let images = sandbox.make_dir(&format!("images-{round}"));
                let begun = Instant::now();
                move_once(&task, &images, &[]);
                pauses.push(begun.elapsed());
                std::fs::remove_dir_all(&images).expect("the images are ours");
            }
            enough.store(true, Ordering::Relaxed);
        });
        pauses.sort_unstable();
        let sent: u64 = talks
            .iter()
            .map(|talk| talk.sent.load(Ordering::Relaxed))
            .sum();
        println!(
            "{} moves, {sent} bytes there and back; a move took {:?} at the median, {:?} at most",
            pauses.len(),
            pauses[pauses.len() / 2],
            pauses[pauses.len() - 1]
        );
        assert_eq!(
            task.wait(60).exit_status(),
            Some(0),
            "the server has failed"
        );
    });
}

/// Reads a stream to its end; returns its longest silence, and after how many bytes that was.
#[track_caller]
fn longest_silence(stream: &mut TcpStream, bytes: u64) -> (Duration, u64) {
    let (mut at, mut last, mut longest) = (0, Instant::now(), (Duration::ZERO, 0));
    let mut room = vec![0; 1 << 16];
    while at < bytes {
        let len = stream.read(&mut room).expect("the connection stands");
        longest = longest.max((last.elapsed(), at));
        assert!(
            len > 0 && room[..len] == sequence(at, len),
            "other bytes after {at}"
        );
        at += len as u64;
        last = Instant::now();
    }
    longest
}

/// What lies unsent in a queue comes as soon as the peer makes room, and not after a retransmission timeout.
/// Prints how long the stream was silent, and how long without a move.
#[test]
fn unsent_bytes_come_at_once() {
    isolated("unsent_bytes_come_at_once", &["ip", "nsenter"], |sandbox| {
        const BYTES: u64 = 16 << 20;
        let network = Network::enter(sandbox);
        let bytes = BYTES.to_string();
        let pour = |name: &str, address, moves: bool| {
            let (task, port) = start(sandbox, name, &["pour", &bytes]);
            let mut stream = connect(&network, address, port);
            // Until both queues are full.
            thread::sleep(Duration::from_millis(300));
            if moves {
                move_once(&task, &sandbox.make_dir(&format!("images-{name}")), &[]);
            }
            let silence = longest_silence(&mut stream, BYTES);
            assert_eq!(
                task.wait(60).exit_status(),
                Some(0),
                "the server has failed"
            );
            silence
        };
        for round in 1..=rounds() {
            let address = HERE[round % 2];
            let still = pour(&format!("still-{round}"), address, false);
            let moved = pour(&format!("moved-{round}"), address, true);
            println!("silence and place: {moved:?}, without a move {still:?}");
        }
    });
}

#[test]
fn every_way_to_hold_packets_off_works() {
    let name = "every_way_to_hold_packets_off_works";
    let programs = ["ip", "nsenter", "iptables-legacy", "ip6tables-legacy"];
    isolated(name, &programs, |sandbox| {
        let network = Network::enter(sandbox);
        let rules = || {
            let list = |program: &str| {
                let mut command = Command::new(program);
                sandbox
                    .run(command.arg("-S"))
                    .expect_success(program)
                    .stdout
            };
            let programs = [
                "iptables",
                "ip6tables",
                "iptables-legacy",
                "ip6tables-legacy",
            ];
            let lists = programs.map(list).concat();
            lists
                .lines()
                .filter(|line| line.ends_with("-j DROP"))
                .count()
        };
        let runs = || {
            let listed = sandbox
                .firn(["unlock", "--list"])
                .expect_success("unlock --list");
            listed.stdout.lines().count()
        };
        // Both connections both ways, and the listening socket, which has both families.
        for (method, tables, dropping) in [("nftables", 1, 0), ("iptables", 0, 6), ("skip", 0, 0)] {
            let (task, port) = start(sandbox, &format!("server-{method}"), &["echo", "2"]);
            let mut streams = HERE.map(|address| connect(&network, address, port));
            let images = sandbox.make_dir(&format!("images-{method}"));
            let options = [KEEP, &["--network-lock", method]].concat();
            task.dump(&images, &options).expect_success("dump");
            assert_eq!(
                (runs(), rules()),
                (tables, dropping),
                "{method} while the tree is gone"
            );
            if method != "skip" {
                // Without a lock the peers' bytes would be answered by a reset.
                streams
                    .iter_mut()
                    .for_each(|one| one.write_all(b"meanwhile").expect("it stands"));
            }
            task.try_restore_with(&images, KEEP)
                .expect_success("restore");
            assert_eq!((runs(), rules()), (0, 0), "{method} after the restore");
            for stream in &mut streams {
                stream.write_all(b"afterwards").expect("it stands");
                stream.shutdown(Shutdown::Write).expect("it stands");
                let mut text = String::new();
                stream.read_to_string(&mut text).expect("it stands");
                let expected = if method == "skip" {
                    "afterwards"
                } else {
                    "meanwhileafterwards"
                };
                assert_eq!(text, expected, "{method}");
            }
            assert_eq!(
                task.wait(60).exit_status(),
                Some(0),
                "the server has failed"
            );
        }
    });
}

#[test]
fn a_lock_that_stays_can_be_taken_away() {
    let name = "a_lock_that_stays_can_be_taken_away";
    let programs = ["ip", "nsenter", "iptables-legacy"];
    isolated(name, &programs, |sandbox| {
        let network = Network::enter(sandbox);
        for method in ["nftables", "iptables"] {
            let (task, port) = start(sandbox, &format!("server-{method}"), &["echo", "1"]);
            let mut stream = connect(&network, HERE[0], port);
            let images = sandbox.make_dir(&format!("images-{method}"));
            let options = [KEEP, &["--network-lock", method]].concat();
            task.dump(&images, &options).expect_success("dump");
            // The connection is not to be kept, says the restore.
            let refused = task.try_restore(&images);
            refused.expect_refusal(&["is connected", "--tcp-established"]);
            stream
                .write_all(b"anybody there?")
                .expect("it goes into the queue");
            let patience = Some(Duration::from_millis(300));
            stream.set_read_timeout(patience).expect("a duration");
            let silence = stream.read(&mut [0]).expect_err("nobody answers");
            assert!(
                matches!(silence.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
                "the lock is gone: {silence}"
            );
            let directory = images.to_str().expect("our own names are text");
            let listed = sandbox
                .firn(["unlock", "--list"])
                .expect_success("unlock --list");
            let run = listed.stdout.trim().to_owned();
            let unlocked = match method {
                "nftables" => sandbox.firn(["unlock", "--run", &run]),
                _ => sandbox.firn(["unlock", "-D", directory]),
            };
            unlocked.expect_success("unlock");
            let again = sandbox.firn(["unlock", "-D", directory]);
            again.expect_refusal(&["no network lock", directory]);
            // Now the kernel tells the peer, as it does for any program that has ended.
            let patience = Some(Duration::from_secs(60));
            stream.set_read_timeout(patience).expect("a duration");
            let end = stream.read(&mut [0]).expect_err("the connection is gone");
            assert_eq!(end.kind(), ErrorKind::ConnectionReset);
        }
    });
}

#[test]
fn waiting_connections_are_told_and_left_out() {
    let name = "waiting_connections_are_told_and_left_out";
    isolated(name, &["ip", "nsenter"], |sandbox| {
        let network = Network::enter(sandbox);
        let (task, port) = start(sandbox, "server", &["hold"]);
        let waiting = connect(&network, HERE[0], port);
        let client = waiting.local_addr().expect("it has one").to_string();
        let images = sandbox.make_dir("images");
        let refused = task.dump(&images, KEEP);
        assert!(refused.stderr.contains(&client), "{}", refused.stderr);
        assert!(
            refused.stderr.contains("--skip-in-flight"),
            "{}",
            refused.stderr
        );
        let options = [KEEP, &["--skip-in-flight"]].concat();
        let dumped = task.dump(&images, &options).expect_success("dump");
        let said = dumped.stdout + &dumped.stderr;
        assert!(
            said.contains(&client) && said.contains("left out"),
            "{said}"
        );
        task.try_restore_with(&images, KEEP)
            .expect_success("restore");
        let mut served = connect(&network, HERE[1], port);
        std::fs::write(sandbox.dir().join("server/go"), "").expect("room for a file");
        let mut text = String::new();
        served.read_to_string(&mut text).expect("it stands");
        assert_eq!(text, "welcome");
        assert_eq!(
            task.wait(60).exit_status(),
            Some(0),
            "the server has failed"
        );
    });
}

/// Whoever connects while nobody is there has to wait, and is never told so.
#[test]
fn clients_that_come_meanwhile_wait() {
    let name = "clients_that_come_meanwhile_wait";
    isolated(name, &["ip", "nsenter"], |sandbox| {
        let network = Network::enter(sandbox);
        let (task, port) = start(sandbox, "server", &["echo", "1000000"]);
        let (served, enough) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            for address in HERE {
                let (network, served, enough) = (&network, &served, &enough);
                scope.spawn(move || {
                    while !enough.load(Ordering::Relaxed) {
                        let mut stream = connect(network, address, port);
                        stream.write_all(b"here").expect("it is connected");
                        let mut answer = [0; 4];
                        stream.read_exact(&mut answer).expect("it is served");
                        assert_eq!(&answer, b"here");
                        drop(stream);
                        served.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(3));
                    }
                });
            }
            let mut refusals = 0;
            for round in 1..=rounds() {
                let before = served.load(Ordering::Relaxed);
                sandbox.wait_until(60, "nobody is served", || {
                    served.load(Ordering::Relaxed) > before + 20
                });
                let images = sandbox.make_dir(&format!("images-{round}"));
                // One may just wait to be accepted, which is told before anything is done to it.
                loop {
                    let dumped = task.dump(&images, KEEP);
                    if dumped.status.success() {
                        break;
                    }
                    assert!(
                        dumped.stderr.contains("wait to be accepted"),
                        "{}",
                        dumped.stderr
                    );
                    refusals += 1;
                    assert!(refusals < 100 * rounds(), "it is never dumped");
                }
                // Long enough for clients to come.
                thread::sleep(Duration::from_millis(30));
                task.try_restore_with(&images, KEEP)
                    .expect_success("restore");
            }
            enough.store(true, Ordering::Relaxed);
            println!("{refusals} dumps refused");
        });
        println!("{} clients", served.load(Ordering::Relaxed));
        let listed = sandbox.firn(["unlock", "--list"]);
        assert_eq!(listed.expect_success("unlock --list").stdout, "");
        task.kill();
    });
}
