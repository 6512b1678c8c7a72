//! Unix sockets with a peer outside of the tree: a service of the machine that the programs talk to.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn_tests::{Sandbox, Task, isolated};

const TALK: &str = env!("CARGO_BIN_EXE_talk");
const OUTSIDE: &str = "--ext-unix-sk";

/// A program in the tree, and where it works.
fn start<'a>(sandbox: &'a Sandbox, arguments: &[&str]) -> (Task<'a>, PathBuf) {
    let dir = sandbox.make_dir("client");
    (Task::spawn(sandbox, &dir, TALK, arguments), dir)
}

fn path_in(sandbox: &Sandbox, name: &str) -> String {
    let path = sandbox.dir().join(name);
    path.to_str().expect("our own names are text").to_owned()
}

/// Answers once on a connection, as the service does.
#[track_caller]
fn answer(stream: &mut UnixStream) {
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).expect("a duration");
    let mut asked = [0; 5];
    stream.read_exact(&mut asked).expect("the client asks");
    assert_eq!(&asked, b"ping\n");
    stream.write_all(b"pong\n").expect("the client waits");
}

/// The last answer of `said` comes, with that text.
#[track_caller]
fn await_text(sandbox: &Sandbox, path: &Path, text: &str) {
    sandbox.wait_until(20, &format!("the client does not say {text}"), || {
        std::fs::read_to_string(path).is_ok_and(|said| said == text)
    });
}

/// Starts a client of a service, and dumps it while it waits for its second answer.
fn dumped<'a>(
    sandbox: &'a Sandbox,
    listener: &UnixListener,
    name: &str,
) -> (Task<'a>, PathBuf, PathBuf) {
    let (task, dir) = start(sandbox, &["ask", name]);
    let mut stream = listener.accept().expect("the client connects").0;
    answer(&mut stream);
    await_text(sandbox, &dir.join("answers"), "1");
    let images = sandbox.make_dir("images");
    let refused = task.dump(&images, &[]);
    assert!(!refused.status.success(), "it was dumped");
    for word in ["outside the tree", OUTSIDE] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    // The client has asked before it was stopped; whoever answers later has to hear it first.
    stream.read_exact(&mut [0; 5]).expect("the client asks");
    task.dump(&images, &[OUTSIDE]).expect_success("dump");
    (task, dir, images)
}

#[test]
fn a_client_connects_again_where_it_is_told_to() {
    let name = "a_client_connects_again_where_it_is_told_to";
    isolated(name, &[], |sandbox| {
        let path = path_in(sandbox, "service");
        let listener = UnixListener::bind(&path).expect("a free name");
        let (task, dir, images) = dumped(sandbox, &listener, &path);
        let policy = format!("{path}=reconnect");
        let options = [OUTSIDE, "--outside-peer", &policy];
        task.try_restore_with(&images, &options)
            .expect_success("restore");
        let mut stream = listener.accept().expect("the client connects again").0;
        stream.write_all(b"pong\n").expect("the client waits");
        await_text(sandbox, &dir.join("answers"), "2");
        answer(&mut stream);
        drop(stream);
        assert_eq!(
            task.wait(20).exit_status(),
            Some(0),
            "the client has failed"
        );
    });
}

#[test]
fn a_client_sees_the_end_where_nothing_is_said() {
    let name = "a_client_sees_the_end_where_nothing_is_said";
    isolated(name, &[], |sandbox| {
        let path = path_in(sandbox, "service");
        let listener = UnixListener::bind(&path).expect("a free name");
        let (task, dir, images) = dumped(sandbox, &listener, &path);
        task.try_restore_with(&images, &[OUTSIDE])
            .expect_success("restore");
        assert_eq!(
            task.wait(20).exit_status(),
            Some(0),
            "the client has failed"
        );
        await_text(sandbox, &dir.join("answers"), "1");
    });
}

#[test]
fn a_client_gets_the_descriptor_that_it_is_given() {
    let name = "a_client_gets_the_descriptor_that_it_is_given";
    isolated(name, &[], |sandbox| {
        let path = path_in(sandbox, "service");
        let listener = UnixListener::bind(&path).expect("a free name");
        let (task, dir, images) = dumped(sandbox, &listener, &path);
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        let theirs = OwnedFd::from(theirs);
        let none = rustix::io::FdFlags::empty();
        rustix::io::fcntl_setfd(&theirs, none).expect("it is open");
        let policy = format!("*=fd[{}]", theirs.as_raw_fd());
        let options = [OUTSIDE, "--outside-peer", &policy];
        task.try_restore_with(&images, &options)
            .expect_success("restore");
        drop(theirs);
        ours.write_all(b"pong\n").expect("the client waits");
        await_text(sandbox, &dir.join("answers"), "2");
        answer(&mut ours);
        drop(ours);
        assert_eq!(
            task.wait(20).exit_status(),
            Some(0),
            "the client has failed"
        );
    });
}

#[test]
fn a_sender_of_datagrams_finds_its_service_again() {
    let name = "a_sender_of_datagrams_finds_its_service_again";
    isolated(name, &[], |sandbox| {
        let path = path_in(sandbox, "log");
        let service = UnixDatagram::bind(&path).expect("a free name");
        let patience = Some(Duration::from_secs(20));
        service.set_read_timeout(patience).expect("a duration");
        let (task, _) = start(sandbox, &["log", &path]);
        let hear = || {
            let mut room = [0; 100];
            let len = service.recv(&mut room).expect("the client logs");
            assert_eq!(&room[..len], b"a line of a log");
        };
        hear();
        let images = sandbox.make_dir("images");
        task.dump(&images, &[OUTSIDE]).expect_success("dump");
        service.set_nonblocking(true).expect("it is open");
        while service.recv(&mut [0; 100]).is_ok() {}
        service.set_nonblocking(false).expect("it is open");
        task.try_restore_with(&images, &[OUTSIDE])
            .expect_success("restore");
        hear();
        hear();
        task.kill();
    });
}
