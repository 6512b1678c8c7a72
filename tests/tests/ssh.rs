//! Files are copied over SSH while the server, or the client, is dumped, killed and restored.

use std::path::{Path, PathBuf};
use std::process::Command;

use firn_tests::{Sandbox, Service, Task, isolated_server, rounds};

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");
const NEEDED: [&str; 5] = ["/usr/sbin/sshd", "scp", "ssh", "ssh-keygen", "python3"];
const PORT: &str = "7001";

struct Setup {
    server_dir: PathBuf,
    copies_dir: PathBuf,
}

/// Keys and configuration of a server and a client that know each other.
fn set_up(sandbox: &Sandbox) -> Setup {
    // Where the package's own service would have made it.
    std::fs::create_dir_all("/run/sshd").expect("/run is writable");
    let server_dir = sandbox.make_dir("server");
    let copies_dir = sandbox.make_dir("copies");
    for key in [server_dir.join("host"), copies_dir.join("key")] {
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
        sandbox.run(keygen.arg(&key)).expect_success("ssh-keygen");
    }
    let (server, copies) = (server_dir.display(), copies_dir.display());
    let config = format!(
        "ListenAddress 127.0.0.1\nPort {PORT}\nHostKey {server}/host\nPidFile none\nUsePAM no\n\
         AuthorizedKeysFile {copies}/key.pub\nStrictModes no\nPermitRootLogin yes\n\
         Subsystem sftp /usr/lib/openssh/sftp-server\n"
    );
    std::fs::write(server_dir.join("config"), config).expect("room for a file");
    let config = format!(
        "Host there\nHostName 127.0.0.1\nPort {PORT}\nUser root\nIdentityFile {copies}/key\n\
         IdentitiesOnly yes\nStrictHostKeyChecking no\nUserKnownHostsFile {copies}/known\n\
         LogLevel ERROR\nBatchMode yes\n"
    );
    std::fs::write(copies_dir.join("config"), config).expect("room for a file");
    Setup {
        server_dir,
        copies_dir,
    }
}

fn start_server<'a>(sandbox: &'a Sandbox, dir: &Path) -> Task<'a> {
    let config = dir.join("config");
    let config = config.to_str().expect("a plain path");
    let words = ["-D", "-e", "-f", config];
    let server = Task::spawn(sandbox, dir, "/usr/sbin/sshd", words);
    let port: u16 = PORT.parse().expect("a number");
    sandbox.wait_until(60, "the server does not listen", || {
        assert!(!server.has_ended(), "the server has ended");
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    server
}

/// Starts copies to and from the server in a loop, which compares each with the original.
fn start_copies<'a>(sandbox: &'a Sandbox, dir: &Path) -> Task<'a> {
    Task::spawn(sandbox, dir, "python3", [format!("{PROGRAMS}/copies.py")])
}

fn service<'a>(
    sandbox: &'a Sandbox,
    setup: &'a Setup,
    tree: &'a Task<'a>,
    copies: &'a Task<'a>,
) -> Service<'a> {
    Service {
        sandbox,
        tree,
        options: &["--tcp-established"],
        clients: copies,
        clients_dir: &setup.copies_dir,
        step: 8 << 20,
    }
}

#[test]
fn an_ssh_server_keeps_its_copies() {
    isolated_server("an_ssh_server_keeps_its_copies", &NEEDED, |sandbox| {
        let setup = set_up(sandbox);
        let server = start_server(sandbox, &setup.server_dir);
        let copies = start_copies(sandbox, &setup.copies_dir);
        let service = service(sandbox, &setup, &server, &copies);
        service.interrupt(rounds());
        eprintln!("{}", service.finish());
        server.kill();
    });
}

#[test]
fn an_ssh_client_keeps_its_copies() {
    isolated_server("an_ssh_client_keeps_its_copies", &NEEDED, |sandbox| {
        let setup = set_up(sandbox);
        let server = start_server(sandbox, &setup.server_dir);
        let copies = start_copies(sandbox, &setup.copies_dir);
        let service = service(sandbox, &setup, &copies, &copies);
        service.interrupt(rounds());
        eprintln!("{}", service.finish());
        server.kill();
    });
}
