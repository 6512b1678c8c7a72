//! Disks against a model, with crashes at every write.
//!
//! Random requests, snapshots, merges and sizes go to a chain of images in memory. Every change of a
//! file's bytes is recorded; then a crash is played at many moments: what came after a file's last sync
//! survives sector by sector, as chance has it. The chain is opened again, and every sector must hold
//! what it held when the last flush began, or something that was written to it later.
//!
//! `FIRN_PLOOP_CRASHES=N` plays N disks instead of a few.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use firn_ploop::format::expanded::{Finding, Preallocation, Repair, Severity, check, create};
use firn_ploop::recorder::{Clock, MemoryFile, Recording};
use firn_ploop::{
    Access, BitmapChange, ChainDisk, Disk, ExpandedImage, Image, Merge, NewTop, PendingLog,
    Unclosed,
};

const CLUSTER: u64 = 64 << 10;
const SECTOR: u64 = 512;
const CLUSTERS: u64 = 12;

/// xorshift: the same disks in every run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn often(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// What was ever in a sector: the step and the stamp.
type History = BTreeMap<u64, Vec<(usize, u64)>>;

/// What the disk should be, and when it was so.
#[derive(Default)]
struct Model {
    sectors: History,
    /// Moment when a flush had returned, and the step that it covers.
    flushes: Vec<(usize, usize)>,
    /// Moment when a chain counted, and its files.
    chains: Vec<(usize, Vec<usize>)>,
    /// Moment when each step began.
    steps: Vec<usize>,
}

impl Model {
    fn note(&mut self, sector: u64, stamp: u64) {
        let step = self.steps.len();
        self.sectors.entry(sector).or_default().push((step, stamp));
    }

    fn now(&self, sector: u64) -> u64 {
        let history = self.sectors.get(&sector);
        history
            .and_then(|h| h.last())
            .map_or(0, |(_, stamp)| *stamp)
    }

    /// The stamps that a sector may hold after a crash at a moment, or in the middle of its change.
    fn allowed(&self, sector: u64, moment: usize, is_torn: bool) -> Vec<u64> {
        let flushed = self.flushes.iter().rev().find(|(at, _)| *at <= moment);
        let covered = flushed.map_or(0, |(_, step)| *step);
        let next = moment + usize::from(is_torn);
        let begun = self.steps.iter().take_while(|at| **at < next).count();
        let Some(history) = self.sectors.get(&sector) else {
            return vec![0];
        };
        let before = history.iter().rev().find(|(step, _)| *step <= covered);
        let mut allowed = vec![before.map_or(0, |(_, stamp)| *stamp)];
        let later = history
            .iter()
            .filter(|(step, _)| *step > covered && *step <= begun);
        allowed.extend(later.map(|(_, stamp)| *stamp));
        allowed
    }
}

struct World {
    disk: ChainDisk,
    files: Vec<MemoryFile>,
    chain: Vec<usize>,
    clock: Clock,
    model: Model,
    stamp: u64,
    log: Option<Arc<Remembered>>,
}

/// Changes that outlive a process.
#[derive(Default)]
struct Remembered(Mutex<(u64, Vec<(u32, u32)>)>);

impl PendingLog for Remembered {
    fn record(&self, cluster: u32, entry: u32) {
        self.0.lock().unwrap().1.push((cluster, entry));
    }

    fn position(&self) -> u64 {
        let log = self.0.lock().unwrap();
        log.0 + log.1.len() as u64
    }

    fn forget(&self, until: u64) {
        let mut log = self.0.lock().unwrap();
        let count = usize::try_from(until - log.0).unwrap();
        log.1.drain(..count);
        log.0 = until;
    }

    fn entries(&self) -> Vec<(u32, u32)> {
        self.0.lock().unwrap().1.clone()
    }
}

fn empty(clock: &Clock, size: u64) -> MemoryFile {
    let file = MemoryFile::default();
    create(&file, size, 64 << 10, Preallocation::None).unwrap();
    file.record(clock);
    file
}

fn open(
    file: &MemoryFile,
    access: Access,
    log: Option<Arc<Remembered>>,
) -> Result<Arc<dyn Image>, String> {
    let log = log.map(|log| log as Arc<dyn PendingLog>);
    let image = ExpandedImage::open_logged(Box::new(file.clone()), access, Unclosed::Recover, log);
    image
        .map(|i| Arc::new(i) as Arc<dyn Image>)
        .map_err(|e| e.to_string())
}

impl World {
    fn new(log: Option<Arc<Remembered>>) -> World {
        let clock = Clock::new(AtomicUsize::new(0));
        let file = empty(&clock, CLUSTERS * CLUSTER);
        let top = open(&file, Access::ReadWrite, log.clone()).unwrap();
        let mut world = World {
            disk: ChainDisk::new(vec![top]).unwrap(),
            files: vec![file],
            chain: vec![0],
            clock,
            model: Model::default(),
            stamp: 0,
            log,
        };
        world.model.chains.push((0, vec![0]));
        world
    }

    fn moment(&self) -> usize {
        self.clock.load(Ordering::SeqCst)
    }

    fn step(&mut self, chance: &mut Chance) {
        let moment = self.moment();
        self.model.steps.push(moment);
        match chance.below(100) {
            0..55 => self.write(chance),
            55..62 => self.zero(chance),
            62..70 => self.discard(chance),
            70..86 => self.flush(),
            86..92 if self.chain.len() < 4 => self.snapshot(),
            92..98 if self.chain.len() > 1 => self.merge(chance),
            98 if self.disk.size_bytes() < 40_000 * CLUSTER => self.grow(chance),
            _ => self.write(chance),
        }
    }

    fn range(&self, chance: &mut Chance) -> (u64, u64) {
        let sectors = CLUSTERS * CLUSTER / SECTOR;
        if chance.often(25) {
            let cluster = chance.below(CLUSTERS);
            return (cluster * 128, 128);
        }
        let start = chance.below(sectors);
        (start, 1 + chance.below(6.min(sectors - start)))
    }

    fn write(&mut self, chance: &mut Chance) {
        let (start, count) = self.range(chance);
        self.stamp += 1;
        let bytes = self
            .stamp
            .to_le_bytes()
            .repeat(usize::try_from(count * 64).unwrap());
        self.disk.write_at(&bytes, start * SECTOR).unwrap();
        for sector in start..start + count {
            self.model.note(sector, self.stamp);
        }
    }

    fn zero(&mut self, chance: &mut Chance) {
        let (start, count) = self.range(chance);
        self.disk
            .write_zeroes(start * SECTOR, count * SECTOR)
            .unwrap();
        for sector in start..start + count {
            self.model.note(sector, 0);
        }
    }

    fn discard(&mut self, chance: &mut Chance) {
        let (start, count) = self.range(chance);
        self.disk.discard(start * SECTOR, count * SECTOR).unwrap();
        for sector in start..start + count {
            // It may have stayed.
            match stamp_of(&self.disk, sector) {
                0 => self.model.note(sector, 0),
                kept => assert_eq!(kept, self.model.now(sector)),
            }
        }
    }

    fn flush(&mut self) {
        self.disk.flush().unwrap();
        self.flushed();
    }

    fn flushed(&mut self) {
        let moment = self.moment();
        self.model.flushes.push((moment, self.model.steps.len()));
    }

    fn snapshot(&mut self) {
        let file = empty(&self.clock, self.disk.size_bytes());
        let image = open(&file, Access::ReadWrite, None).unwrap();
        self.files.push(file);
        self.chain.push(self.files.len() - 1);
        let clock = Arc::clone(&self.clock);
        let (chain, chains) = (self.chain.clone(), &mut self.model.chains);
        let top = NewTop {
            image,
            bitmap: BitmapChange::Keep,
            commit: &mut || {
                chains.push((clock.fetch_add(1, Ordering::SeqCst), chain.clone()));
                Ok(())
            },
        };
        self.disk.push_top(top).unwrap();
        self.flushed();
    }

    fn merge(&mut self, chance: &mut Chance) {
        let depth = self.chain.len() as u64;
        let level = usize::try_from(1 + chance.below(depth - 1)).unwrap();
        let lower = open(&self.files[self.chain[level - 1]], Access::ReadWrite, None).unwrap();
        let stop = chance.often(30).then(|| chance.below(CLUSTERS));
        let mut after = self.chain.clone();
        // The lower file takes the upper one's place.
        after.remove(level);
        let clock = Arc::clone(&self.clock);
        let chains = &mut self.model.chains;
        let mut merged = false;
        let merge = Merge {
            lower: Arc::clone(&lower),
            progress: &mut |done, _| stop != Some(done),
            commit: &mut || {
                chains.push((clock.fetch_add(1, Ordering::SeqCst), after.clone()));
                merged = true;
                Ok(())
            },
        };
        let done = self.disk.merge_down(level, merge);
        match (done.is_ok(), merged) {
            (true, true) => self.chain = after,
            (false, false) => lower.close().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn grow(&mut self, chance: &mut Chance) {
        let size = self.disk.size_bytes() + (1 + chance.below(20_000)) * CLUSTER;
        self.disk.grow(size).unwrap();
    }

    fn must_agree(&self) {
        for sector in self.model.sectors.keys() {
            assert_eq!(
                stamp_of(&self.disk, *sector),
                self.model.now(*sector),
                "sector {sector}"
            );
        }
    }

    /// Plays a crash at a moment that leaves what chance leaves of all that was not synced.
    fn crash(&self, recordings: &[Recording], moment: usize, chance: &mut Chance) {
        let percent = [0, 100, 50, 10, 90][usize::try_from(chance.below(5)).unwrap()];
        let what = format!("moment {moment}, {percent} % survive");
        let mut left = |file: usize| recordings[file].after_crash(moment, || chance.often(percent));
        self.must_open(&what, moment, false, &mut left);
    }

    /// Plays one in the middle of a change, with all that came before it.
    fn tear(&self, recordings: &[Recording], moment: usize, sectors: usize) {
        let what = format!("moment {moment}, torn after {sectors} sectors");
        let mut left = |file: usize| recordings[file].torn(moment, sectors);
        self.must_open(&what, moment, true, &mut left);
    }

    /// Opens what a crash left of each file; panics with everything needed to see why that is wrong.
    fn must_open(
        &self,
        what: &str,
        moment: usize,
        is_torn: bool,
        left: &mut dyn FnMut(usize) -> Vec<u8>,
    ) {
        let chain = &self
            .model
            .chains
            .iter()
            .rfind(|(at, _)| *at < moment.max(1))
            .unwrap()
            .1;
        let mut layers = Vec::new();
        let mut crashed = Vec::new();
        for (at, file) in chain.iter().enumerate() {
            let file = MemoryFile::of(left(*file));
            let checked = check(&file, Repair::No).unwrap();
            let damage = checked.findings.iter().find(|finding| {
                finding.severity() == Severity::Damage
                    && !matches!(finding, Finding::NotClosed | Finding::Length { .. })
            });
            assert!(
                damage.is_none(),
                "{what}, file {at} of {chain:?}: {damage:?}"
            );
            let access = match at + 1 == chain.len() {
                true => Access::ReadWrite,
                false => Access::ReadOnly,
            };
            layers.push(open(&file, access, None).unwrap());
            crashed.push(file);
        }
        let disk = ChainDisk::new(layers).unwrap();
        for sector in self.model.sectors.keys() {
            let found = stamp_of(&disk, *sector);
            let allowed = self.model.allowed(*sector, moment, is_torn);
            assert!(
                allowed.contains(&found),
                "{what}: sector {sector} holds {found}, not {allowed:?}"
            );
        }
        disk.write_at(&[0xff; 700], 3 * CLUSTER + 99).unwrap();
        disk.close().unwrap();
        let top = check(crashed.last().unwrap(), Repair::No).unwrap();
        assert!(top.worst() <= Some(Severity::Note), "{:?}", top.findings);
    }
}

/// The stamp that a sector is full of.
fn stamp_of(disk: &ChainDisk, sector: u64) -> u64 {
    let mut bytes = [0; 512];
    disk.read_at(&mut bytes, sector * SECTOR).unwrap();
    let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(
        bytes.chunks(8).all(|eight| eight == stamp.to_le_bytes()),
        "sector {sector} is mixed"
    );
    stamp
}

fn disks(few: u64) -> u64 {
    let asked = std::env::var("FIRN_PLOOP_CRASHES").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(few)
}

#[test]
fn nothing_flushed_is_lost_in_a_crash() {
    for seed in 1..=disks(4) {
        let mut chance = Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut world = World::new(None);
        for _ in 0..60 {
            world.step(&mut chance);
        }
        world.must_agree();
        let last = world.moment();
        let recordings: Vec<Recording> = world.files.iter().map(MemoryFile::recording).collect();
        for _ in 0..15 {
            let moment = usize::try_from(chance.below(last as u64 + 1)).unwrap();
            world.crash(&recordings, moment, &mut chance);
        }
        world.crash(&recordings, last, &mut chance);
        world.disk.close().unwrap();
        for file in &world.chain {
            let checked = check(&world.files[*file], Repair::No).unwrap();
            assert!(
                checked.worst() <= Some(Severity::Note),
                "{:?}",
                checked.findings
            );
        }
    }
}

/// Every moment of a short life, and a place inside of each change.
#[test]
fn every_prefix_of_what_was_written_is_a_disk() {
    for seed in 1..=disks(1) {
        let mut chance = Chance(seed.wrapping_mul(0xA076_1D64_78BD_642F));
        let mut world = World::new(None);
        for _ in 0..18 {
            world.step(&mut chance);
        }
        let recordings: Vec<Recording> = world.files.iter().map(MemoryFile::recording).collect();
        for moment in 0..=world.moment() {
            world.crash(&recordings, moment, &mut chance);
            let sectors: usize = recordings.iter().map(|it| it.sectors_at(moment)).sum();
            let whole = u64::try_from(sectors).unwrap();
            let part = usize::try_from(chance.below(whole + 1)).unwrap();
            for sectors in [0, part] {
                world.tear(&recordings, moment, sectors);
            }
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_the_process_dies() {
    for seed in 1..=disks(4) {
        let mut chance = Chance(seed.wrapping_mul(0xD134_2543_DE82_EF95));
        let log = Arc::new(Remembered::default());
        let mut world = World::new(Some(Arc::clone(&log)));
        for _ in 0..12 {
            for _ in 0..8 {
                world.step(&mut chance);
            }
            // The process is gone: what it had told the kernel stays, what it had in memory does not.
            let layers = world.chain.iter().enumerate().map(|(at, file)| {
                let is_top = at + 1 == world.chain.len();
                let access = if is_top {
                    Access::ReadWrite
                } else {
                    Access::ReadOnly
                };
                open(
                    &world.files[*file],
                    access,
                    is_top.then(|| Arc::clone(&log)),
                )
                .unwrap()
            });
            world.disk = ChainDisk::new(layers.collect()).unwrap();
            world.must_agree();
        }
        assert!(world.log.is_some());
        world.disk.close().unwrap();
    }
}
