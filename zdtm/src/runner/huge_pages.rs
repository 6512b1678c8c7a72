//! Huge pages for the workloads that need them, given back at the end.

use std::fs;
use std::io;

use crate::{Need, Workload};

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Holds a reservation and takes back as many pages as it added when it is dropped, so that runners
/// at the same time do not undo each other.
#[derive(Debug)]
pub struct HugePages {
    added: u64,
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
        let (before, added) = (read()?, wanted * at_once as u64);
        fs::write(COUNT, (before + added).to_string())?;
        Ok(Some(HugePages { added }))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let added = self.added;
        let given = read().and_then(|now| fs::write(COUNT, now.saturating_sub(added).to_string()));
        if let Err(error) = given {
            eprintln!("cannot take {added} pages out of {COUNT} again: {error}");
        }
    }
}

fn read() -> io::Result<u64> {
    fs::read_to_string(COUNT)?
        .trim()
        .parse()
        .map_err(io::Error::other)
}
