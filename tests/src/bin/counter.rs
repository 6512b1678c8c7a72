//! A program for the tests of failures: counts in a file for ever and checks its own memory.
//!
//! `counter FILE [MIB]`: FILE always holds one number of 20 digits, so that its size stays the same.

use std::fs::OpenOptions;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: counter FILE [MIB]")?;
    let words = arguments.next().map_or(Ok(0), |mib| mib.parse::<usize>())? << 17;
    let memory: Vec<usize> = (0..words).map(mix).collect();
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    for count in 0usize.. {
        if let Some(at) = (count * 8191).checked_rem(words) {
            // Whatever else happened, memory must be what was written to it.
            assert_eq!(black_box(&memory)[at], mix(at), "word {at} of memory");
        }
        file.write_all_at(format!("{count:020}").as_bytes(), 0)?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn mix(index: usize) -> usize {
    (index ^ (index >> 9)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
