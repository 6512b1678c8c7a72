//! Programs that trust a disk whose server is killed under them.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::place::*;

/// The acknowledged rows that a program told on its stdout, one number a line, the last one counts.
fn last_told(child: Child) -> u64 {
    let out = BufReader::new(child.stdout.unwrap());
    let numbers = out.lines().map_while(|line| line.ok()?.trim().parse().ok());
    numbers.last().unwrap()
}

/// Writes rows, each in a transaction of its own, and says which are safe.
const SQLITE: &str = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute('pragma synchronous = full')
db.execute('create table if not exists t (n integer primary key, text text)')
for n in range(1, int(sys.argv[2]) + 1):
    db.execute('insert into t values (?, ?)', (n, str(n) * 50))
    print(n, flush=True)
";

#[test]
fn sqlite_loses_no_row_that_it_was_told_is_safe() {
    let Some(place) = Place::new() else { return };
    place
        .ploop(&["init", "-s", "128M", "-t", "ext4", "d"])
        .good();
    place.ploop(&["mount", "-m", "mnt", "d"]).good();
    let db = place.path("mnt/db");
    let mut writer = Command::new("python3");
    writer.args(["-c", SQLITE, db.to_str().unwrap(), "400"]);
    let writer = writer.stdout(Stdio::piped()).spawn().unwrap();
    for _ in 0..4 {
        place.kill_worker();
    }
    let safe = last_told(writer);
    place.ploop(&["umount", "d"]).good();
    place.ploop(&["check", "d"]).good();
    place.ploop(&["mount", "-F", "-m", "mnt", "d"]).good();
    let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]);
print(*db.execute('pragma integrity_check').fetchone(), *db.execute('select count(*) from t').fetchone())";
    let told = Command::new("python3")
        .args(["-c", script])
        .arg(&db)
        .output();
    let told = String::from_utf8(told.unwrap().stdout).unwrap();
    assert_eq!((safe, told.trim()), (400, "ok 400"));
    eprintln!("sqlite: {safe} of 400 rows through 4 deaths of the server");
    place.ploop(&["umount", "d"]).good();
}

/// A PostgreSQL server whose data lie on the disk.
struct Postgres {
    bin: String,
    data: String,
    sockets: String,
}

impl Postgres {
    fn run(&self, program: &str, args: &[&str]) -> Output {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        command.arg(format!("{}/{program}", self.bin)).args(args);
        command.current_dir("/").stdin(Stdio::null());
        command.output().unwrap()
    }

    fn good(&self, program: &str, args: &[&str]) -> String {
        let said = self.run(program, args);
        assert!(said.status.success(), "{program} {args:?}: {said:?}");
        String::from_utf8(said.stdout).unwrap()
    }

    fn control(&self, action: &[&str]) {
        let log = format!("{}/log", self.sockets);
        let base = ["-w", "-t", "120", "-D", &self.data, "-l", &log];
        self.good("pg_ctl", &[action, &base].concat());
    }

    fn start(&self) {
        let options = format!("-c listen_addresses='' -k {}", self.sockets);
        self.control(&["start", "-o", &options]);
    }

    fn sql(&self, text: &str) -> String {
        let args = [
            "-h",
            &self.sockets,
            "-X",
            "-A",
            "-t",
            "-c",
            text,
            "postgres",
        ];
        self.good("psql", &args).trim().to_owned()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // After a failure: it would hold the mount.
        self.run("pg_ctl", &["stop", "-m", "immediate", "-D", &self.data]);
    }
}

fn postgres(place: &Place) -> Option<Postgres> {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let bin = versions
        .map(|entry| entry.unwrap().path().join("bin"))
        .find(|bin| bin.join("initdb").exists());
    let Some(bin) = bin else {
        eprintln!("skipped: there is no PostgreSQL (package postgresql)");
        return None;
    };
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (data, sockets) = (place.path("mnt/data"), place.path("sockets"));
    for dir in [&data, &sockets] {
        std::fs::create_dir(dir).unwrap();
        let owned = Command::new("chown").arg("postgres:").arg(dir).status();
        assert!(owned.unwrap().success());
    }
    for dir in [place.dir.path(), &place.path("mnt")] {
        let opened = Command::new("chmod").arg("755").arg(dir).status();
        assert!(opened.unwrap().success());
    }
    Some(Postgres {
        bin: text(&bin),
        data: text(&data),
        sockets: text(&sockets),
    })
}

#[test]
fn postgres_loses_no_transaction_that_it_was_told_is_safe() {
    let Some(place) = Place::new() else { return };
    place
        .ploop(&["init", "-s", "512M", "-t", "ext4", "d"])
        .good();
    place.ploop(&["mount", "-m", "mnt", "d"]).good();
    let Some(server) = postgres(&place) else {
        return;
    };
    server.good("initdb", &["-k", "-A", "trust", "-D", &server.data]);
    server.start();
    server.sql("create table t (n bigint primary key, text text)");
    let rows = number("FIRN_PLOOP_ROWS", 300);
    let mut safe = 0;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let insert = |n: u64| format!("insert into t values ({n}, repeat('{n} ', 100))");
            let mut told = 0;
            for n in 1..=rows {
                server.sql(&insert(n));
                told = n;
            }
            told
        });
        for _ in 0..5 {
            place.kill_worker();
        }
        safe = writer.join().unwrap();
    });
    // The last kill finds both: a server of the disk and one of the database that die at once.
    place.kill_worker();
    server.control(&["stop", "-m", "immediate"]);
    place.ploop(&["umount", "d"]).good();
    place.ploop(&["check", "d"]).good();
    place.ploop(&["mount", "-F", "-m", "mnt", "d"]).good();
    server.start();
    let count = server.sql("select count(*), sum(length(text)) > 0 from t");
    assert_eq!((safe, count), (rows, format!("{rows}|t")));
    server.control(&["stop", "-m", "fast"]);
    server.good("pg_checksums", &["--check", "-D", &server.data]);
    eprintln!("PostgreSQL: {safe} of {rows} rows through 6 deaths of the server");
    drop(server);
    place.ploop(&["umount", "d"]).good();
}

/// A tree like that of a kernel's source: many directories of small files.
fn grow_tree(dir: &Path, files: u64) {
    for number in 0..files {
        let sub = dir.join(format!("{}/{}", number / 1000, number / 40));
        std::fs::create_dir_all(&sub).unwrap();
        let len = usize::try_from(number * 7919 % 16_000).unwrap();
        std::fs::write(sub.join(number.to_string()), pattern(number, len)).unwrap();
    }
}

fn hashes(dir: &Path) -> String {
    let script = "find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum";
    let said = Command::new("sh")
        .args(["-c", script])
        .current_dir(dir)
        .output();
    let said = said.unwrap();
    assert!(said.status.success());
    String::from_utf8(said.stdout).unwrap()
}

#[test]
fn a_tree_of_small_files_is_unpacked_through_the_death_of_the_server() {
    let Some(place) = Place::new() else { return };
    let files = number("FIRN_PLOOP_FILES", 4000);
    std::fs::create_dir(place.path("tree")).unwrap();
    grow_tree(&place.path("tree"), files);
    let tar = |args: &[&str]| {
        let mut tar = Command::new("tar");
        tar.args(args).current_dir(place.dir.path());
        tar.spawn().unwrap()
    };
    assert!(
        tar(&["-cf", "tree.tar", "-C", "tree", "."])
            .wait()
            .unwrap()
            .success()
    );
    place.ploop(&["init", "-s", "2G", "-t", "ext4", "d"]).good();
    place.ploop(&["mount", "-m", "mnt", "d"]).good();
    let mut unpacks = tar(&["-xf", "tree.tar", "-C", "mnt"]);
    for _ in 0..3 {
        place.kill_worker();
    }
    assert!(unpacks.wait().unwrap().success());
    place.ploop(&["umount", "d"]).good();
    place.ploop(&["check", "d"]).good();
    place.ploop(&["mount", "-F", "-m", "mnt", "d"]).good();
    let there = hashes(&place.path("mnt"));
    assert_eq!(there.lines().count() as u64, files);
    assert!(there == hashes(&place.path("tree")));
    eprintln!("{files} files with equal hashes through 3 deaths of the server");
    place.ploop(&["umount", "d"]).good();
}
