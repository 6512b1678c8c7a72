//! Address spaces that come about at random: mappings over mappings, parts of them protected, moved, dropped, advised,
//! and forked in between.
//!
//! Each task compares itself with what it saw of itself before. `FIRN_ZDTM_SEED` names another number to grow from.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::random::Random;
use crate::sys::Region;
use crate::{Child, Stage, Workload, proc};

pub static SPACES: Workload = Workload::new(
    "memory/random",
    "four tasks with address spaces grown at random, parts of them shared or copied on write",
    spaces,
)
// Neighbours that differ in nothing but their past are one mapping afterwards.
.moves(&["maps", "vmflags"]);

const PAGE: usize = 4096;
/// Far from where the kernel puts what has no place of its own.
const WHERE: usize = 0x2000_0000_0000;
/// Pages in which all happens.
const WINDOW: usize = 1536;
const LONGEST: usize = 48;
const STEPS: usize = 60;
const GENERATIONS: u32 = 3;
const FILE_PAGES: usize = 64;
const ADVICE: [i32; 14] = [
    libc::MADV_DONTNEED,
    libc::MADV_DONTNEED,
    libc::MADV_RANDOM,
    libc::MADV_SEQUENTIAL,
    libc::MADV_NORMAL,
    libc::MADV_DONTFORK,
    libc::MADV_DOFORK,
    libc::MADV_WIPEONFORK,
    libc::MADV_KEEPONFORK,
    libc::MADV_DONTDUMP,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_MERGEABLE,
    libc::MADV_UNMERGEABLE,
    // MADV_GUARD_INSTALL; unknown before Linux 6.13.
    102,
];

/// What a task sees of a page: the mapping's permissions and flags, where in a file it is, and the content's digest, if
/// it can be read.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    perms: String,
    flags: Vec<String>,
    in_file: Option<u64>,
    is_guard: bool,
    digest: Option<u64>,
}

struct Space {
    window: Region,
    file: File,
}

impl Space {
    fn some(&self, random: &mut Random) -> Region {
        let len = 1 + random.index(LONGEST);
        let start = random.index(WINDOW - len);
        self.window.part(start * PAGE, len * PAGE)
    }

    /// One random change. What the kernel refuses, such as advice for a hole, is left out.
    fn change(&self, random: &mut Random) -> Result<()> {
        let place = self.some(random);
        match random.below(12) {
            0..=2 => self.map(place, random)?,
            3 | 4 => {
                let prot = [
                    libc::PROT_NONE,
                    libc::PROT_READ,
                    RW,
                    libc::PROT_READ | libc::PROT_EXEC,
                ];
                let _ = place.protect(prot[random.index(prot.len())]);
            }
            5 => place.unmap()?,
            6 => {
                let target = self
                    .window
                    .part(random.index(WINDOW - place.len / PAGE) * PAGE, place.len);
                let _ = place.move_to(target.addr);
            }
            7 | 8 => {
                let _ = place.advise(ADVICE[random.index(ADVICE.len())]);
            }
            9 => {
                let _ = place
                    .part(0, PAGE)
                    .lock([0, MLOCK_ONFAULT][random.index(2)]);
            }
            _ => self.write(place, random)?,
        }
        Ok(())
    }

    fn map(&self, place: Region, random: &mut Random) -> Result<()> {
        let anonymous = libc::MAP_ANONYMOUS;
        let flags = match random.below(6) {
            0..=2 => libc::MAP_PRIVATE | anonymous,
            3 => libc::MAP_SHARED | anonymous,
            4 => libc::MAP_PRIVATE,
            _ => libc::MAP_SHARED,
        };
        let flags = flags
            | if random.below(4) == 0 {
                libc::MAP_NORESERVE
            } else {
                0
            };
        let file = (flags & anonymous == 0).then(|| self.file.as_fd());
        let offset = random.index(FILE_PAGES) * PAGE;
        place.unmap()?;
        let region = Region::map(Some(place.addr), place.len, RW, flags, file, offset as i64)?;
        // Others may have seen what it shares by now, unless it is new.
        if flags & anonymous != 0 {
            region.part(0, PAGE).fill(random.next());
        }
        Ok(())
    }

    /// Writes to private memory that may be written.
    fn write(&self, place: Region, random: &mut Random) -> Result<()> {
        for vma in proc::maps("self")? {
            let (start, end) = (place.addr.max(vma.start), place.end().min(vma.end));
            if start < end && vma.perms == "rw-p" && is_there(start)? {
                self.window
                    .part(start - self.window.addr, PAGE)
                    .fill(random.next());
            }
        }
        Ok(())
    }

    /// All pages of the window, by number; None for a hole.
    fn seen(&self) -> Result<Vec<Option<Seen>>> {
        let (memory, pagemap) = (
            File::open("/proc/self/mem")?,
            File::open("/proc/self/pagemap")?,
        );
        let mut pages: Vec<Option<Seen>> = (0..WINDOW).map(|_| None).collect();
        for details in proc::smaps("self")? {
            let vma = &details.vma;
            let (start, end) = (
                self.window.addr.max(vma.start),
                self.window.end().min(vma.end),
            );
            let flags = details
                .lines
                .get("VmFlags")
                .map(String::as_str)
                .unwrap_or_default();
            // Soft-dirty and write-tracked come and go; accounted and
            // guarded tell of rights and of guards that something near had at some time.
            let flags = flags
                .split_whitespace()
                .filter(|flag| !["sd", "uw", "ac", "gu"].contains(flag));
            let flags: Vec<String> = flags.map(str::to_owned).collect();
            for addr in (start..end.max(start)).step_by(PAGE) {
                let in_file = vma
                    .path
                    .ends_with("/data")
                    .then(|| vma.offset + (addr - vma.start) as u64);
                let mut entry = [0; 8];
                pagemap.read_exact_at(&mut entry, (addr / PAGE * 8) as u64)?;
                let entry = u64::from_le_bytes(entry);
                let is_shared_memory = vma.perms.ends_with('s') && in_file.is_none();
                let is_there = entry & THERE != 0 || is_shared_memory;
                pages[(addr - self.window.addr) / PAGE] = Some(Seen {
                    perms: vma.perms.clone(),
                    flags: flags.clone(),
                    in_file,
                    is_guard: entry & GUARD != 0,
                    digest: self.digest(&memory, addr, in_file, is_there),
                });
            }
        }
        Ok(pages)
    }

    /// Of a page's content; pages that nobody has touched are left alone, since what they hold is known without.
    fn digest(
        &self,
        memory: &File,
        addr: usize,
        in_file: Option<u64>,
        is_there: bool,
    ) -> Option<u64> {
        let mut bytes = [0; PAGE];
        match in_file {
            _ if is_there => memory.read_exact_at(&mut bytes, addr as u64).ok()?,
            Some(offset) => self.file.read_exact_at(&mut bytes, offset).ok()?,
            None => {}
        }
        let mix =
            |digest: u64, byte: &u8| (digest ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        Some(bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix))
    }
}

/// Bits of a page in /proc/PID/pagemap: present or swapped out, and a guard (Linux 6.15).
const THERE: u64 = 3 << 62;
const GUARD: u64 = 1 << 58;
const MLOCK_ONFAULT: u32 = 1;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Whether a page can be written without a signal: guards and the part of a file behind its end can't.
fn is_there(addr: usize) -> Result<bool> {
    let memory = File::options().read(true).open("/proc/self/mem")?;
    Ok(memory.read_exact_at(&mut [0; 8], addr as u64).is_ok())
}

fn live(stage: &Stage, space: &Space, mut random: Random, generation: u32) -> Result<()> {
    let mut children: Vec<Child> = Vec::new();
    for step in 0..STEPS {
        space
            .change(&mut random)
            .with_context(|| format!("step {step}"))?;
        let wants_child = generation < GENERATIONS && children.is_empty() && step >= STEPS / 2;
        if wants_child {
            let seed = Random::new(random.next());
            children.push(stage.child(|stage| live(stage, space, seed, generation + 1))?);
        }
    }
    let before = space.seen()?;
    stage.ready_and_wait()?;
    let now = space.seen()?;
    for (nth, (before, now)) in before.iter().zip(&now).enumerate() {
        ensure!(before == now, "page {nth} was {before:x?}, is {now:x?}");
    }
    children.into_iter().try_for_each(Child::finish)
}

fn spaces(stage: &Stage) -> Result<()> {
    let (seed, random) = Random::chosen()?;
    eprintln!("grown from {seed}");
    let path = stage.path("data");
    let content: Vec<u8> = (0..FILE_PAGES * PAGE)
        .map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1])
        .collect();
    fs::write(&path, content)?;
    let file = File::options().read(true).write(true).open(&path)?;
    let window = Region::map(
        Some(WHERE),
        WINDOW * PAGE,
        libc::PROT_NONE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        None,
        0,
    )?;
    window.unmap()?;
    live(stage, &Space { window, file }, random, 0)
}
