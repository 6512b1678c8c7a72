//! Programs that live on terminals of their own: a tmux server with a shell and an editor, with an attached
//! client or without, and `script`. After each restore the screens are what they were, and keys work.

use std::path::{Path, PathBuf};
use std::process::Command;

use firn_tests::{Finished, Program, Progress, Sandbox, Task, rounds};

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");
const SHELL: &str = "s:0.0";
const EDITOR: &str = "s:0.1";

/// A tmux server in a directory.
struct Tmux<'a> {
    sandbox: &'a Sandbox,
    dir: PathBuf,
}

impl Tmux<'_> {
    /// Runs one of its commands from outside and returns what it prints.
    #[track_caller]
    fn run(&self, words: &[&str]) -> String {
        let done = self.try_run(words);
        done.expect_success(&words.join(" ")).stdout
    }

    fn try_run(&self, words: &[&str]) -> Finished {
        let mut tmux = Command::new("tmux");
        tmux.args(["-S", "socket", "-f", "/dev/null"]);
        tmux.args(words).current_dir(&self.dir);
        tmux.env("TERM", "xterm").env_remove("TMUX");
        self.sandbox.run(&mut tmux)
    }

    fn screen(&self, pane: &str) -> String {
        self.run(&["capture-pane", "-p", "-t", pane])
    }

    #[track_caller]
    fn press(&self, pane: &str, keys: &[&str]) {
        self.run(&[&["send-keys", "-t", pane], keys].concat());
    }

    #[track_caller]
    fn await_text(&self, pane: &str, text: &str) {
        let what = format!("pane {pane} never shows {text:?}");
        self.sandbox
            .wait_until(30, &what, || self.screen(pane).contains(text));
    }

    /// Starts an editor beside the shell.
    fn start_editor(&self) {
        // Of root or not.
        self.await_text(SHELL, "bash-");
        let editor = [
            "split-window",
            "-t",
            SHELL,
            "vim.tiny",
            "-N",
            "-u",
            "NONE",
            "text",
        ];
        self.run(&editor);
        self.await_text(EDITOR, "~");
        self.press(EDITOR, &["i"]);
    }

    /// Works in both panes.
    fn work(&self, round: usize) {
        let words = format!("echo shell $((1000 + {round}))");
        self.press(SHELL, &[&words, "Enter"]);
        self.await_text(SHELL, &format!("shell {}", 1000 + round));
        self.press(EDITOR, &[&format!("line {round}"), "Enter"]);
        self.await_text(EDITOR, &format!("line {round}"));
        // The beginning of a line, which a restore must not take for one.
        self.press(SHELL, &["echo begun"]);
        self.await_text(SHELL, "echo begun");
    }

    /// Ends the line that was begun.
    fn go_on(&self, round: usize) {
        self.press(SHELL, &[&format!(" {round}"), "Enter"]);
        self.await_text(SHELL, &format!("\nbegun {round}"));
    }

    fn screens(&self) -> [String; 2] {
        [SHELL, EDITOR].map(|pane| self.screen(pane))
    }
}

#[track_caller]
fn move_once(sandbox: &Sandbox, task: &Task<'_>, round: usize) {
    let images = sandbox.make_dir(&format!("images-{round}"));
    task.dump(&images, &[]).expect_success("dump");
    task.restore(&images);
}

/// Moves a tree with a server again and again while somebody works in it.
fn interrupt(tmux: &Tmux<'_>, task: &Task<'_>, extra: &dyn Fn(usize)) {
    tmux.start_editor();
    for round in 1..=rounds() {
        tmux.work(round);
        let before = tmux.screens();
        move_once(tmux.sandbox, task, round);
        assert_eq!(tmux.screens(), before, "round {round}");
        tmux.go_on(round);
        extra(round);
    }
    tmux.press(EDITOR, &["Escape", ":wq", "Enter"]);
    let panes = || tmux.run(&["list-panes", "-t", "s:0"]);
    tmux.sandbox.wait_until(30, "the editor does not end", || {
        panes().lines().count() == 1
    });
    let text = std::fs::read_to_string(tmux.dir.join("text")).expect("the editor has saved it");
    let lines: String = (1..=rounds())
        .map(|round| format!("line {round}\n"))
        .collect();
    assert_eq!(text, lines + "\n");
}

const NEEDED: [&str; 5] = ["tmux", "vim.tiny", "bash", "script", "mount"];

/// Runs a test with pseudo terminals of its own: their numbers must be free at each restore.
fn isolated(name: &str, body: impl FnOnce(&Sandbox)) {
    firn_tests::isolated(name, &NEEDED, |sandbox| {
        for words in [
            &[
                "-t",
                "devpts",
                "-o",
                "newinstance,ptmxmode=0666",
                "devpts",
                "/dev/pts",
            ][..],
            &["--bind", "/dev/pts/ptmx", "/dev/ptmx"],
        ] {
            let mut mount = Command::new("mount");
            sandbox.run(mount.args(words)).expect_success("mount");
        }
        body(sandbox);
    });
}

#[test]
fn a_tmux_server_with_a_shell_and_an_editor() {
    isolated("a_tmux_server_with_a_shell_and_an_editor", |sandbox| {
        let dir = sandbox.make_dir("tmux");
        let server = ["-S", "socket", "-f", "/dev/null", "-D"];
        let server = Task::spawn(sandbox, &dir, "tmux", server);
        await_file(sandbox, &dir.join("socket"));
        let tmux = Tmux { sandbox, dir };
        let size = ["-x", "90", "-y", "30"];
        let shell = ["bash", "--norc", "--noprofile"];
        tmux.run(&[&["new-session", "-d", "-s", "s"], &size[..], &shell[..]].concat());
        interrupt(&tmux, &server, &|_| {});
        tmux.run(&["kill-server"]);
        server.wait(30);
    });
}

fn await_file(sandbox: &Sandbox, path: &Path) {
    sandbox.wait_until(20, "there is no socket", || path.exists());
}

/// The client draws on a terminal of `script`, which writes down what it gets.
#[test]
fn a_tmux_server_with_a_client_in_script() {
    isolated("a_tmux_server_with_a_client_in_script", |sandbox| {
        let dir = sandbox.make_dir("tmux");
        let program = format!("{PROGRAMS}/terminals.sh");
        let tree = Task::spawn(sandbox, &dir, "bash", [program]);
        await_file(sandbox, &dir.join("attached"));
        let log = dir.join("typescript");
        let tmux = Tmux { sandbox, dir };
        // Before there is a session it fails.
        sandbox.wait_until(20, "nobody is attached", || {
            tmux.try_run(&["list-clients"]).stdout.lines().count() == 1
        });
        interrupt(&tmux, &tree, &|round| {
            let drawn = format!("begun {round}");
            sandbox.wait_until(20, "the client draws nothing", || {
                let bytes = std::fs::read(&log).unwrap_or_default();
                String::from_utf8_lossy(&bytes).contains(&drawn)
            });
            assert_eq!(tmux.run(&["list-clients"]).lines().count(), 1);
        });
        tmux.run(&["kill-server"]);
        assert_eq!(tree.wait(30).exit_status(), Some(0));
    });
}

#[test]
fn script_writes_all_numbers() {
    isolated("script_writes_all_numbers", |sandbox| {
        let counter = format!("bash {PROGRAMS}/count.sh");
        let words = ["script", "-q", "-e", "-f", "-c", &counter, "typescript"];
        sandbox.check_survives(&Program {
            command: words.map(str::to_owned).into(),
            set_up: &|_| {},
            progress: Progress::File("stdout", 4000),
            rounds: 3,
            enough: None,
            results: &[],
        });
    });
}
