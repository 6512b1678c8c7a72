//! A server in a tree that is dumped, and its clients, which are outside of it.

use std::path::Path;

use crate::sandbox::Sandbox;
use crate::task::Task;

/// A server and the clients that work with it all the time. Clients write how far they are to the file
/// `progress` in their directory, fail as soon as they see more than a pause, and end when there is a file
/// `stop`.
pub struct Service<'a> {
    /// Namespace of both.
    pub sandbox: &'a Sandbox,
    /// What is dumped.
    pub tree: &'a Task<'a>,
    /// Options of each dump and restore.
    pub options: &'a [&'a str],
    /// What keeps it busy.
    pub clients: &'a Task<'a>,
    /// Directory of the clients.
    pub clients_dir: &'a Path,
    /// How much further the clients must get between two dumps.
    pub step: u64,
}

impl Service<'_> {
    /// Dumps, kills and restores the tree so many times while the clients are at work, and has them go on
    /// for a while.
    #[track_caller]
    pub fn interrupt(&self, rounds: usize) {
        self.await_progress();
        for round in 1..=rounds {
            let images = self.sandbox.make_dir(&format!("images-{round}"));
            self.tree
                .dump(&images, self.options)
                .expect_success(&format!("dump {round}"));
            self.tree
                .try_restore_with(&images, self.options)
                .expect_success(&format!("restore {round}"));
            self.await_progress();
            std::fs::remove_dir_all(&images).expect("the images are ours");
        }
    }

    /// Waits until the clients have got further.
    #[track_caller]
    pub fn await_progress(&self) {
        let read = || {
            text(&self.clients_dir.join("progress"))
                .parse()
                .unwrap_or(0)
        };
        let before: u64 = read();
        self.sandbox
            .wait_until(120, "the clients get no further", || {
                let has_ended = self.clients.has_ended();
                assert!(!has_ended, "the clients have given up: {}", self.said());
                read() >= before + self.step
            });
    }

    /// Lets the clients end, which must be content; returns what they printed.
    #[track_caller]
    pub fn finish(&self) -> String {
        std::fs::write(self.clients_dir.join("stop"), "").expect("room for a file");
        let status = self.clients.wait(120);
        assert_eq!(status.exit_status(), Some(0), "{}", self.said());
        self.said()
    }

    fn said(&self) -> String {
        text(&self.clients_dir.join("stdout")) + &text(&self.clients_dir.join("stderr"))
    }
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
