//! What only a program that embeds the engine can give to it: plugins for files of drivers, and what it gets:
//! the masters of new pseudo terminals.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;

use firn_engine::files::plugin::{FilePlugin, ForeignFile, PluginError};
use firn_engine::{Dump, DumpError, Pid, Restore};
use firn_tests::{Sandbox, Task, isolated};

/// /dev/kmsg.
const KMSG: (u32, u32) = (1, 11);

/// Saves which file it was.
struct KernelLog;

impl FilePlugin for KernelLog {
    fn name(&self) -> &str {
        "kernel-log"
    }

    fn recognises(&self, file: &ForeignFile<'_>) -> bool {
        file.device == Some(KMSG)
    }

    fn dump(
        &self,
        file: &ForeignFile<'_>,
        duplicate: BorrowedFd<'_>,
    ) -> Result<Vec<u8>, PluginError> {
        let own = fs::read_link(format!("/proc/self/fd/{}", duplicate.as_raw_fd()))?;
        assert_eq!(
            own,
            Path::new(file.link),
            "the duplicate is of another file"
        );
        Ok(file.path().ok_or("it has no path")?.as_bytes().to_vec())
    }

    fn restore(&self, data: &[u8]) -> Result<OwnedFd, PluginError> {
        Ok(File::open(std::str::from_utf8(data)?)?.into())
    }
}

fn start<'a>(sandbox: &'a Sandbox, script: &str) -> Task<'a> {
    let dir = sandbox.make_dir("work");
    let task = Task::spawn(sandbox, &dir, "bash", ["--norc", "-c", script]);
    sandbox.wait_until(60, "the program is not ready", || {
        dir.join("ready").exists()
    });
    task
}

#[test]
fn a_file_of_a_driver_needs_its_plugin() {
    isolated(
        "a_file_of_a_driver_needs_its_plugin",
        &["bash"],
        |sandbox| {
            let task = start(
                sandbox,
                "exec 5</dev/kmsg; touch ready; while :; do sleep 1000; done",
            );
            let (pid, images) = (Pid::from_raw(task.pid()), sandbox.make_dir("images"));
            let dump = || Dump::new(pid).images_dir(&images);
            match dump().run() {
                Err(DumpError::Obstacles(found)) => {
                    let kmsg = found
                        .iter()
                        .find(|found| found.object.contains("/dev/kmsg"));
                    let hint = kmsg
                        .and_then(|found| found.hint.clone())
                        .unwrap_or_default();
                    assert!(hint.contains("plugin"), "{found:?}");
                }
                other => panic!("{other:?}"),
            }
            dump().plugin(KernelLog).run().expect("the plugin saves it");
            task.wait_until_gone();

            let without = Restore::new(&images).run().expect_err("there is no plugin");
            assert!(format!("{without:?}").contains("kernel-log"), "{without:?}");
            let restored = Restore::new(&images).plugin(KernelLog).run();
            let restored = restored.expect("the plugin opens it");
            let link = fs::read_link(format!("/proc/{}/fd/5", restored.pid)).expect("it has it");
            assert_eq!(link, Path::new("/dev/kmsg"));
            task.kill();
        },
    );
}

/// Pseudo terminals of the sandbox's own, whose numbers nobody else takes.
fn own_terminals() {
    let commands = "mount -t devpts -o newinstance,ptmxmode=666 devpts /dev/pts && \
        mount --bind /dev/pts/ptmx /dev/ptmx";
    let status = Command::new("sh").args(["-c", commands]).status();
    assert!(
        status.expect("sh runs").success(),
        "devpts can't be mounted"
    );
}

const HOLD_MASTER: &str = "import os, pty, time; master, slave = pty.openpty(); \
    print(os.ttyname(slave), flush=True); time.sleep(1000)";

#[test]
fn the_master_of_a_new_terminal_is_handed_out() {
    let name = "the_master_of_a_new_terminal_is_handed_out";
    isolated(name, &["bash", "python3"], |sandbox| {
        own_terminals();
        let mut holder = Command::new("python3")
            .args(["-c", HOLD_MASTER])
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs");
        let mut line = String::new();
        let output = holder.stdout.take().expect("it is piped");
        BufReader::new(output)
            .read_line(&mut line)
            .expect("it speaks");
        let slave = line.trim();
        let script = format!("exec <{slave} >{slave} 2>&1; touch ready; exec cat");
        let task = start(sandbox, &script);
        let (pid, images) = (Pid::from_raw(task.pid()), sandbox.make_dir("images"));
        sandbox.wait_until(60, "cat does not run", || {
            let name = fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.trim() == "cat")
        });
        let dump = || Dump::new(pid).images_dir(&images);
        assert!(matches!(dump().run(), Err(DumpError::Obstacles(_))));
        dump()
            .orphan_pts_master(true)
            .run()
            .expect("the master may be outside");
        task.wait_until_gone();
        holder.kill().expect("it is our child");
        holder.wait().expect("it is our child");

        let (give, get) = mpsc::channel();
        let give = std::sync::Mutex::new(give);
        let restore = Restore::new(&images).orphan_pts_masters(move |number, master| {
            let give = give.lock().expect("nobody panics");
            give.send((number, master)).expect("the test listens");
        });
        restore.run().expect("a new pair is made");
        let (number, master) = get.try_recv().expect("one master");
        assert_eq!(format!("/dev/pts/{number}"), slave);
        assert!(get.try_recv().is_err(), "two masters");
        let mut master = File::from(master);
        master.write_all(b"hello\n").expect("a terminal");
        // Once from the terminal's echo, once from cat.
        let mut lines = BufReader::new(master).lines();
        for _ in 0..2 {
            let line = lines.next().expect("two lines").expect("a terminal");
            assert_eq!(line.trim_end(), "hello");
        }
        task.kill();
    });
}
