//! What cannot be done is refused in one sentence, and leaves everything as it was.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use firn_tests::{Sandbox, Task, firn_path, isolated};

const COUNTER: &str = env!("CARGO_BIN_EXE_counter");

/// A task that counts in `DIR/count`, seen to be running.
struct Counter<'a> {
    task: Task<'a>,
    file: PathBuf,
    sandbox: &'a Sandbox,
}

impl<'a> Counter<'a> {
    fn start(sandbox: &'a Sandbox, mib: usize) -> Self {
        let dir = sandbox.make_dir("work");
        let task = Task::spawn(sandbox, &dir, COUNTER, ["count", &mib.to_string()]);
        let counter = Self {
            task,
            file: dir.join("count"),
            sandbox,
        };
        counter.assert_counting();
        counter
    }

    fn value(&self) -> u64 {
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        text.parse().unwrap_or(0)
    }

    #[track_caller]
    fn assert_counting(&self) {
        let before = self.value();
        self.sandbox.wait_until(60, "the source does not run", || {
            self.value() > before && !self.task.is_stopped()
        });
    }
}

/// Names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("the directory is readable");
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry
            .expect("readable")
            .file_name()
            .to_string_lossy()
            .into_owned()
    };
    let mut names: Vec<_> = entries.map(name).collect();
    names.sort();
    names
}

/// Names of image files: anything but logs.
fn images_in(dir: &Path) -> Vec<String> {
    names(dir)
        .into_iter()
        .filter(|name| !name.ends_with(".log"))
        .collect()
}

/// Restores what a refused restore left alone, to show that only the named thing was in the way.
#[track_caller]
fn restore_after_all(counter: &Counter<'_>, images: &Path) {
    counter.sandbox.assert_nothing_left();
    counter.task.restore(images);
    counter.assert_counting();
    counter.task.kill();
}

#[test]
fn dump_of_a_pid_that_is_gone() {
    isolated("dump_of_a_pid_that_is_gone", &[], |sandbox| {
        let images = sandbox.make_dir("images");
        let images_text = images.to_str().expect("scratch names are plain");
        let refused = sandbox.firn(["dump", "-t", "4100", "-D", images_text, "-o", "dump.log"]);
        refused.expect_refusal(&["4100"]);
        assert_eq!(images_in(&images), [""; 0], "something was left behind");
    });
}

#[test]
fn dump_into_a_directory_that_is_missing() {
    isolated("dump_into_a_directory_that_is_missing", &[], |sandbox| {
        let counter = Counter::start(sandbox, 0);
        let missing = sandbox.dir().join("no-such-directory");
        counter
            .task
            .dump(&missing, &[])
            .expect_refusal(&["no-such-directory"]);
        counter.assert_counting();
        counter.task.kill();
    });
}

#[test]
fn dump_of_our_own_ancestor() {
    isolated("dump_of_our_own_ancestor", &[], |sandbox| {
        let images = sandbox.make_dir("images");
        let images_text = images.to_str().expect("scratch names are plain");
        let refused = sandbox.firn(["dump", "-t", "1", "-D", images_text, "-o", "dump.log"]);
        refused.expect_refusal(&["1"]);
        assert_eq!(images_in(&images), [""; 0], "something was left behind");
    });
}

#[test]
fn dump_without_the_rights() {
    isolated("dump_without_the_rights", &["setpriv"], |sandbox| {
        let counter = Counter::start(sandbox, 0);
        let images = open_to_all(sandbox);
        let mut command = as_nobody(sandbox);
        command.args([
            "dump",
            "-t",
            &counter.task.pid().to_string(),
            "-o",
            "dump.log",
            "-D",
        ]);
        sandbox.run(command.arg(&images)).expect_refusal(&[]);
        assert_eq!(images_in(&images), [""; 0], "something was left behind");
        counter.assert_counting();
        counter.task.kill();
    });
}

#[test]
fn restore_without_the_rights() {
    isolated("restore_without_the_rights", &["setpriv"], |sandbox| {
        let counter = Counter::start(sandbox, 0);
        let images = open_to_all(sandbox);
        counter.task.dump(&images, &[]).expect_success("dump");
        for name in names(&images) {
            let readable = std::fs::Permissions::from_mode(0o644);
            std::fs::set_permissions(images.join(name), readable).expect("it is ours");
        }
        let mut command = as_nobody(sandbox);
        command.args(["restore", "-d", "-o", "nobody.log", "-D"]);
        sandbox.run(command.arg(&images)).expect_refusal(&[]);
        restore_after_all(&counter, &images);
    });
}

/// A directory that anybody may write to.
fn open_to_all(sandbox: &Sandbox) -> PathBuf {
    let everybody = |mode| std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(sandbox.dir(), everybody(0o755)).expect("it is ours");
    let images = sandbox.make_dir("images");
    std::fs::set_permissions(&images, everybody(0o777)).expect("it is ours");
    images
}

/// Firn, run by a user without any rights, from where that user can reach it.
fn as_nobody(sandbox: &Sandbox) -> Command {
    let reachable = sandbox.dir().join("firn");
    std::fs::copy(firn_path(), &reachable).expect("room for the binary");
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=-all",
    ]);
    // Whose home is not where root keeps its configuration.
    command.env("HOME", "/").arg(reachable);
    command
}

#[test]
fn disk_full_while_dumping() {
    isolated("disk_full_while_dumping", &["mount"], |sandbox| {
        let counter = Counter::start(sandbox, 16);
        let (small, work) = (sandbox.make_dir("small"), sandbox.make_dir("logs"));
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"])
            .arg(&small);
        sandbox.run(&mut mount).expect_success("mount");
        std::fs::write(small.join("mine"), "the caller's").expect("room for a line");
        let mut dump = counter.task.dump_command(&small);
        sandbox
            .run(dump.arg("-W").arg(&work))
            .expect_refusal(&["space"]);
        assert_eq!(
            names(&small),
            ["mine"],
            "only the caller's file is to be left"
        );
        counter.assert_counting();
        counter.task.kill();
        let mut unmount = Command::new("umount");
        sandbox.run(unmount.arg(&small)).expect_success("umount");
    });
}

#[test]
fn restore_while_the_pid_is_in_use() {
    isolated("restore_while_the_pid_is_in_use", &[], |sandbox| {
        let counter = Counter::start(sandbox, 0);
        let images = sandbox.make_dir("images");
        counter.task.dump(&images, &["-R"]).expect_success("dump");
        counter.assert_counting();
        let pid = counter.task.pid().to_string();
        counter.task.try_restore(&images).expect_refusal(&[&pid]);
        counter.assert_counting();
        assert_eq!(
            sandbox.pids(),
            [counter.task.pid()],
            "the refused restore left a task"
        );
        counter.task.kill();
        restore_after_all(&counter, &images);
    });
}

#[test]
fn restore_without_an_open_file() {
    isolated("restore_without_an_open_file", &[], |sandbox| {
        let counter = Counter::start(sandbox, 0);
        let images = sandbox.make_dir("images");
        counter.task.dump(&images, &[]).expect_success("dump");
        let aside = sandbox.dir().join("aside");
        std::fs::rename(&counter.file, &aside).expect("the file was there");
        counter.task.try_restore(&images).expect_refusal(&["count"]);
        std::fs::rename(&aside, &counter.file).expect("it is where it was put");
        restore_after_all(&counter, &images);
    });
}

#[test]
fn restore_with_an_open_file_of_another_size() {
    isolated(
        "restore_with_an_open_file_of_another_size",
        &[],
        |sandbox| {
            let counter = Counter::start(sandbox, 0);
            let images = sandbox.make_dir("images");
            counter.task.dump(&images, &[]).expect_success("dump");
            let right = std::fs::read(&counter.file).expect("the file is there");
            std::fs::write(&counter.file, "short").expect("the file is writable");
            counter
                .task
                .try_restore(&images)
                .expect_refusal(&["count", "20 bytes"]);
            std::fs::write(&counter.file, right).expect("the file is writable");
            restore_after_all(&counter, &images);
        },
    );
}

#[test]
fn restore_with_an_open_file_written_to_since() {
    isolated(
        "restore_with_an_open_file_written_to_since",
        &[],
        |sandbox| {
            let counter = Counter::start(sandbox, 0);
            let images = sandbox.make_dir("images");
            counter.task.dump(&images, &[]).expect_success("dump");
            let by_mtime = ["--file-validation", "mtime"];
            let by_mtime = || counter.task.try_restore_with(&images, &by_mtime);
            let written = std::fs::metadata(&counter.file).expect("it is there");
            let written = written.modified().expect("it has a time");
            let file = std::fs::File::options().write(true).open(&counter.file);
            let file = file.expect("it is writable");
            let later = written + Duration::from_nanos(1);
            file.set_modified(later).expect("it is ours");
            by_mtime().expect_refusal(&["count", "last written to"]);
            sandbox.assert_nothing_left();
            // Neither the usual way to recognise files nor the right time has anything against it.
            counter.task.restore(&images);
            counter.assert_counting();
            counter.task.kill();
            file.set_modified(written).expect("it is ours");
            by_mtime().expect_success("restore");
            counter.assert_counting();
            counter.task.kill();
        },
    );
}

#[test]
fn restore_without_the_executable() {
    isolated("restore_without_the_executable", &[], |sandbox| {
        let dir = sandbox.make_dir("work");
        let program = dir.join("own-counter");
        std::fs::copy(COUNTER, &program).expect("room for the binary");
        let task = Task::spawn(sandbox, &dir, &program, ["count"]);
        sandbox.wait_until(60, "the program does not start", || {
            dir.join("count").exists()
        });
        let images = sandbox.make_dir("images");
        task.dump(&images, &[]).expect_success("dump");
        std::fs::remove_file(&program).expect("the binary is there");
        task.try_restore(&images).expect_refusal(&["own-counter"]);
    });
}

#[test]
fn restore_that_a_script_forbids() {
    isolated("restore_that_a_script_forbids", &[], |sandbox| {
        let dir = sandbox.make_dir("work");
        let program = env!("CARGO_BIN_EXE_many-threads");
        let task = Task::spawn(sandbox, &dir, program, ["progress"; 0]);
        sandbox.wait_until(60, "the program does not start", || {
            std::fs::metadata(dir.join("progress")).is_ok_and(|file| file.len() > 0)
        });
        let images = sandbox.make_dir("images");
        task.dump(&images, &[]).expect_success("dump");
        // All threads are complete and held by the engine by then.
        let script = "[ $CRTOOLS_SCRIPT_ACTION != post-restore ]";
        let refused = task.try_restore_with(&images, &["--action-script", script]);
        refused.expect_refusal(&["post-restore"]);
        assert!(!refused.log.contains("do not go"), "{}", refused.log);
        sandbox.assert_nothing_left();
        task.restore(&images);
        task.kill();
    });
}

#[test]
fn restore_from_an_empty_directory() {
    isolated("restore_from_an_empty_directory", &[], |sandbox| {
        let images = sandbox.make_dir("images");
        let images_text = images.to_str().expect("scratch names are plain");
        let refused = sandbox.firn(["restore", "-d", "-D", images_text, "-o", "restore.log"]);
        refused.expect_refusal(&["inventory"]);
    });
}

#[test]
fn restore_from_truncated_images() {
    isolated("restore_from_truncated_images", &[], |sandbox| {
        let counter = Counter::start(sandbox, 1);
        let images = sandbox.make_dir("images");
        counter.task.dump(&images, &[]).expect_success("dump");
        let needed = [
            "inventory",
            "pstree",
            "core-",
            "mm-",
            "pagemap-",
            "pages-",
            "files",
            "fs-",
        ];
        let kinds: Vec<_> = needed.into_iter().chain(["fdinfo-", "ids-"]).collect();
        for name in images_in(&images) {
            if !name.ends_with(".img") || !kinds.iter().any(|kind| name.starts_with(kind)) {
                continue;
            }
            let whole = std::fs::read(images.join(&name)).expect("the image is readable");
            for cut in [whole.len() / 2, whole.len() - 1] {
                std::fs::write(images.join(&name), &whole[..cut]).expect("the image is ours");
                let refused = counter.task.try_restore(&images);
                assert!(
                    !refused.status.success(),
                    "{name} of {cut} bytes was accepted"
                );
                refused.expect_refusal(&[&name]);
                sandbox.assert_nothing_left();
            }
            std::fs::write(images.join(&name), whole).expect("the image is ours");
        }
        restore_after_all(&counter, &images);
    });
}

#[test]
fn unknown_options_and_missing_ones() {
    isolated("unknown_options_and_missing_ones", &[], |sandbox| {
        for (arguments, named) in [
            (&["dump", "--no-such-option"][..], "--no-such-option"),
            (&["dump", "-D", "/tmp"], "--tree"),
            (&["no-such-command"], "no-such-command"),
        ] {
            let refused = sandbox.firn(arguments);
            assert!(!refused.status.success(), "{arguments:?} was accepted");
            assert!(
                refused.stderr.contains(named),
                "{arguments:?}: {}",
                refused.stderr
            );
        }
    });
}

/// `sleep`, started by `setpriv` with these options, and its images.
fn dumped_sleeper<'a>(sandbox: &'a Sandbox, options: &[&str]) -> (Task<'a>, PathBuf) {
    let dir = sandbox.make_dir("work");
    let arguments = options.iter().chain(&["sleep", "1000"]);
    let task = Task::spawn(sandbox, &dir, "setpriv", arguments);
    sandbox.wait_until(60, "sleep does not start", || {
        let name = std::fs::read_to_string(format!("/proc/{}/comm", task.pid()));
        name.is_ok_and(|name| name.trim() == "sleep")
    });
    let images = sandbox.make_dir("images");
    task.dump(&images, &[]).expect_success("dump");
    (task, images)
}

/// A restore by somebody with less than we have.
fn restore_bounded(images: &Path, bounds: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args([bounds, "--no-new-privs"]).arg(firn_path());
    command.args(["restore", "-d", "-D"]).arg(images);
    command
}

#[test]
fn restore_by_somebody_who_has_fewer_capabilities() {
    isolated(
        "restore_by_somebody_who_has_fewer_capabilities",
        &["setpriv"],
        |sandbox| {
            let (task, images) = dumped_sleeper(sandbox, &["--inh-caps=-all"]);
            let mut command = restore_bounded(&images, "--bounding-set=-syslog,-net_raw");
            let refused = sandbox.run(&mut command);
            refused.expect_refusal(&["CAP_NET_RAW, CAP_SYSLOG"]);
            sandbox.assert_nothing_left();
            task.restore(&images);
            task.kill();
        },
    );
}

#[test]
fn restore_by_somebody_who_can_not_pass_on_a_capability() {
    isolated(
        "restore_by_somebody_who_can_not_pass_on_a_capability",
        &["setpriv"],
        |sandbox| {
            let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
            let (task, images) = dumped_sleeper(sandbox, &user);
            let mut command = restore_bounded(&images, "--bounding-set=-net_raw");
            let refused = sandbox.run(command.arg("--strict"));
            refused.expect_refusal(&["CAP_NET_RAW", "no_new_privs"]);
            sandbox.assert_nothing_left();
            let mut command = restore_bounded(&images, "--bounding-set=-net_raw");
            sandbox.forget(task.pid());
            let done = sandbox.run(&mut command).expect_success("restore");
            let said = done.stderr;
            assert!(
                said.contains("CAP_NET_RAW") && said.contains("no_new_privs"),
                "{said}"
            );
            task.kill();
        },
    );
}

#[test]
fn restore_by_somebody_who_can_not_raise_a_hard_limit() {
    isolated(
        "restore_by_somebody_who_can_not_raise_a_hard_limit",
        &["setpriv", "prlimit"],
        |sandbox| {
            let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
            let (task, images) = dumped_sleeper(sandbox, &user);
            let restore = |options: &[&str]| {
                let mut command = Command::new("prlimit");
                command.args(["--rss=4096:4096", "setpriv"]);
                command.args(["--bounding-set=-sys_resource", "--inh-caps=-all"]);
                command.arg(firn_path()).args(["restore", "-d", "-D"]);
                sandbox.forget(task.pid());
                sandbox.run(command.arg(&images).args(options))
            };
            let lost = "RLIMIT_RSS stays at 4096";
            restore(&["--strict"]).expect_refusal(&[lost, "CAP_SYS_RESOURCE"]);
            sandbox.assert_nothing_left();
            let said = restore(&[]).expect_success("restore").stderr;
            assert_eq!(said.matches(lost).count(), 1, "{said}");
            task.kill();
        },
    );
}

/// Puts itself under a filter that lets everything through, and runs a program.
const UNDER_A_FILTER: &str = r#"
    my $allow = pack("SCCL", 6, 0, 0, 0x7fff0000);
    syscall(157, 38, 1, 0, 0, 0) == 0 or die "no_new_privs: $!";
    syscall(317, 1, 0, pack("Sx6P", 1, $allow)) == 0 or die "seccomp: $!";
    exec @ARGV;
"#;

#[test]
fn restore_by_somebody_under_seccomp_filters() {
    isolated(
        "restore_by_somebody_under_seccomp_filters",
        &["setpriv", "perl"],
        |sandbox| {
            let (task, images) = dumped_sleeper(sandbox, &["--no-new-privs"]);
            let restore = |options: &[&str]| {
                let mut command = Command::new("perl");
                command.args(["-e", UNDER_A_FILTER]).arg(firn_path());
                command.args(["restore", "-d", "-D"]).arg(&images);
                sandbox.forget(task.pid());
                sandbox.run(command.args(options))
            };
            restore(&["--strict"]).expect_refusal(&["seccomp filters of the process"]);
            sandbox.assert_nothing_left();
            let said = restore(&[]).expect_success("restore").stderr;
            assert!(said.contains("seccomp filters of the process"), "{said}");
            task.kill();
        },
    );
}

/// A child leads a group, leaves a grandchild there, and goes back to the group that the shell has made.
const BACK_IN_AN_OUTER_GROUP: &str = r#"
    my $outer = getpgrp;
    pipe my $reader, my $writer;
    if (!fork) {
        setpgrp 0, 0;
        if (!fork) { sleep 1000 }
        setpgrp 0, $outer;
        syswrite $writer, "x";
        sleep 1000;
    }
    sysread $reader, my $ready, 1;
    open my $file, ">", "pid.new"; print $file $$; close $file;
    rename "pid.new", "pid";
    sleep 1000;
"#;

#[test]
fn dump_of_a_tree_that_no_restore_could_make() {
    isolated(
        "dump_of_a_tree_that_no_restore_could_make",
        &["perl"],
        |sandbox| {
            let dir = sandbox.make_dir("work");
            let arguments = ["-c", "perl -e \"$1\"; :", "sh", BACK_IN_AN_OUTER_GROUP];
            let shell = Task::spawn(sandbox, &dir, "sh", arguments);
            sandbox.wait_until(60, "perl does not start", || dir.join("pid").exists());
            let pid = std::fs::read_to_string(dir.join("pid")).expect("it is there");
            let images = sandbox.make_dir("images");
            let named = images.to_str().expect("a plain path");
            let refused = sandbox.firn(["dump", "--shell-job", "-t", &pid, "-D", named]);
            refused.expect_refusal(&["has led the process group of its pid"]);
            assert!(refused.stderr.contains("has ended"), "{}", refused.stderr);
            let left = std::fs::read_dir(&images).expect("the directory stays");
            assert_eq!(left.count(), 0, "files are left");
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
            assert!(stat.contains(") S "), "{stat}");
            shell.kill();
        },
    );
}
