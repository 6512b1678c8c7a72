//! The little that outlives a worker: a memfd that the supervisor holds.
//!
//! Two halves, written in turn, each with a sequence number and a hash; the newest whole one counts.
//! So a worker that is killed while it writes leaves the state before.
//!
//! ```text
//! 0..8 sequence | 8..12 length | 12..20 hash of the text | 20.. text (JSON)
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::device::View;
use crate::tracker::ListenerSpec;

const HALF: u64 = 64 << 10;
const HEAD: usize = 20;

/// What a new worker has to know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Who tracks writes. Their bits are lost with the worker: everything counts as written.
    pub listeners: Vec<ListenerSpec>,
    /// A file system that is frozen at somebody's wish.
    pub frozen: Option<PathBuf>,
    /// What the device shows; known as soon as the first worker answers.
    pub view: Option<View>,
    /// The device was released: close the image and end.
    pub released: bool,
}

/// The memfd.
#[derive(Debug)]
pub struct State {
    file: File,
    now: Mutex<(u64, Kept)>,
}

impl State {
    /// A new, empty memfd.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn create() -> io::Result<File> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        Ok(rustix::fs::memfd_create("firn-ploop-state", flags)?.into())
    }

    /// Reads what the last worker left.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn open(file: File) -> io::Result<State> {
        let newest = [0, HALF]
            .into_iter()
            .filter_map(|at| read_half(&file, at))
            .max_by_key(|(sequence, _)| *sequence);
        Ok(State {
            file,
            now: Mutex::new(newest.unwrap_or_default()),
        })
    }

    /// What is kept.
    pub fn get(&self) -> Kept {
        self.lock().1.clone()
    }

    /// Changes it.
    ///
    /// # Errors
    /// It does not fit, or the kernel refused.
    pub fn update(&self, change: impl FnOnce(&mut Kept)) -> io::Result<()> {
        let mut now = self.lock();
        let mut kept = now.1.clone();
        change(&mut kept);
        let text = serde_json::to_vec(&kept).map_err(io::Error::other)?;
        let len = u32::try_from(text.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        if u64::from(len) > HALF - HEAD as u64 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let sequence = now.0 + 1;
        let mut bytes = sequence.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(hash(&text).to_le_bytes());
        bytes.extend(text);
        self.file.write_all_at(&bytes, (sequence % 2) * HALF)?;
        *now = (sequence, kept);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (u64, Kept)> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hash(text: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(text)
}

fn read_half(file: &File, at: u64) -> Option<(u64, Kept)> {
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, at).ok()?;
    let sequence = u64::from_le_bytes(head[..8].try_into().ok()?);
    let len = u32::from_le_bytes(head[8..12].try_into().ok()?);
    let expected = u64::from_le_bytes(head[12..20].try_into().ok()?);
    if sequence == 0 || u64::from(len) > HALF - HEAD as u64 {
        return None;
    }
    let mut text = vec![0; len as usize];
    file.read_exact_at(&mut text, at + HEAD as u64).ok()?;
    if hash(&text) != expected {
        return None;
    }
    Some((sequence, serde_json::from_slice(&text).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_whole_half_counts() {
        let file = State::create().unwrap();
        let state = State::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(state.get(), Kept::default());
        state
            .update(|kept| kept.frozen = Some("/a".into()))
            .unwrap();
        state.update(|kept| kept.released = true).unwrap();
        let again = State::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(again.get(), state.get());
        assert!(again.get().released);
        // The second update went to the first half; tear it.
        file.write_all_at(b"x", HEAD as u64 + 2).unwrap();
        let torn = State::open(file).unwrap().get();
        assert!(!torn.released && torn.frozen.is_some());
    }
}
