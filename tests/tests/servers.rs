//! Servers are dumped, killed and restored while clients outside of the tree talk to them. The clients
//! check every answer and see a pause, and nothing else.

use std::path::Path;

use firn_tests::{Sandbox, Task, isolated, rounds};

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");
const CONNECTIONS: &str = "5";
/// Answers that each connection must get between two dumps.
const ANSWERS: u64 = 50;

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Waits until the slowest connection has had so many answers more.
#[track_caller]
fn await_progress(sandbox: &Sandbox, client: &Task<'_>, dir: &Path) {
    let read = || text(&dir.join("progress")).parse::<u64>().unwrap_or(0);
    let before = read();
    sandbox.wait_until(60, "the clients get no answers", || {
        let said = text(&dir.join("stdout")) + &text(&dir.join("stderr"));
        assert!(client.is_alive(), "the clients have given up: {said}");
        read() > before + ANSWERS
    });
}

#[test]
fn a_line_server_keeps_its_clients() {
    isolated(
        "a_line_server_keeps_its_clients",
        &["perl", "python3"],
        |sandbox| {
            let (at_server, at_client) = (sandbox.make_dir("server"), sandbox.make_dir("client"));
            let program = format!("{PROGRAMS}/line-server.pl");
            let server = Task::spawn(sandbox, &at_server, "perl", [program]);
            let mut port = String::new();
            sandbox.wait_until(20, "the server does not listen", || {
                let said = text(&at_server.join("stdout"));
                port = said.trim().trim_start_matches("port ").to_owned();
                !port.is_empty() && said.ends_with('\n')
            });
            let program = format!("{PROGRAMS}/line-client.py");
            let arguments = [&program, &port, CONNECTIONS, "progress", "stop"];
            let client = Task::spawn(sandbox, &at_client, "python3", arguments);
            for round in 1..=rounds() {
                await_progress(sandbox, &client, &at_client);
                let images = sandbox.make_dir(&format!("images.{round}"));
                server
                    .dump(&images, &["--tcp-established"])
                    .expect_success("dump");
                server
                    .try_restore_with(&images, &["--tcp-established"])
                    .expect_success("restore");
            }
            await_progress(sandbox, &client, &at_client);
            std::fs::write(at_client.join("stop"), "").expect("the directory is ours");
            let status = client.wait(60);
            let said = text(&at_client.join("stdout")) + &text(&at_client.join("stderr"));
            assert_eq!(status.exit_status(), Some(0), "{said}");
            server.kill();
        },
    );
}

#[test]
fn a_connection_to_the_outside_needs_permission() {
    isolated(
        "a_connection_to_the_outside_needs_permission",
        &["python3"],
        |sandbox| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
            let port = listener.local_addr().expect("bound").port();
            let dir = sandbox.make_dir("work");
            let program = format!(
                "import socket; s = socket.create_connection(('127.0.0.1', {port})); \
                 print('ready', flush=True); print(s.recv(100).decode(), flush=True)"
            );
            let task = Task::spawn(sandbox, &dir, "python3", ["-c", &program]);
            let (mut peer, _) = listener.accept().expect("a client");
            sandbox.wait_until(20, "the client is not ready", || {
                text(&dir.join("stdout")).contains("ready")
            });
            let images = sandbox.make_dir("images");
            let refused = task.dump(&images, &[]);
            assert!(!refused.status.success(), "dumped without permission");
            assert!(
                refused.stderr.contains("--tcp-established"),
                "{}",
                refused.stderr
            );
            // Nothing has happened to the connection, nor is anything held off.
            std::io::Write::write_all(&mut peer, b"as before").expect("connected");
            assert_eq!(task.wait(20).exit_status(), Some(0));
            assert!(text(&dir.join("stdout")).contains("as before"));
        },
    );
}
