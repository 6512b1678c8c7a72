//! What stands still, and where: said by a test that waited in vain.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// Most tasks that are described.
const MOST_TASKS: usize = 200;

/// Every task of the namespace with what it waits in, and the TCP connections with their queues and timers.
pub(crate) fn describe(pids: &[i32]) -> String {
    let mut text = String::from("\ntask, state, where in the kernel, and in which call\n");
    let tasks = pids.iter().flat_map(|pid| tasks_of(*pid));
    for (pid, tid) in tasks.take(MOST_TASKS) {
        let _ = writeln!(text, "{}", describe_task(pid, tid));
    }
    let mut ss = Command::new("ss");
    if let Ok(output) = ss.args(["-tanpoeim"]).output() {
        text += &String::from_utf8_lossy(&output.stdout);
    }
    text
}

fn tasks_of(pid: i32) -> Vec<(i32, i32)> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .map(|tid| (pid, tid))
        .collect()
}

fn describe_task(pid: i32, tid: i32) -> String {
    let dir = format!("/proc/{pid}/task/{tid}");
    let read = |name: &str| {
        let text = std::fs::read(Path::new(&dir).join(name)).unwrap_or_default();
        String::from_utf8_lossy(&text)
            .replace('\0', " ")
            .trim()
            .to_owned()
    };
    let status = read("status");
    let wanted = ["State", "PPid", "SigPnd", "ShdPnd", "SigBlk", "TracerPid"];
    let facts: Vec<_> = status
        .lines()
        .filter(|line| wanted.iter().any(|name| line.starts_with(name)))
        .map(|line| line.replace('\t', " "))
        .collect();
    let words: String = read("cmdline").chars().take(120).collect();
    format!(
        "{pid}/{tid} {words:?} {} | {} | {}",
        facts.join(", "),
        read("wchan"),
        read("syscall")
    )
}
