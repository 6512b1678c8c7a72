//! A program of 500 threads for the tests: each computes, sleeps, locks and sends, and the sum of
//! all is always the same.

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

const THREADS: u64 = 500;
const STEPS: u64 = 120;

fn main() -> std::io::Result<()> {
    let total = Arc::new(Mutex::new(0u64));
    let start = Arc::new(Barrier::new(
        usize::try_from(THREADS).expect("a small number"),
    ));
    let (sender, receiver) = channel();
    let mut threads = Vec::new();
    // The main thread is one of the 500.
    for number in 1..THREADS {
        let (total, start, sender) = (total.clone(), start.clone(), sender.clone());
        let builder = std::thread::Builder::new().stack_size(128 << 10);
        threads.push(builder.spawn(move || work(number, &start, &total, &sender))?);
    }
    drop(sender);
    start.wait();
    let mut progress = File::create("progress")?;
    let mut sum = 0u64;
    for (count, value) in receiver.iter().enumerate() {
        sum = sum.wrapping_add(value);
        if count % 100 == 0 {
            writeln!(progress, "{count}")?;
        }
    }
    for thread in threads {
        thread.join().expect("no thread panics");
    }
    println!("{sum} {}", total.lock().expect("no thread panics"));
    Ok(())
}

fn work(number: u64, start: &Barrier, total: &Mutex<u64>, sender: &Sender<u64>) {
    let mut value = number;
    start.wait();
    for step in 0..STEPS {
        for _ in 0..1000 {
            value = value
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(step);
        }
        std::thread::sleep(Duration::from_millis(20 + number % 20));
        let mut sum = total.lock().expect("no thread panics");
        *sum = sum.wrapping_add(value >> 7);
        drop(sum);
        sender
            .send(value)
            .expect("main receives until all are done");
    }
}
