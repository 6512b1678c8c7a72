//! Huge pages for the workloads that need them, given back at the end.

use std::fs;
use std::io;

use crate::{Need, Workload};

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Holds a reservation; the old number comes back when it is dropped.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// Reserves what the chosen workloads need; when that fails they skip themselves.
    pub fn reserve(chosen: &[&Workload], at_once: usize) -> io::Result<Option<HugePages>> {
        let needs = chosen.iter().flat_map(|workload| workload.needs);
        let wanted = needs
            .filter_map(|need| match need {
                Need::HugePages(count) => Some(*count),
                _ => None,
            })
            .max();
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        let before = read()?;
        fs::write(COUNT, (before + wanted * at_once as u64).to_string())?;
        Ok(Some(HugePages { before }))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(COUNT, self.before.to_string()) {
            eprintln!("cannot put {COUNT} back to {}: {error}", self.before);
        }
    }
}

fn read() -> io::Result<u64> {
    fs::read_to_string(COUNT)?
        .trim()
        .parse()
        .map_err(io::Error::other)
}
