//! System V semaphores that a killed program gives back by itself, and takes again when it is restored.

use std::process::Command;

use firn_tests::{Sandbox, Task, firn_path, isolated_server};

/// Takes the semaphore of a set for as long as it lives, prints the set's id, and sleeps.
const HOLDER: &str = "
    $| = 1;
    my $id = semget(0x4649524e, 1, 0600 | 01000) // die qq(semget: $!);
    semop($id, pack(q(s!3), 0, 1, 0)) or die qq(semop: $!);
    semop($id, pack(q(s!3), 0, -1, 010000)) or die qq(semop: $!);
    print qq($id\\n);
    sleep 1 while 1;";

fn start(sandbox: &Sandbox) -> (Task<'_>, String) {
    let dir = sandbox.make_dir("work");
    let task = Task::spawn(sandbox, &dir, "perl", ["-e", HOLDER]);
    let mut id = String::new();
    sandbox.wait_until(60, "the program does not start", || {
        id = std::fs::read_to_string(dir.join("stdout")).unwrap_or_default();
        id.ends_with('\n')
    });
    (task, id.trim().to_owned())
}

/// The semaphore's value, after adding to it.
#[track_caller]
fn value(id: &str, add: i32) -> String {
    let script = format!(
        "{add} == 0 or semop({id}, pack(q(s!3), 0, {add}, 04000)) or die qq(semop: $!);
         print 0 + semctl({id}, 0, 12, 0);"
    );
    let output = Command::new("perl").args(["-e", &script]).output();
    let output = output.expect("perl is there");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn restore_of_a_lock_that_was_taken_meanwhile() {
    isolated_server(
        "restore_of_a_lock_that_was_taken_meanwhile",
        &["perl"],
        |sandbox| {
            let (task, id) = start(sandbox);
            assert_eq!(value(&id, 0), "0", "it is not taken");
            let images = sandbox.make_dir("images");
            task.dump(&images, &[]).expect_success("dump");
            assert_eq!(value(&id, -1), "0", "the kernel has not given it back");
            let refused = task.try_restore(&images);
            refused.expect_refusal(&["semaphore 0 of System V semaphore set", "last changed by"]);
            sandbox.assert_nothing_left();
            value(&id, 1);
            task.restore(&images);
            assert_eq!(value(&id, 0), "0", "the restore has not taken it");
            task.kill();
            assert_eq!(value(&id, 0), "1", "the kernel has not given it back");
            value(&id, -1);
            let mut remove = Command::new("perl");
            remove.args(["-e", &format!("semctl({id}, 0, 0, 0) or die qq($!)")]);
            sandbox.run(&mut remove).expect_success("semctl");
            let refused = task.try_restore(&images);
            refused.expect_refusal(&["System V semaphore set", "not here"]);
        },
    );
}

#[test]
fn a_dump_that_can_not_see_who_undoes() {
    isolated_server(
        "a_dump_that_can_not_see_who_undoes",
        &["perl", "setpriv"],
        |sandbox| {
            let (task, id) = start(sandbox);
            let images = sandbox.make_dir("images");
            let mut dump = Command::new("setpriv");
            dump.arg("--bounding-set=-bpf,-perfmon,-sys_admin")
                .arg(firn_path())
                .args(["dump", "-t", &task.pid().to_string(), "-D"])
                .arg(&images);
            let refused = sandbox.run(&mut dump);
            assert!(!refused.status.success(), "dumped blindly");
            let said = refused.stderr;
            let names_it = said.contains("semaphore 0 of System V semaphore set");
            assert!(names_it && said.contains("SEM_UNDO"), "{said}");
            assert_eq!(value(&id, 0), "0", "it was given back");
            assert!(task.is_alive());
            task.kill();
            assert_eq!(value(&id, 0), "1", "the kernel has not given it back");
        },
    );
}
