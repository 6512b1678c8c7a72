//! Servers are dumped, killed and restored while clients outside of the tree talk to them. The clients
//! check every answer and see a pause, and nothing else.

use std::path::{Path, PathBuf};

use firn_tests::{Sandbox, Service, Task, isolated, isolated_server, rounds};

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");
const KEEP_CONNECTIONS: &[&str] = &["--tcp-established"];
/// Fixed, as the network is the test's own.
const PORT: &str = "7001";

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Waits until somebody listens at the port.
#[track_caller]
fn await_listener(sandbox: &Sandbox, server: &Task<'_>, port: &str) {
    let port: u16 = port.parse().expect("a number");
    sandbox.wait_until(60, "the server does not listen", || {
        assert!(!server.has_ended(), "the server has ended");
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
}

/// The directory of the clients, and themselves at work.
fn talk<'a>(
    sandbox: &'a Sandbox,
    protocol: &str,
    port: &str,
    connections: &str,
) -> (PathBuf, Task<'a>) {
    let dir = sandbox.make_dir("clients");
    let program = format!("{PROGRAMS}/talk.py");
    let clients = Task::spawn(
        sandbox,
        &dir,
        "python3",
        [&program, protocol, port, connections],
    );
    (dir, clients)
}

/// Interrupts a server that [`talk`] keeps busy; returns how many answers each connection got.
fn interrupt(
    sandbox: &Sandbox,
    server: &Task<'_>,
    (dir, clients): (PathBuf, Task<'_>),
    step: u64,
) -> Vec<u64> {
    let service = Service {
        sandbox,
        tree: server,
        options: KEEP_CONNECTIONS,
        clients: &clients,
        clients_dir: &dir,
        step,
    };
    service.interrupt(rounds());
    eprintln!("{}", service.finish());
    let answers = text(&dir.join("answers"));
    let count = |line: &str| line.parse().expect("a count of answers");
    answers.lines().map(count).collect()
}

#[test]
fn a_line_server_keeps_its_clients() {
    isolated(
        "a_line_server_keeps_its_clients",
        &["perl", "python3"],
        |sandbox| {
            let dir = sandbox.make_dir("server");
            let program = format!("{PROGRAMS}/line-server.pl");
            let server = Task::spawn(sandbox, &dir, "perl", [program]);
            let port = server.announced_port(&dir);
            interrupt(sandbox, &server, talk(sandbox, "line", &port, "5"), 50);
            server.kill();
        },
    );
}

#[test]
fn an_asyncio_server_keeps_a_thousand_clients() {
    isolated_server(
        "an_asyncio_server_keeps_a_thousand_clients",
        &["python3"],
        |sandbox| {
            let dir = sandbox.make_dir("server");
            let program = format!("{PROGRAMS}/echo-server.py");
            let server = Task::spawn(sandbox, &dir, "python3", [program]);
            let port = server.announced_port(&dir);
            interrupt(sandbox, &server, talk(sandbox, "echo", &port, "1000"), 5);
            server.kill();
        },
    );
}

#[test]
fn redis_keeps_its_clients_and_its_log() {
    isolated_server(
        "redis_keeps_its_clients_and_its_log",
        &["redis-server", "redis-benchmark", "redis-cli", "python3"],
        |sandbox| {
            let dir = sandbox.make_dir("server");
            let start = || {
                let words = "--appendonly yes --appendfsync everysec --save 300 1 --port";
                let words = words.split(' ').chain([PORT]);
                let server = Task::spawn(sandbox, &dir, "redis-server", words);
                await_listener(sandbox, &server, PORT);
                server
            };
            let server = start();
            let bench_dir = sandbox.make_dir("benchmark");
            let load = "-l -q -c 20 -P 4 -t set,incr,lpush,zadd,mset -p";
            let load = load.split(' ').chain([PORT]);
            let benchmark = Task::spawn(sandbox, &bench_dir, "redis-benchmark", load);
            // The log is written anew now and then, by a child of the server.
            let rewriter_dir = sandbox.make_dir("rewriter");
            let again = format!("while redis-cli -p {PORT} bgrewriteaof; do sleep 0.3; done");
            let rewriter = Task::spawn(sandbox, &rewriter_dir, "bash", ["-c", &again]);
            let clients = talk(sandbox, "redis", PORT, "20");
            let answers = interrupt(sandbox, &server, clients, 100);
            assert!(
                benchmark.is_alive(),
                "the benchmark has given up: {}",
                text(&bench_dir.join("stderr"))
            );
            benchmark.kill();
            rewriter.kill();
            ask(sandbox, &["shutdown", "nosave"]);
            server.wait(60);
            let server = start();
            sandbox.wait_until(60, "the server reads its log for ever", || {
                !ask(sandbox, &["ping"]).starts_with("LOADING")
            });
            check_data(sandbox, &answers);
            server.kill();
        },
    );
}

fn ask(sandbox: &Sandbox, words: &[&str]) -> String {
    let mut cli = std::process::Command::new("redis-cli");
    let answer = sandbox.run(cli.args(["-p", PORT]).args(words));
    answer.expect_success("redis-cli").stdout.trim().to_owned()
}

/// What was acknowledged is what a server reads back from the log.
fn check_data(sandbox: &Sandbox, answers: &[u64]) {
    assert_eq!(answers.len(), 20);
    for (index, answered) in answers.iter().enumerate() {
        let counter = ask(sandbox, &["get", &format!("counter:{index}")]);
        assert_eq!(counter, (answered / 4).to_string(), "connection {index}");
        let elements = ask(sandbox, &["llen", &format!("list:{index}")]);
        let appended = answered.div_ceil(4);
        assert_eq!(elements, appended.to_string(), "connection {index}");
    }
}

#[test]
fn memcached_keeps_its_clients() {
    isolated_server(
        "memcached_keeps_its_clients",
        &["memcached", "python3"],
        |sandbox| {
            let dir = sandbox.make_dir("server");
            let words = ["-u", "root", "-l", "127.0.0.1", "-t", "4", "-p", PORT];
            let server = Task::spawn(sandbox, &dir, "memcached", words);
            await_listener(sandbox, &server, PORT);
            let clients = talk(sandbox, "memcached", PORT, "50");
            interrupt(sandbox, &server, clients, 100);
            server.kill();
        },
    );
}

const NGINX: &str = "
daemon off;
user root;
worker_processes 2;
pid nginx.pid;
error_log error.log;
events { worker_connections 100; }
http {
    access_log access.log;
    sendfile on;
    keepalive_requests 100000000;
    keepalive_time 10h;
    client_body_temp_path tmp;
    proxy_temp_path tmp;
    fastcgi_temp_path tmp;
    uwsgi_temp_path tmp;
    scgi_temp_path tmp;
    server {
        listen 127.0.0.1:7001 reuseport;
        root files;
        location /plain- { sendfile off; }
    }
}
";

#[test]
fn nginx_keeps_its_downloads() {
    isolated_server(
        "nginx_keeps_its_downloads",
        &["/usr/sbin/nginx", "python3"],
        |sandbox| {
            let dir = sandbox.make_dir("server");
            let files = sandbox.make_dir("server/files");
            for (name, len) in [("small", 700), ("plain-big", 3_000_000), ("big", 9_000_000)] {
                let bytes = noise(len);
                std::fs::write(files.join(name), bytes).expect("room for a file");
            }
            std::fs::write(dir.join("nginx.conf"), NGINX).expect("room for a file");
            let place = dir.to_str().expect("a plain path");
            let words = ["-p", place, "-c", "nginx.conf", "-e", "error.log"];
            let server = Task::spawn(sandbox, &dir, "/usr/sbin/nginx", words);
            await_listener(sandbox, &server, PORT);
            let clients_dir = sandbox.make_dir("clients");
            let program = format!("{PROGRAMS}/download.py");
            let files = files.to_str().expect("a plain path");
            let words = [&program, PORT, "12", files];
            let clients = Task::spawn(sandbox, &clients_dir, "python3", words);
            let service = Service {
                sandbox,
                tree: &server,
                options: KEEP_CONNECTIONS,
                clients: &clients,
                clients_dir: &clients_dir,
                step: 3,
            };
            service.interrupt(rounds());
            service.finish();
            assert_eq!(text(&dir.join("error.log")), "");
            server.kill();
        },
    );
}

/// Bytes that look random and are always the same.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
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
