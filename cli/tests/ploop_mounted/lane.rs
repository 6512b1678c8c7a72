//! Requests of changing size through kills of their server: small ones are carried out by its lane, large
//! ones by its crew, and in between the one hands over to the other.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use firn_ploop::kernel::PageBuffer;

use crate::place::*;

const PAGE: usize = 4096;
/// Threads that write, each in a part of its own.
const WRITERS: u64 = 4;
const PART: u64 = 12 << 20;
/// Requests of one size in a row, of all writers. A few dozen make the server change its way.
const ROW: u64 = 300;
/// Larger than what the lane leaves to the crew.
const LARGE: usize = 1 << 20;

fn open(device: &Path) -> File {
    const O_DIRECT: i32 = 0o40000;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(O_DIRECT);
    options.open(device).unwrap()
}

/// One part of the device, and what each of its pages has to hold.
struct Part {
    device: File,
    first: u64,
    pages: Vec<u64>,
    buffer: PageBuffer,
    chance: u64,
}

impl Part {
    fn new(device: &Path, number: u64) -> Part {
        Part {
            device: open(device),
            first: number * PART,
            pages: vec![0; usize::try_from(PART).unwrap() / PAGE],
            buffer: PageBuffer::new(LARGE).unwrap(),
            chance: number + 1,
        }
    }

    fn below(&mut self, end: usize) -> usize {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        usize::try_from(self.chance % end as u64).unwrap()
    }

    /// Writes, or reads and compares, at a place of chance's choice.
    fn request(&mut self, number: u64, len: usize) {
        let count = len / PAGE;
        let slots = self.pages.len() / count;
        let page = self.below(slots) * count;
        if self.below(3) == 0 {
            return self.compare(page, count);
        }
        for (at, bytes) in self.buffer[..len].chunks_mut(PAGE).enumerate() {
            let stamp = number << 16 | at as u64;
            bytes
                .chunks_mut(8)
                .for_each(|it| it.copy_from_slice(&stamp.to_le_bytes()));
            self.pages[page + at] = stamp;
        }
        let offset = self.first + (page * PAGE) as u64;
        self.device
            .write_all_at(&self.buffer[..len], offset)
            .unwrap();
    }

    fn compare(&mut self, page: usize, count: usize) {
        let offset = self.first + (page * PAGE) as u64;
        let bytes = &mut self.buffer[..count * PAGE];
        self.device.read_exact_at(bytes, offset).unwrap();
        for (at, bytes) in bytes.chunks(PAGE).enumerate() {
            let stamp = self.pages[page + at].to_le_bytes();
            let is_it = bytes.chunks(8).all(|it| it == stamp);
            assert!(is_it, "page {} holds something else", page + at);
        }
    }

    fn compare_all(&mut self) {
        let most = LARGE / PAGE;
        for page in (0..self.pages.len()).step_by(most) {
            self.compare(page, most);
        }
    }
}

#[test]
fn nothing_is_lost_when_the_lane_or_its_crew_is_killed() {
    let Some(place) = Place::new() else { return };
    place
        .ploop(&["init", "-s", "64M", "-b", "256K", "d"])
        .good();
    let mount = || PathBuf::from(place.ploop(&["mount", "d"]).good().out.trim());
    let device = mount();
    let mut parts: Vec<Part> = (0..WRITERS).map(|at| Part::new(&device, at)).collect();
    let done = AtomicU64::new(0);
    let is_over = AtomicBool::new(false);
    let writing = &|part: &mut Part| {
        while !is_over.load(Ordering::SeqCst) {
            let number = done.fetch_add(1, Ordering::SeqCst) + 1;
            let len = [PAGE, LARGE][usize::try_from(number / ROW % 2).unwrap()];
            part.request(number, len);
        }
    };
    std::thread::scope(|scope| {
        for part in &mut parts {
            scope.spawn(move || writing(part));
        }
        let _over = Over(&is_over);
        for kill in 1..=number("FIRN_PLOOP_KILLS", 6) {
            // Each at another place of its row, some right at the change.
            let from = done.load(Ordering::SeqCst);
            let next = (from / ROW + 1) * ROW + kill * 67 % ROW;
            wait_until("requests go on", || done.load(Ordering::SeqCst) >= next);
            place.kill_worker();
            if kill % 3 == 0 {
                place.ploop(&["snapshot", "d"]).good();
            }
        }
        let last = done.load(Ordering::SeqCst) + 2 * ROW;
        wait_until("requests go on", || done.load(Ordering::SeqCst) >= last);
    });
    parts.iter_mut().for_each(Part::compare_all);
    let again = |parts: Vec<Part>, device: &Path| {
        let reopened = parts.into_iter().map(|part| Part {
            device: open(device),
            ..part
        });
        let mut parts: Vec<Part> = reopened.collect();
        parts.iter_mut().for_each(Part::compare_all);
        parts
    };
    let closed = |mut parts: Vec<Part>| {
        // Nobody may have the device open.
        let null = || File::open("/dev/null").unwrap();
        parts.iter_mut().for_each(|part| part.device = null());
        place.ploop(&["umount", "d"]).good();
        place.ploop(&["check", "d"]).good();
        parts
    };
    let parts = again(closed(parts), &mount());
    place.ploop(&["merge", "-A", "d"]).good();
    closed(again(parts, &device_of(&place)));
}

fn device_of(place: &Place) -> PathBuf {
    let list = place.json(&["list", "--json"]);
    PathBuf::from(list["disks"][0]["device"].as_str().unwrap())
}

/// Lets the writers end, however the killing ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
