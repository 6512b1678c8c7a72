//! PostgreSQL is dumped, killed and restored while pgbench works outside of the tree.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use firn_tests::{Sandbox, Service, Task, isolated_server, rounds, skip};

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");
const PORT: &str = "7001";
/// Length of one run of pgbench: its connections last that long.
const RUN_SECONDS: &str = "6";

/// Where Debian puts the programs of the newest version.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let bins = versions.filter_map(|version| Some(version.ok()?.path().join("bin")));
    bins.filter(|bin| bin.join("postgres").exists()).max()
}

/// The server insists on not being root: `setpriv` ahead of a command makes it the package's user.
const AS_USER: [&str; 4] = [
    "--reuid=postgres",
    "--regid=postgres",
    "--clear-groups",
    "--",
];

fn make_cluster(sandbox: &Sandbox, bin: &Path) -> PathBuf {
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(sandbox.dir(), open).expect("the scratch directory is ours");
    let data = sandbox.make_dir("data");
    let mut give = Command::new("chown");
    let given = sandbox.run(give.arg("postgres:postgres").arg(&data));
    given.expect_success("chown");
    let mut initdb = Command::new("setpriv");
    initdb.args(AS_USER).arg(bin.join("initdb"));
    initdb.args(["--no-sync", "--no-locale", "-A", "trust", "-D"]);
    let made = sandbox.run(initdb.arg(&data).current_dir(&data));
    made.expect_success("initdb");
    data
}

fn start<'a>(sandbox: &'a Sandbox, bin: &Path, data: &Path) -> Task<'a> {
    let dir = sandbox.make_dir("server");
    let mut words: Vec<_> = AS_USER.map(str::to_owned).to_vec();
    let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
    words.extend([path(&bin.join("postgres")), "-D".to_owned(), path(data)]);
    for setting in [
        "listen_addresses=127.0.0.1",
        &format!("port={PORT}"),
        &format!("unix_socket_directories={}", data.display()),
        "checkpoint_timeout=30s",
        "autovacuum_naptime=1s",
        "max_wal_size=64MB",
        // Not in /dev/shm, where a server that is killed leaves it.
        "dynamic_shared_memory_type=mmap",
    ] {
        words.extend(["-c".to_owned(), setting.to_owned()]);
    }
    let server = Task::spawn(sandbox, &dir, "setpriv", words);
    sandbox.wait_until(60, "the server does not answer", || {
        let said = std::fs::read_to_string(dir.join("stderr")).unwrap_or_default();
        assert!(!server.has_ended(), "the server has ended: {said}");
        said.contains("ready to accept connections")
    });
    server
}

fn client(bin: &Path, program: &str) -> Command {
    let mut command = Command::new(bin.join(program));
    command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", PORT]);
    command.env("PGDATABASE", "postgres");
    command
}

fn ask(sandbox: &Sandbox, bin: &Path, question: &str) -> String {
    let mut psql = client(bin, "psql");
    let answer = sandbox.run(psql.args(["-qAtX", "-c", question]));
    answer.expect_success("psql").stdout.trim().to_owned()
}

#[test]
fn postgresql_loses_no_transaction() {
    const NAME: &str = "postgresql_loses_no_transaction";
    let Some(bin) = programs() else {
        return skip(NAME, "PostgreSQL is not installed");
    };
    isolated_server(NAME, &["python3", "setpriv"], |sandbox| {
        let data = make_cluster(sandbox, &bin);
        let server = start(sandbox, &bin, &data);
        let mut prepare = client(&bin, "pgbench");
        let prepared = sandbox.run(prepare.args(["-i", "-q", "-s", "2"]));
        prepared.expect_success("pgbench -i");
        let clients_dir = sandbox.make_dir("clients");
        let program = format!("{PROGRAMS}/pgbench.py");
        let pgbench = bin.join("pgbench");
        let pgbench = pgbench.to_str().expect("a plain path");
        let words = [&program, pgbench, PORT, RUN_SECONDS];
        let clients = Task::spawn(sandbox, &clients_dir, "python3", words);
        let service = Service {
            sandbox,
            tree: &server,
            options: &["--tcp-established"],
            clients: &clients,
            clients_dir: &clients_dir,
            step: 20_000,
        };
        service.interrupt(rounds());
        eprintln!("{}", service.finish());
        let acknowledged = std::fs::read_to_string(clients_dir.join("acknowledged"));
        let acknowledged = acknowledged.expect("the clients ended well");
        check_books(sandbox, &bin, &acknowledged);
        // Once more after a crash, so that it is the log that tells.
        server.kill();
        std::fs::remove_dir_all(sandbox.dir().join("server")).expect("the directory is ours");
        let server = start(sandbox, &bin, &data);
        check_books(sandbox, &bin, &acknowledged);
        let complaints = std::fs::read_to_string(sandbox.dir().join("server/stderr"));
        let complaints = complaints.expect("the server has written it");
        assert!(!complaints.contains("PANIC"), "{complaints}");
        server.kill();
    });
}

/// There is a line of history for each acknowledged transaction, and all sums agree.
#[track_caller]
fn check_books(sandbox: &Sandbox, bin: &Path, acknowledged: &str) {
    assert_eq!(
        ask(sandbox, bin, "select count(*) from pgbench_history"),
        acknowledged
    );
    let sums = "select (select sum(delta) from pgbench_history), \
        (select sum(abalance) from pgbench_accounts), \
        (select sum(bbalance) from pgbench_branches), \
        (select sum(tbalance) from pgbench_tellers)";
    let sums = ask(sandbox, bin, sums);
    let sums: Vec<_> = sums.split('|').collect();
    assert_eq!(sums.len(), 4);
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
}
