//! Whole dumps and restores through the command line: reports, scripts, pid files, statuses.

mod common;

use std::path::Path;
use std::process::Stdio;

use common::{Restored, Said, Victim, can_run, firn, read, run, until};

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("images")).unwrap();
        Scene { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn images(&self) -> String {
        self.path().join("images").display().to_string()
    }

    /// Says `up` in `log`, waits for `go`, says `on` and ends with status 7, all without children: those
    /// of a killed tree would keep their pids until init reaps them.
    fn victim(&self) -> Victim {
        let script = "mkfifo clock; exec 3<>clock; echo up >> log; \
                      while [ ! -e go ]; do read -rt 0.05 <&3; done; echo on >> log; exit 7";
        let victim = Victim::start(script, self.path());
        until("the script", || read(&self.path().join("log")) == "up\n");
        victim
    }

    fn let_go(&self) {
        std::fs::write(self.path().join("go"), "").unwrap();
    }

    fn dump(&self, victim: &Victim, more: &[&str]) -> Said {
        let (pid, images) = (victim.pid(), self.images());
        let args = ["dump", "-t", &pid, "-D", &images, "--json"];
        run(&[&args, more].concat())
    }

    fn restore(&self, more: &[&str]) -> Said {
        let images = self.images();
        run(&[&["restore", "-D", &images, "--json"], more].concat())
    }

    fn nothing_was_written(&self) -> bool {
        std::fs::read_dir(self.images()).unwrap().count() == 0
    }
}

#[test]
fn dump_reports_and_restore_brings_back() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let mut victim = scene.victim();
    let report = scene
        .dump(&victim, &["-o", "dump.log", "-v4"])
        .good()
        .json();
    assert_eq!(
        (report["command"].as_str(), report["ok"].as_bool()),
        (Some("dump"), Some(true))
    );
    assert!(report["tasks"].as_u64().unwrap() >= 1 && report["bytes"].as_u64().unwrap() > 0);
    assert!(
        report["frozen_us"].as_u64() <= report["total_us"].as_u64(),
        "{report}"
    );
    assert!(
        !victim.0.wait().unwrap().success(),
        "dumped tasks are killed"
    );
    let log = read(&Path::new(&scene.images()).join("dump.log"));
    assert!(log.starts_with('('), "lines start with the time: {log}");

    let report = scene.restore(&[
        "-d",
        "--pidfile",
        "pid",
        "-W",
        scene.path().to_str().unwrap(),
    ]);
    let report = report.good().json();
    let restored = Restored(report["pid"].to_string());
    assert_eq!(restored.0, victim.pid());
    assert_eq!(read(&scene.path().join("pid")), restored.0);
    assert!(restored.is_running());
    scene.let_go();
    until("the restored script", || {
        read(&scene.path().join("log")) == "up\non\n"
    });
}

#[test]
fn a_restore_in_the_foreground_ends_with_the_roots_status() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let mut victim = scene.victim();
    scene.dump(&victim, &[]).good();
    victim.0.wait().unwrap();
    scene.let_go();
    let said = scene.restore(&[]);
    assert_eq!(said.code, Some(7), "{said:?}");
    assert_eq!(said.json()["pid"].to_string(), victim.pid());
}

#[test]
fn leave_running_leaves_it_running() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let mut victim = scene.victim();
    scene.dump(&victim, &["-R"]).good();
    assert!(victim.0.try_wait().unwrap().is_none());
    scene.let_go();
    assert_eq!(victim.0.wait().unwrap().code(), Some(7));
}

#[test]
fn statistics_are_printed_and_written() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let victim = scene.victim();
    let said = run(&[
        "dump",
        "-t",
        &victim.pid(),
        "-D",
        &scene.images(),
        "-R",
        "--display-stats",
    ]);
    let said = said.good();
    assert!(
        said.out.contains("Frozen time") && said.out.contains("Pages written"),
        "{said:?}"
    );
    assert!(Path::new(&scene.images()).join("stats-dump").exists());
    assert!(
        said.err.is_empty(),
        "nothing for people where nobody looks on: {said:?}"
    );
}

#[test]
fn a_report_that_nobody_can_read_undoes_nothing() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let victim = scene.victim();
    let (pid, images) = (victim.pid(), scene.images());
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full");
    for option in ["--json", "--display-stats"] {
        let mut dump = firn(&["dump", "-t", &pid, "-D", &images, "-R", option]);
        let said = Said::of(dump.stdout(full().unwrap()).output().unwrap());
        assert_eq!(said.code, Some(0), "{said:?}");
        assert!(said.err.contains("the report can't be written"), "{said:?}");
    }
    let mut dump = firn(&["dump", "-t", &pid, "-D", &images, "-R", "--json"]);
    let mut dump = dump.stdout(Stdio::piped()).stderr(full().unwrap()).spawn();
    let dump = dump.as_mut().unwrap();
    drop(dump.stdout.take());
    assert_eq!(dump.wait().unwrap().code(), Some(0));
    let mut check = firn(&["check"]);
    let said = Said::of(check.stdout(full().unwrap()).output().unwrap());
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.err.contains("stdout can't be written"), "{said:?}");
}

#[test]
fn scripts_run_and_a_failing_one_leaves_the_tasks_alone() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let mut victim = scene.victim();
    let script = format!(
        "echo $CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID >> {}/actions; \
         [ $CRTOOLS_SCRIPT_ACTION != post-dump ] || exit 9",
        scene.path().display()
    );
    let said = scene.dump(&victim, &["--action-script", &script]);
    assert_eq!(said.code, Some(9), "{said:?}");
    let actions = read(&scene.path().join("actions"));
    assert!(actions.starts_with("pre-dump"), "{actions}");
    assert!(
        actions.contains(&format!("post-dump {}\n", victim.pid())),
        "{actions}"
    );
    assert!(victim.0.try_wait().unwrap().is_none(), "the tasks run on");
    scene.let_go();
    assert_eq!(victim.0.wait().unwrap().code(), Some(7));
}

#[test]
fn the_command_after_a_restore_is_the_parent() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let mut victim = scene.victim();
    scene.dump(&victim, &[]).good();
    victim.0.wait().unwrap();
    let script =
        "grep PPid /proc/$CRTOOLS_INIT_PID/status > ppid; echo $$ $CRTOOLS_SCRIPT_ACTION >> ppid";
    let images = scene.images();
    let output = firn(&[
        "restore",
        "-D",
        &images,
        "--exec-cmd",
        "--",
        "sh",
        "-c",
        script,
    ])
    .current_dir(scene.path())
    .output();
    Said::of(output.unwrap()).good();
    // Not before: a shell that waits for grep reaps any other child that ended as well.
    scene.let_go();
    let told = read(&scene.path().join("ppid"));
    let words: Vec<&str> = told.split_whitespace().collect();
    assert_eq!((words[1], words[3]), (words[2], "post-resume"), "{told}");
}

#[test]
fn a_process_that_is_gone_is_named() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let victim = scene.victim();
    let pid = victim.pid();
    drop(victim);
    let said = run(&["dump", "-t", &pid, "-D", &scene.images(), "--json"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    let json = said.json();
    assert_eq!(json["error"]["class"], "gone", "{json}");
    assert!(said.err.contains(&pid), "{said:?}");
    assert!(scene.nothing_was_written());
}

#[test]
fn a_pid_in_use_is_named_and_the_pid_file_goes_again() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let victim = scene.victim();
    scene.dump(&victim, &["-R"]).good();
    let said = scene.restore(&["-d", "--pidfile", "pid"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.err.contains(&victim.pid()), "{said:?}");
    assert!(!Path::new(&scene.images()).join("pid").exists());
    assert!(Restored(victim.pid()).is_running());
}

#[test]
fn the_plan_is_printed_and_nothing_is_made() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let victim = scene.victim();
    scene.dump(&victim, &[]).good();
    let pid = victim.pid();
    drop(victim);
    let said = run(&["restore", "-D", &scene.images(), "--plan"]).good();
    assert!(
        said.out.contains("mmap") && said.out.contains("close_range"),
        "{}",
        said.out
    );
    assert!(!Path::new("/proc").join(&pid).exists());
}

#[test]
fn an_interrupted_dump_takes_everything_back() {
    if !can_run() {
        return;
    }
    let scene = Scene::new();
    let mut victim = scene.victim();
    let ready = scene.path().join("ready");
    // The script runs while the tasks are frozen, so the signal meets a dump in its middle.
    let go_on = scene.path().join("go-on");
    let script = format!(
        "[ $CRTOOLS_SCRIPT_ACTION != post-dump ] || \
         {{ touch {}; while [ ! -e {} ]; do sleep 0.02; done; }}",
        ready.display(),
        go_on.display()
    );
    let images = scene.images();
    let dump = firn(&[
        "dump",
        "-t",
        &victim.pid(),
        "-D",
        &images,
        "--action-script",
        &script,
    ])
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    until("the dump", || ready.exists());
    let pid = dump.id().to_string();
    for _ in 0..2 {
        assert!(
            std::process::Command::new("kill")
                // SIGINT may be ignored, as in the background of a script, and stays so.
                .args(["-TERM", &pid])
                .status()
                .unwrap()
                .success()
        );
    }
    std::fs::write(go_on, "").unwrap();
    let said = Said::of(dump.wait_with_output().unwrap());
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(scene.nothing_was_written(), "{said:?}");
    scene.let_go();
    assert_eq!(victim.0.wait().unwrap().code(), Some(7));
}
