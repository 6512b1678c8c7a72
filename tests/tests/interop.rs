//! Each engine restores the other's dump. Needs a CRIU that runs on this kernel: `FIRN_CRIU`.

use std::path::{Path, PathBuf};
use std::process::Command;

use firn_tests::{Finished, Sandbox, Service, Task, criu, firn_path, isolated_server, skip};

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");
/// Connections of the server on asyncio.
const CONNECTIONS: &str = "1000";

/// A shell that waits for its child and then tells how that ended.
const SHELL: &str = "trap 'echo trapped >> result' USR1; sleep 1000 & \
    while :; do wait $!; code=$?; [ $code -gt 128 ] && [ -d /proc/$! ] || break; done; \
    echo child $code >> result";

struct Engine {
    program: PathBuf,
    name: &'static str,
}

impl Engine {
    fn run(&self, sandbox: &Sandbox, action: &str, images: &Path, options: &[&str]) -> Finished {
        let log = format!("{}-{action}.log", self.name);
        let mut command = Command::new(&self.program);
        command
            .args([action, "-v4", "-o", &log, "-D"])
            .arg(images)
            .args(options);
        sandbox.run_logged(&mut command, &images.join(&log))
    }
}

/// Dumps the sleeping shell with one engine, restores it with the other, and has it go on.
fn hand_over(sandbox: &Sandbox, from: &Engine, to: &Engine) {
    let dir = sandbox.make_dir("work");
    let task = Task::spawn(sandbox, &dir, "bash", ["-c", SHELL]);
    sandbox.wait_until(60, "the shell has no child", || task.session().len() == 2);
    let mut pids = task.session();
    pids.sort_unstable();
    let images = sandbox.make_dir("images");
    let pid = task.pid().to_string();
    from.run(sandbox, "dump", &images, &["-t", &pid])
        .expect_success(&format!("dump by {}", from.name));
    task.wait_until_gone();
    to.run(sandbox, "restore", &images, &["-d"])
        .expect_success(&format!("restore by {}", to.name));
    let mut restored = task.session();
    restored.sort_unstable();
    assert_eq!(restored, pids, "the restored tree differs");
    // The signal handler, the wait for the child and the shell's memory are all still there.
    let result = || std::fs::read_to_string(dir.join("result")).unwrap_or_default();
    signal(sandbox, "USR1", pids[0]);
    sandbox.wait_until(60, "the shell does not handle a signal", || {
        result() == "trapped\n"
    });
    signal(sandbox, "TERM", pids[1]);
    sandbox.wait_until(60, "the shell does not see its child's end", || {
        result() == "trapped\nchild 143\n"
    });
    task.wait_until_gone();
}

fn signal(sandbox: &Sandbox, name: &str, pid: i32) {
    let mut kill = Command::new("kill");
    sandbox
        .run(kill.args(["-s", name, &pid.to_string()]))
        .expect_success("kill");
}

/// Dumps the server on asyncio with one engine while its clients are at work, restores it with the other,
/// and has them all go on.
fn hand_over_server(sandbox: &Sandbox, from: &Engine, to: &Engine) {
    let dir = sandbox.make_dir("server");
    let program = format!("{PROGRAMS}/echo-server.py");
    let server = Task::spawn(sandbox, &dir, "python3", [program]);
    let port = server.announced_port(&dir);
    let clients_dir = sandbox.make_dir("clients");
    let program = format!("{PROGRAMS}/talk.py");
    let words = [&program, "echo", &port, CONNECTIONS];
    let clients = Task::spawn(sandbox, &clients_dir, "python3", words);
    let service = Service {
        sandbox,
        tree: &server,
        options: &[],
        clients: &clients,
        clients_dir: &clients_dir,
        step: 5,
    };
    service.await_progress();
    let images = sandbox.make_dir("images");
    let pid = server.pid().to_string();
    from.run(sandbox, "dump", &images, &["-t", &pid, "--tcp-established"])
        .expect_success(&format!("dump by {}", from.name));
    server.wait_until_gone();
    to.run(sandbox, "restore", &images, &["-d", "--tcp-established"])
        .expect_success(&format!("restore by {}", to.name));
    service.await_progress();
    service.finish();
    server.kill();
}

fn with_criu(name: &str, programs: &[&str], body: impl FnOnce(&Sandbox, Engine, Engine)) {
    let Some(criu) = criu() else {
        return skip(name, "no CRIU given: set FIRN_CRIU");
    };
    isolated_server(name, programs, |sandbox| {
        let firn = Engine {
            program: firn_path().to_owned(),
            name: "firn",
        };
        body(
            sandbox,
            firn,
            Engine {
                program: criu,
                name: "criu",
            },
        );
    });
}

#[test]
fn criu_restores_our_dump() {
    const NAME: &str = "criu_restores_our_dump";
    with_criu(NAME, &["bash"], |sandbox, firn, criu| {
        hand_over(sandbox, &firn, &criu);
    });
}

#[test]
fn we_restore_the_dump_of_criu() {
    const NAME: &str = "we_restore_the_dump_of_criu";
    with_criu(NAME, &["bash"], |sandbox, firn, criu| {
        hand_over(sandbox, &criu, &firn);
    });
}

#[test]
fn criu_restores_our_dump_of_a_server() {
    const NAME: &str = "criu_restores_our_dump_of_a_server";
    with_criu(NAME, &["python3"], |sandbox, firn, criu| {
        hand_over_server(sandbox, &firn, &criu);
    });
}

#[test]
fn we_restore_the_dump_of_a_server_by_criu() {
    const NAME: &str = "we_restore_the_dump_of_a_server_by_criu";
    with_criu(NAME, &["python3"], |sandbox, firn, criu| {
        hand_over_server(sandbox, &criu, &firn);
    });
}
