//! A network of a test's own: two namespaces with a cable between them.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sandbox::Sandbox;

/// Addresses of the end that the test has.
pub const HERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1)),
];
/// Addresses of the other end.
pub const THERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2)),
];

/// Two network namespaces, joined by a pair of virtual Ethernet devices. They go with it.
pub struct Network {
    here: Holder,
    there: Holder,
}

/// A process that has a network namespace, so that it stays.
struct Holder {
    pid: i32,
}

impl Network {
    /// Makes both and moves this thread, with all that it starts from now on, into the first of them.
    #[track_caller]
    pub fn enter(sandbox: &Sandbox) -> Network {
        let network = Network {
            here: Holder::start(sandbox),
            there: Holder::start(sandbox),
        };
        network.here.enter();
        let there = network.there.pid.to_string();
        let run = |words: &[&str]| {
            let mut command = Command::new(words[0]);
            let done = sandbox.run(command.args(&words[1..]));
            done.expect_success(&words.join(" "));
        };
        let link = ["type", "veth", "peer", "name", "there", "netns"];
        run(&[&["ip", "link", "add", "here"], &link[..], &[&there]].concat());
        let space = format!("--net=/proc/{there}/ns/net");
        for (prefix, device, addresses) in [
            (&[][..], "here", HERE),
            (&["nsenter", &space][..], "there", THERE),
        ] {
            let ip = |words: &[&str]| run(&[prefix, &["ip"], words].concat());
            let [four, six] = addresses.map(|address| address.to_string());
            ip(&["addr", "add", &format!("{four}/24"), "dev", device]);
            ip(&["addr", "add", &format!("{six}/64"), "dev", device, "nodad"]);
            ip(&["link", "set", "lo", "up"]);
            ip(&["link", "set", device, "up"]);
        }
        network
    }

    /// Moves this thread into the other one.
    #[track_caller]
    pub fn cross(&self) {
        self.there.enter();
    }
}

impl Holder {
    #[expect(
        clippy::zombie_processes,
        reason = "the sandbox reaps by pid whatever ends"
    )]
    fn start(sandbox: &Sandbox) -> Holder {
        let child = Command::new("unshare")
            .args(["--net", "sleep", "1000000"])
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare is there, isolated tests run it");
        let pid = i32::try_from(child.id()).expect("pids are positive and small");
        let holder = Holder { pid };
        let space = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        sandbox.wait_until(20, "there is no network namespace", || {
            space(&pid.to_string()).is_some_and(|other| Some(other) != space("thread-self"))
        });
        holder
    }

    fn enter(&self) {
        let path = PathBuf::from(format!("/proc/{}/ns/net", self.pid));
        let space = File::open(path).expect("the holder lives");
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(space.as_fd(), kind).expect("root may enter namespaces");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.pid) {
            // It may have ended with the sandbox.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}
