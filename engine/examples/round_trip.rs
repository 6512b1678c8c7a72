//! Dumps a process tree, which kills it, and brings it back as a child of this program:
//! `cargo run -p firn-engine --example round_trip -- PID DIRECTORY`, as root.

use std::error::Error;
use std::path::Path;

use firn_engine::{Dump, Pid, Restore};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [pid, directory] = arguments.as_slice() else {
        return Err("usage: round_trip PID DIRECTORY".into());
    };
    std::fs::create_dir_all(directory)?;
    round_trip(Pid::from_raw(pid.parse()?), Path::new(directory))
}

fn round_trip(pid: Pid, images: &Path) -> Result<(), Box<dyn Error>> {
    let dumped = Dump::new(pid)
        .images_dir(images)
        .progress(|step| eprintln!("{}: {} bytes", step.phase, step.done_bytes))
        .run()
        .inspect_err(|error| {
            for obstacle in error.obstacles() {
                eprintln!("{obstacle}");
            }
        })?;
    println!(
        "dumped {} tasks and {} pages, frozen for {:?}",
        dumped.tasks, dumped.pages, dumped.frozen
    );
    let mut restored = Restore::new(images).run()?;
    println!(
        "process {} is back after {:?}",
        restored.pid, restored.total
    );
    println!("it ended with {}", restored.wait()?);
    Ok(())
}
