//! The engine inside a multi-threaded program: dump and restore from a tokio runtime that is busy.
//!
//! No library code runs in the children that the engine forks, so locks that other threads hold at that
//! moment (the allocator's, the runtime's) can't hurt them.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use firn_engine::{Dump, Pid, Restore};
use firn_tests::{Sandbox, Task, isolated};

/// Counts into a file, with every number a line, until a file called `stop` is there.
const COUNTER: &str = "n=0; while [ ! -e stop ]; do n=$((n + 1)); echo $n >> numbers; done; exit 5";
const ROUNDS: u32 = 3;

fn lines(dir: &Path) -> usize {
    let text = fs::read_to_string(dir.join("numbers")).unwrap_or_default();
    text.lines().count()
}

/// Keeps the allocator and the scheduler of the runtime busy on all its threads.
async fn make_noise(stop: Arc<AtomicBool>, turns: Arc<AtomicU64>) {
    let mut kept: Vec<Vec<u8>> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let len = kept.len() % 7 * 1000 + 1;
        kept.push(vec![1; len]);
        if kept.len() > 100 {
            kept.clear();
        }
        turns.fetch_add(1, Ordering::Relaxed);
        tokio::task::yield_now().await;
    }
}

async fn dump_and_restore(sandbox: &Sandbox) {
    let stop = Arc::new(AtomicBool::new(false));
    let turns = Arc::new(AtomicU64::new(0));
    let noise: Vec<_> = (0..4)
        .map(|_| tokio::spawn(make_noise(Arc::clone(&stop), Arc::clone(&turns))))
        .collect();
    let dir = sandbox.make_dir("work");
    let task = Task::spawn(sandbox, &dir, "bash", ["-c", COUNTER]);
    let pid = Pid::from_raw(task.pid());
    sandbox.wait_until(60, "the counter does not count", || lines(&dir) > 10);

    for round in 0..ROUNDS {
        let images = sandbox.make_dir(&format!("images{round}"));
        let to = images.clone();
        let dumped = tokio::task::spawn_blocking(move || Dump::new(pid).images_dir(to).run());
        let report = dumped.await.expect("no panic").expect("dumped");
        assert_eq!(report.tasks, 1);
        task.wait_until_gone();
        let counted = lines(&dir);
        let restored = tokio::task::spawn_blocking(move || Restore::new(images).run());
        let report = restored.await.expect("no panic").expect("restored");
        assert_eq!(report.pid, pid);
        sandbox.wait_until(60, "the counter does not go on", || {
            lines(&dir) > counted + 10
        });
    }

    let before = turns.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(
        turns.load(Ordering::Relaxed) > before,
        "the runtime still runs"
    );
    stop.store(true, Ordering::Relaxed);
    for task in noise {
        task.await.expect("no panic");
    }
    fs::write(dir.join("stop"), "").expect("the scratch directory is writable");
    assert_eq!(task.wait(60).exit_status(), Some(5));
    let text = fs::read_to_string(dir.join("numbers")).expect("it counted");
    for (nth, line) in text.lines().enumerate() {
        assert_eq!(line, (nth + 1).to_string(), "a number is lost or doubled");
    }
}

#[test]
fn a_tokio_program_dumps_and_restores() {
    isolated("a_tokio_program_dumps_and_restores", &["bash"], |sandbox| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .enable_time()
            .build()
            .expect("threads can be made");
        runtime.block_on(dump_and_restore(sandbox));
    });
}
