//! POSIX message queues. They belong to the kernel and outlive their users, so one that is found under its name is
//! opened again like a file, with the messages that are in it by then.
//!
//! Source: man 7 mq_overview, linux ipc/mqueue.c.

use std::io::Read;

use firn_sys::file;

use super::locate::{self, Location};
use super::open_file::{OpenFile, Trouble};

/// Size of every queue's file.
const FILE_SIZE: u64 = 80;

/// Whether the file is a queue.
pub(super) fn is_queue(file: &OpenFile) -> bool {
    // The first two tell almost all other files from it without another call.
    let (no_device, is_alike) = (file.stat.dev >> 8 & 0xfff == 0, file.stat.size == FILE_SIZE);
    no_device && is_alike && file::filesystem_type(&file.proc_path()) == Ok(file::MQUEUE)
}

/// What keeps a queue from being dumped.
pub(super) fn trouble(file: &OpenFile) -> Option<Trouble> {
    let hint = "let the task close it before the dump";
    if !matches!(locate::locate(file), Location::Named(_)) {
        let reason = "it is a POSIX message queue without a name, or one that no mount shows: it is not saved";
        return Some(Trouble::new(reason, hint));
    }
    is_to_notify(file).then(|| {
        let reason = "a task is to be notified of messages in the queue, which would be lost";
        Trouble::new(reason, hint)
    })
}

/// Whether a task has asked to be notified (mq_notify).
fn is_to_notify(file: &OpenFile) -> bool {
    let mut told = String::new();
    let read = std::fs::File::open(file.proc_path());
    let read = read.and_then(|queue| queue.take(256).read_to_string(&mut told));
    read.is_ok() && notified(&told).is_some_and(|pid| pid != 0)
}

fn notified(told: &str) -> Option<u32> {
    let mut words = told.split_whitespace();
    words.find_map(|word| word.strip_prefix("NOTIFY_PID:")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notified_task_is_found() {
        let told = "QSIZE:129        NOTIFY:2     SIGNO:0     NOTIFY_PID:8260  \n";
        assert_eq!(notified(told), Some(8260));
        assert_eq!(notified("QSIZE:0"), None);
    }
}
