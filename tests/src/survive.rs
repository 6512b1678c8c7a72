//! The test of a real program: interrupted several times, it must produce what it always does.

use std::path::Path;

use crate::sandbox::Sandbox;
use crate::task::Task;

/// Times that a program which works as long as it has to is dumped and restored in a row:
/// `FIRN_TESTS_ROUNDS`, or 3.
pub fn rounds() -> usize {
    let wanted = std::env::var("FIRN_TESTS_ROUNDS").ok();
    wanted.map_or(3, |text| {
        text.parse().expect("FIRN_TESTS_ROUNDS is a number")
    })
}

/// Times that a tree in motion is dumped: `FIRN_TESTS_TRIES`, or 6.
pub fn tries() -> usize {
    let wanted = std::env::var("FIRN_TESTS_TRIES").ok();
    wanted.map_or(6, |text| {
        text.parse().expect("FIRN_TESTS_TRIES is a number")
    })
}

/// How to see that a program gets on with its work.
pub enum Progress {
    /// This file grows by that many bytes.
    File(&'static str, u64),
    /// The tasks use that much processor time, in clock ticks.
    CpuTicks(u64),
}

/// A program with its input and its results.
pub struct Program<'a> {
    /// What to run, in a directory of its own.
    pub command: Vec<String>,
    /// Makes the input in that directory.
    pub set_up: &'a dyn Fn(&Path),
    /// What must happen between two dumps.
    pub progress: Progress,
    /// Times that it is dumped and restored, [`rounds`] where it works as long as it has to.
    pub rounds: usize,
    /// A file that tells a program that it may end; without it the program must have enough to do.
    pub enough: Option<&'static str>,
    /// Files that must be the same as after an uninterrupted run.
    pub results: &'a [&'a str],
}

impl Sandbox {
    /// Runs the program twice, once in peace and once through some dumps and restores, and compares
    /// the results.
    #[track_caller]
    pub fn check_survives(&self, program: &Program<'_>) {
        let (peace, work) = (self.make_dir("peace"), self.make_dir("work"));
        (program.set_up)(&peace);
        (program.set_up)(&work);
        let enough = |dir: &Path| {
            if let Some(name) = program.enough {
                std::fs::write(dir.join(name), "").expect("room for a file");
            }
        };
        let start = |dir: &Path| Task::spawn(self, dir, &program.command[0], &program.command[1..]);
        let task = start(&work);
        for round in 1..=program.rounds {
            self.wait_for_progress(&task, &work, &program.progress);
            let images = self.make_dir(&format!("images-{round}"));
            task.dump(&images, &[])
                .expect_success(&format!("dump {round}"));
            task.restore(&images);
        }
        enough(&work);
        let status = task.wait(120);
        assert_eq!(
            status.exit_status(),
            Some(0),
            "{status:?}: {}",
            text(&work.join("stderr"))
        );
        task.wait_until_gone();
        enough(&peace);
        let undisturbed = start(&peace);
        let status = undisturbed.wait(120);
        assert_eq!(
            status.exit_status(),
            Some(0),
            "{status:?}: {}",
            text(&peace.join("stderr"))
        );
        for name in program.results.iter().chain(&["stdout", "stderr"]) {
            let (want, got) = (bytes(&peace.join(name)), bytes(&work.join(name)));
            let differs_at = want.iter().zip(&got).position(|(want, got)| want != got);
            assert!(
                want == got,
                "{name} differs: {} bytes instead of {}, first at {differs_at:?}",
                got.len(),
                want.len()
            );
        }
    }

    #[track_caller]
    fn wait_for_progress(&self, task: &Task<'_>, dir: &Path, progress: &Progress) {
        let (read, step): (Box<dyn Fn() -> u64>, u64) = match progress {
            Progress::File(name, step) => {
                let path = dir.join(name);
                (
                    Box::new(move || path.metadata().map_or(0, |file| file.len())),
                    *step,
                )
            }
            Progress::CpuTicks(step) => (Box::new(|| task.cpu_ticks()), *step),
        };
        let before = read();
        self.wait_until(60, "the program gets no further", || {
            assert!(
                task.is_alive(),
                "ended too early: {}",
                text(&dir.join("stderr"))
            );
            // Short-lived children take their processor time with them.
            read() >= before.saturating_add(step)
        });
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&bytes(path)).into_owned()
}
