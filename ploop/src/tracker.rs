//! The write tracker: which parts of a disk were changed since somebody asked last.
//!
//! Any number of listeners, each with its name and its own bitmap. A bit is set after the change and
//! before the change is answered; a listener clears it *before* it reads the part. So a part that is
//! changed while it is read is found set in the next round, and never lost.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::bitmap::Bitmap;

/// Memory that the bitmaps of a disk's listeners may take together. In units of 1 MiB that is 20,000 listeners of
/// a disk of 100 GiB.
pub const MAX_BITMAP_BYTES: u64 = 256 << 20;
/// Finest unit of tracking.
pub const MIN_UNIT_BYTES: u64 = 4096;

/// Why a listener could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrackerError {
    /// Another one has the name.
    #[error("a listener {name} is there already; stop it first or take another name")]
    Exists {
        /// Its name.
        name: String,
    },
    /// No one has the name.
    #[error("there is no listener {name}")]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// The bitmaps have as much memory as they may.
    #[error(
        "the bitmaps of {listeners} listeners and this one would take {needed_bytes} bytes, {MAX_BITMAP_BYTES} at \
         most; stop one first or take a coarser unit"
    )]
    TooLarge {
        /// Those that are there.
        listeners: usize,
        /// What all would take.
        needed_bytes: u64,
    },
    /// The unit makes no sense.
    #[error("a unit of {unit_bytes} bytes is no power of two from {MIN_UNIT_BYTES} on")]
    Unit {
        /// The unit asked for.
        unit_bytes: u64,
    },
}

/// Name and unit of a listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerSpec {
    /// Its name.
    pub name: String,
    /// Bytes per bit.
    pub unit_bytes: u64,
}

/// What a listener begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Begin {
    /// Nothing was changed.
    Clean,
    /// Everything was.
    Dirty,
}

struct Listener {
    spec: ListenerSpec,
    bits: Bitmap,
    size_bytes: u64,
}

impl Listener {
    fn new(spec: ListenerSpec, size_bytes: u64, begin: Begin) -> Listener {
        let bits = Bitmap::new(size_bytes, spec.unit_bytes);
        if begin == Begin::Dirty {
            bits.set(0..size_bytes);
        }
        Listener {
            spec,
            bits,
            size_bytes,
        }
    }
}

/// The listeners of a disk.
pub struct Trackers {
    any: AtomicBool,
    state: RwLock<State>,
}

struct State {
    size_bytes: u64,
    listeners: Vec<Arc<Listener>>,
}

impl Trackers {
    /// No listeners yet, for a disk of this size.
    pub fn new(size_bytes: u64) -> Trackers {
        Trackers {
            any: AtomicBool::new(false),
            state: RwLock::new(State {
                size_bytes,
                listeners: Vec::new(),
            }),
        }
    }

    /// Marks a range of bytes as changed, for every listener.
    pub fn mark(&self, bytes: Range<u64>) {
        if !self.any.load(Ordering::Acquire) || bytes.is_empty() {
            return;
        }
        for listener in &self.read().listeners {
            listener.bits.set(bytes.clone());
        }
    }

    /// Adds a listener. A change is seen by it or was complete before the call returned, so that a
    /// read after the call sees it.
    ///
    /// # Errors
    /// The name is taken, the unit is wrong, or the bitmaps would take too much memory.
    pub fn start(&self, spec: ListenerSpec, begin: Begin) -> Result<(), TrackerError> {
        if !spec.unit_bytes.is_power_of_two() || spec.unit_bytes < MIN_UNIT_BYTES {
            let unit_bytes = spec.unit_bytes;
            return Err(TrackerError::Unit { unit_bytes });
        }
        let mut state = self.write();
        if state.listeners.iter().any(|one| one.spec.name == spec.name) {
            return Err(TrackerError::Exists { name: spec.name });
        }
        let there = state.listeners.iter().map(|one| one.spec.unit_bytes);
        let units = there.chain([spec.unit_bytes]);
        let needed_bytes = units.map(|unit| bitmap_bytes(state.size_bytes, unit)).sum();
        if needed_bytes > MAX_BITMAP_BYTES {
            let listeners = state.listeners.len();
            return Err(TrackerError::TooLarge {
                listeners,
                needed_bytes,
            });
        }
        // Set before the listener can be seen: a change between the two is marked or came before.
        self.any.store(true, Ordering::Release);
        let listener = Listener::new(spec, state.size_bytes, begin);
        state.listeners.push(Arc::new(listener));
        Ok(())
    }

    /// Takes changed ranges out, clearing them, up to about `max_bytes` of the disk, from byte `from`
    /// on and then from the beginning. None left gives an empty list.
    ///
    /// # Errors
    /// There is no such listener.
    pub fn take(
        &self,
        name: &str,
        from: u64,
        max_bytes: u64,
    ) -> Result<Vec<Range<u64>>, TrackerError> {
        let listener = self.find(name)?;
        let unit = listener.spec.unit_bytes;
        let mut taken: Vec<Range<u64>> = Vec::new();
        let mut left = max_bytes.max(unit);
        let start = (from / unit).min(listener.bits.blocks());
        for part in [start..listener.bits.blocks(), 0..start] {
            let mut at = part.start;
            while left >= unit
                && let Some(block) = listener.bits.next(at).filter(|block| *block < part.end)
            {
                at = block + 1;
                if listener.bits.take(block) {
                    left -= unit;
                    let end = ((block + 1) * unit).min(listener.size_bytes);
                    join(&mut taken, block * unit..end);
                }
            }
        }
        Ok(taken)
    }

    /// Marks a range for one listener, for instance what could not be sent.
    ///
    /// # Errors
    /// There is no such listener.
    pub fn put_back(&self, name: &str, bytes: Range<u64>) -> Result<(), TrackerError> {
        self.find(name)?.bits.set(bytes);
        Ok(())
    }

    /// Bytes marked, counted in whole units.
    ///
    /// # Errors
    /// There is no such listener.
    pub fn pending_bytes(&self, name: &str) -> Result<u64, TrackerError> {
        let listener = self.find(name)?;
        Ok(listener.bits.count() * listener.spec.unit_bytes)
    }

    /// Ends a listener and tells how many bytes were still marked.
    ///
    /// # Errors
    /// There is no such listener.
    pub fn stop(&self, name: &str) -> Result<u64, TrackerError> {
        let mut state = self.write();
        let Some(at) = state.listeners.iter().position(|one| one.spec.name == name) else {
            return Err(unknown(name));
        };
        let listener = state.listeners.remove(at);
        self.any
            .store(!state.listeners.is_empty(), Ordering::Release);
        Ok(listener.bits.count() * listener.spec.unit_bytes)
    }

    /// The listeners.
    pub fn list(&self) -> Vec<ListenerSpec> {
        let state = self.read();
        state.listeners.iter().map(|one| one.spec.clone()).collect()
    }

    /// Follows a disk that has grown; what it gained counts as changed.
    pub fn grow(&self, size_bytes: u64) {
        let mut state = self.write();
        let old = state.size_bytes;
        state.size_bytes = size_bytes;
        for listener in &mut state.listeners {
            let spec = listener.spec.clone();
            let unit = spec.unit_bytes;
            let grown = Listener::new(spec, size_bytes, Begin::Clean);
            let mut at = 0;
            while let Some(block) = listener.bits.next(at) {
                grown.bits.set(block * unit..(block + 1) * unit);
                at = block + 1;
            }
            grown.bits.set(old..size_bytes);
            *listener = Arc::new(grown);
        }
    }

    fn find(&self, name: &str) -> Result<Arc<Listener>, TrackerError> {
        let state = self.read();
        let found = state.listeners.iter().find(|one| one.spec.name == name);
        found.cloned().ok_or_else(|| unknown(name))
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bitmap_bytes(size_bytes: u64, unit_bytes: u64) -> u64 {
    size_bytes.div_ceil(unit_bytes).div_ceil(64) * 8
}

fn unknown(name: &str) -> TrackerError {
    TrackerError::Unknown {
        name: name.to_owned(),
    }
}

fn join(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => ranges.push(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 1 << 16;

    fn spec(name: &str) -> ListenerSpec {
        ListenerSpec {
            name: name.to_owned(),
            unit_bytes: UNIT,
        }
    }

    #[test]
    fn each_listener_has_its_own_bits() {
        let trackers = Trackers::new(100 * UNIT);
        trackers.mark(0..1);
        trackers.start(spec("a"), Begin::Clean).unwrap();
        trackers.start(spec("b"), Begin::Dirty).unwrap();
        trackers.mark(UNIT - 1..UNIT + 1);
        let taken = trackers.take("a", 0, u64::MAX).unwrap();
        assert_eq!(taken.first(), Some(&(0..2 * UNIT)));
        assert_eq!(trackers.take("a", 0, u64::MAX), Ok(vec![]));
        assert_eq!(trackers.pending_bytes("b"), Ok(100 * UNIT));
        assert_eq!(trackers.stop("b"), Ok(100 * UNIT));
        assert_eq!(trackers.stop("b"), Err(unknown("b")));
    }

    #[test]
    fn taking_goes_round_and_keeps_to_its_limit() {
        let trackers = Trackers::new(10 * UNIT);
        trackers.start(spec("a"), Begin::Clean).unwrap();
        for block in [1, 4, 5, 9] {
            trackers.mark(block * UNIT..block * UNIT + 1);
        }
        let first = trackers.take("a", 5 * UNIT, 2 * UNIT).unwrap();
        assert_eq!(first, [5 * UNIT..6 * UNIT, 9 * UNIT..10 * UNIT]);
        let rest = trackers.take("a", 5 * UNIT, u64::MAX).unwrap();
        assert_eq!(rest, [UNIT..2 * UNIT, 4 * UNIT..5 * UNIT]);
    }

    #[test]
    fn what_a_disk_gains_is_marked_and_the_rest_kept() {
        let trackers = Trackers::new(4 * UNIT);
        trackers.start(spec("a"), Begin::Clean).unwrap();
        trackers.mark(UNIT..UNIT + 1);
        trackers.grow(6 * UNIT);
        let taken = trackers.take("a", 0, u64::MAX).unwrap();
        assert_eq!(taken, [UNIT..2 * UNIT, 4 * UNIT..6 * UNIT]);
    }

    #[test]
    fn names_and_units_are_checked() {
        let trackers = Trackers::new(UNIT);
        trackers.start(spec("a"), Begin::Clean).unwrap();
        let twice = trackers.start(spec("a"), Begin::Clean);
        assert!(matches!(twice, Err(TrackerError::Exists { .. })));
        let odd = ListenerSpec {
            name: "b".to_owned(),
            unit_bytes: 5000,
        };
        let odd = trackers.start(odd, Begin::Clean);
        assert!(matches!(odd, Err(TrackerError::Unit { .. })));
    }

    #[test]
    fn listeners_are_bounded_by_memory_alone() {
        let trackers = Trackers::new(1 << 30);
        let spec = |nth: u32, unit_bytes| ListenerSpec {
            name: format!("listener {nth}"),
            unit_bytes,
        };
        for nth in 0..1000 {
            trackers.start(spec(nth, 1 << 20), Begin::Clean).unwrap();
        }
        trackers.mark(5..6);
        for nth in 0..1000 {
            assert_eq!(trackers.pending_bytes(&spec(nth, 0).name), Ok(1 << 20));
        }
        // 32 MiB of bits for each.
        let large = Trackers::new(1 << 40);
        for nth in 0..8 {
            large
                .start(spec(nth, MIN_UNIT_BYTES), Begin::Clean)
                .unwrap();
        }
        let refused = large.start(spec(8, MIN_UNIT_BYTES), Begin::Clean);
        assert!(
            matches!(refused, Err(TrackerError::TooLarge { listeners: 8, .. })),
            "{refused:?}"
        );
        assert!(large.start(spec(8, 1 << 30), Begin::Clean).is_err());
    }
}
