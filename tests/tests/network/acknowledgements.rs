//! Bytes that the peer has got, and whose acknowledgement did not come before the dump.

use std::io::{Read, Write};
use std::process::Command;
use std::thread;
use std::time::Duration;

use firn_tests::{HERE, Network, Sandbox, Task, isolated, sequence};

use super::{KEEP, connect, longest_silence, start};

/// Has bare acknowledgements to this host dropped, or no longer.
fn drop_acknowledgements(sandbox: &Sandbox, way: &str) {
    let words = "INPUT -p tcp -m length --length 40:80 -j DROP";
    let mut command = Command::new("iptables-legacy");
    let command = command.arg(way).args(words.split(' '));
    sandbox.run(command).expect_success("iptables-legacy");
}

/// Sets how many segments new connections send before the peer has answered.
fn set_first_flight(sandbox: &Sandbox, segments: &str) {
    let route = ["10.77.0.0/24", "dev", "here", "initcwnd", segments];
    let mut command = Command::new("ip");
    let command = command.args(["route", "replace"]).args(route);
    sandbox.run(command).expect_success("ip");
}

/// Moves the task to where acknowledgements come again, and connections begin with so many segments.
fn move_task(sandbox: &Sandbox, task: &Task<'_>, images: &str, segments: &str) {
    let images = sandbox.make_dir(images);
    task.dump(&images, KEEP).expect_success("dump");
    drop_acknowledgements(sandbox, "-D");
    set_first_flight(sandbox, segments);
    task.try_restore_with(&images, KEEP)
        .expect_success("restore");
}

/// What the peer has got, without its acknowledgement having come, is more than the connection sends at once after
/// the restore: the peer's words acknowledge it all the same, and nobody waits for the other.
#[test]
fn lost_acknowledgements_hold_nobody_up() {
    let name = "acknowledgements::lost_acknowledgements_hold_nobody_up";
    isolated(name, &["ip", "nsenter", "iptables-legacy"], |sandbox| {
        let network = Network::enter(sandbox);
        for (nr, segments) in ["2", "10"].into_iter().enumerate() {
            set_first_flight(sandbox, "10");
            let (task, port) = start(sandbox, &format!("server-{nr}"), &["echo", "1"]);
            let mut stream = connect(&network, HERE[0], port);
            let mut text = vec![0; 14_000];
            stream.write_all(b"begin").expect("it stands");
            stream.read_exact(&mut text[..5]).expect("it stands");
            drop_acknowledgements(sandbox, "-A");
            let sent = sequence(0, text.len());
            stream.write_all(&sent).expect("it stands");
            stream.read_exact(&mut text).expect("it stands");
            assert_eq!(text, sent);
            move_task(sandbox, &task, &format!("images-{nr}"), segments);
            stream.write_all(b"end").expect("it stands");
            stream
                .read_exact(&mut text[..3])
                .expect("the server goes on");
            assert_eq!(text[..3], *b"end");
            drop(stream);
            assert_eq!(task.wait(60).exit_status(), Some(0));
        }
    });
}

/// The same with the end of the stream, which the peer has got, too.
#[test]
fn lost_acknowledgements_of_an_end_hold_nobody_up() {
    const BYTES: usize = 14_000;
    let name = "acknowledgements::lost_acknowledgements_of_an_end_hold_nobody_up";
    isolated(name, &["ip", "nsenter", "iptables-legacy"], |sandbox| {
        let network = Network::enter(sandbox);
        for (nr, segments) in ["2", "10"].into_iter().enumerate() {
            set_first_flight(sandbox, "20");
            let bytes = BYTES.to_string();
            let (task, port) = start(sandbox, &format!("server-{nr}"), &["part", &bytes]);
            let mut stream = connect(&network, HERE[0], port);
            drop_acknowledgements(sandbox, "-A");
            stream.write_all(&[0; 100]).expect("it stands");
            let mut text = Vec::new();
            stream.read_to_end(&mut text).expect("it stands");
            assert_eq!(text, sequence(0, BYTES));
            move_task(sandbox, &task, &format!("images-{nr}"), segments);
            stream.write_all(b"parted").expect("it stands");
            drop(stream);
            assert_eq!(task.wait(30).exit_status(), Some(0), "the server");
        }
    });
}

/// The peer's window is full to the last byte, by segments smaller than those that carry the same bytes again: of
/// these the last one would not fit any more.
#[test]
fn full_windows_hold_nobody_up() {
    const BYTES: u64 = 200_000;
    let name = "acknowledgements::full_windows_hold_nobody_up";
    isolated(name, &["ip", "nsenter", "iptables-legacy"], |sandbox| {
        let network = Network::enter(sandbox);
        set_first_flight(sandbox, "1000");
        let (task, port) = start(sandbox, "server", &["trickle", &BYTES.to_string()]);
        let mut stream = connect(&network, HERE[0], port);
        drop_acknowledgements(sandbox, "-A");
        stream.write_all(&[0; 100]).expect("it stands");
        // Until it sends no more.
        let mut seen = 0;
        sandbox.wait_until(20, "the window is never full", || {
            thread::sleep(Duration::from_millis(100));
            let before =
                std::mem::replace(&mut seen, stream.peek(&mut vec![0; 200_000]).unwrap_or(0));
            before > 0 && before == seen
        });
        move_task(sandbox, &task, "images", "1000");
        longest_silence(&mut stream, BYTES);
        drop(stream);
        assert_eq!(task.wait(60).exit_status(), Some(0));
    });
}
