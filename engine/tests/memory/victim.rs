//! Tasks whose memory is dumped.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use firn_engine::cancel::CancelFlag;
use firn_engine::memory::space_modes::SpaceModes;
use firn_engine::memory::{
    AddressRange, AddressSpace, Buffers, KernelVdso, MappedFiles, MmAnswers, PageCopy, SharedDump,
    smaps,
};
use firn_engine::program::{
    Arena, CloneSpec, Program, ProgramId, ProgramSet, Rule, WaitOutcome, Word,
};
use firn_images::{IMG_VERSION, ImageSetWriter};
use firn_proto::InventoryEntry;
use firn_sys::clone3::{ProgramEntry, spawn_program};
use firn_sys::{Pid, nr, ptrace, task, wait};

pub const PAGE: u64 = 4096;
const TIMEOUT: Duration = Duration::from_secs(60);
/// Room for an arena and a parked vdso.
const HOLE: u64 = 0x1000_0000;

/// Ranges for arenas: tests run in parallel in one address space.
pub fn new_hole() -> AddressRange {
    static NEXT: AtomicU64 = AtomicU64::new(0x100_0000_0000);
    let start = NEXT.fetch_add(HOLE, Ordering::Relaxed);
    AddressRange::new(start, start + HOLE)
}

/// A page that no other page is like.
pub fn page(seed: u64) -> Vec<u8> {
    (0..PAGE / 8)
        .flat_map(|n| (seed << 20 ^ n ^ 0x5a5a << 40).to_le_bytes())
        .collect()
}

#[derive(Debug, Clone, Copy)]
pub struct Mapping {
    pub range: AddressRange,
    pub prot: u32,
    pub flags: u32,
    pub fd: i32,
}

/// A child that is killed and reaped in the end.
#[derive(Debug)]
pub struct Child(pub Pid);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = task::kill(self.0, 9);
        while matches!(wait::wait(self.0), Ok(status) if !matches!(status, wait::Status::Ended(_)))
        {
        }
    }
}

pub fn leave_rseq(p: &mut Program) {
    if let Some((address, len, signature)) = task::own_rseq() {
        let args = [address.into(), len.into(), 1u64.into(), signature.into()];
        p.call(nr::RSEQ, &args, Rule::Ok, "leaving the inherited rseq area");
    }
}

/// Removes everything but the hole.
pub fn unmap_all_but(p: &mut Program, hole: AddressRange) {
    let below = [0u64.into(), hole.start.into()];
    p.call(nr::MUNMAP, &below, Rule::Exact(0), "munmap below");
    let above = firn_sys::mm::TASK_SIZE - hole.end;
    let above = [hole.end.into(), above.into()];
    p.call(nr::MUNMAP, &above, Rule::Exact(0), "munmap above");
}

pub fn run(set: &ProgramSet, root: ProgramId, hole: AddressRange) -> (Arena, Child) {
    let arena = Arena::create(set, set.place(hole.start)).expect("arena");
    let (record, context) = arena.entry(root);
    let entry = ProgramEntry {
        executor: arena.placed().base(),
        record,
        context,
    };
    // SAFETY: the arena holds the executor and the program, which leaves rseq first.
    let child = unsafe { spawn_program(0, 17, None, entry) }.expect("clone3");
    (arena, Child(child))
}

pub fn expect_reached<E: std::fmt::Debug>(outcome: WaitOutcome<E>) {
    match outcome {
        WaitOutcome::Reached => {}
        WaitOutcome::Failed(failure) => panic!("{failure}"),
        other => panic!("{other:?}"),
    }
}

/// Where the vdso is parked in a hole.
pub fn parked_at(hole: AddressRange) -> u64 {
    hole.end - 0x10_0000
}

pub struct Victim {
    arena: Arena,
    set: ProgramSet,
    go: Word,
    nr_parked: u32,
    // Children end before the arena goes.
    pub child: Child,
    grandchild: Option<Child>,
}

impl Victim {
    /// A task with these mappings, on which `more` acts.
    pub fn spawn(mappings: &[Mapping], more: impl FnOnce(&mut Program)) -> Victim {
        let mut set = ProgramSet::new();
        let go = set.word();
        let hole = new_hole();
        let mut p = program(mappings, hole);
        more(&mut p);
        p.park();
        let id = set.add(p);
        let (arena, child) = run(&set, id, hole);
        let victim = Victim {
            arena,
            set,
            go,
            nr_parked: 1,
            child,
            grandchild: None,
        };
        victim.wait_parked();
        victim
    }

    /// A task that forks once it is told to.
    pub fn spawn_with_child(mappings: &[Mapping]) -> Victim {
        let mut set = ProgramSet::new();
        let go = set.word();
        let ready = set.word();
        let hole = new_hole();
        let mut grandchild = Program::new("grandchild");
        grandchild.park();
        let grandchild = set.add(grandchild);
        let mut p = program(mappings, hole);
        p.post(ready, "mapped");
        p.wait(go, 1, "written");
        let spec = CloneSpec {
            exit_signal: 17,
            ..CloneSpec::default()
        };
        p.fork(&spec, grandchild, "fork");
        p.park();
        let id = set.add(p);
        let (arena, child) = run(&set, id, hole);
        let outcome = arena.wait(&set, ready, 1, TIMEOUT, || Ok::<(), ()>(()));
        expect_reached(outcome);
        Victim {
            arena,
            set,
            go,
            nr_parked: 2,
            child,
            grandchild: None,
        }
    }

    pub fn fork_child(&mut self) -> Pid {
        self.arena.post(self.go);
        self.wait_parked();
        let pid = only_child(self.child.0);
        self.grandchild = Some(Child(pid));
        pid
    }

    fn wait_parked(&self) {
        let outcome = self
            .arena
            .wait_parked(&self.set, self.nr_parked, TIMEOUT, || Ok::<(), ()>(()));
        expect_reached(outcome);
    }

    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        self.write_to(self.child.0, address, bytes);
    }

    /// Writes whatever the protection is.
    pub fn write_to(&mut self, pid: Pid, address: u64, bytes: &[u8]) {
        let mem = File::options()
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .expect("mem");
        mem.write_all_at(bytes, address).expect("write");
    }

    pub fn dump(self) -> Dumped {
        let pid = self.child.0;
        let mut all = self.dump_all(&[pid]);
        all.remove(0)
    }

    pub fn dump_tree(self, child: Pid) -> Vec<Dumped> {
        let pids = [self.child.0, child];
        self.dump_all(&pids)
    }

    fn dump_all(self, pids: &[Pid]) -> Vec<Dumped> {
        let dir = std::rc::Rc::new(tempfile::tempdir().expect("directory"));
        let images = ImageSetWriter::create(dir.path()).expect("images");
        let mut shared = SharedDump::new().expect("shared");
        let mut files = Files::default();
        let (copied, cancel) = (AtomicU64::new(0), CancelFlag::new());
        let buffers = Buffers::default();
        let given_up = AtomicBool::new(false);
        let copy = PageCopy {
            copied: &copied,
            cancel: &cancel,
            given_up: &given_up,
            workers: 2,
            buffers: &buffers,
        };
        let next_pages_id = AtomicU32::new(1);
        let new_id = || next_pages_id.fetch_add(1, Ordering::Relaxed);
        for &pid in pids {
            ptrace::seize(pid, 0).expect("seize");
            ptrace::interrupt(pid).expect("interrupt");
            wait::wait(pid).expect("stop");
            let space = AddressSpace::read(pid, pid, false).expect("address space");
            let answers = MmAnswers {
                brk: space_brk(pid),
                dumpable: 1,
                modes: SpaceModes::default(),
                exe_file_id: 0,
                policies: Vec::new(),
            };
            space
                .dump(&answers, &mut files, &mut shared, &images, new_id(), &copy)
                .expect("dump");
        }
        shared.write(&images, new_id, &copy).expect("shared memory");
        let inventory = InventoryEntry {
            img_version: IMG_VERSION,
            ..InventoryEntry::default()
        };
        images.seal(&inventory).expect("seal");
        let victim = std::rc::Rc::new(self);
        let files = std::rc::Rc::new(files);
        let dumped = pids.iter().map(|&pid| Dumped {
            pid,
            dir: dir.clone(),
            files: files.clone(),
            _victim: victim.clone(),
        });
        dumped.collect()
    }
}

/// A dumped task, stopped, with its images.
pub struct Dumped {
    pub pid: Pid,
    pub dir: std::rc::Rc<tempfile::TempDir>,
    pub files: std::rc::Rc<Files>,
    _victim: std::rc::Rc<Victim>,
}

/// Files behind mappings, by id.
#[derive(Default)]
pub struct Files {
    pub files: HashMap<u32, File>,
    pub memfds: HashMap<u32, (u32, u32)>,
}

impl MappedFiles for Files {
    fn mapped_file(
        &mut self,
        pid: Pid,
        mapping: &smaps::Mapping,
        open_flags: u32,
    ) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
        let range = mapping.range;
        let link = format!("/proc/{pid}/map_files/{:x}-{:x}", range.start, range.end);
        let file = File::options()
            .read(true)
            .write(open_flags != 0)
            .open(link)?;
        let id = u32::try_from(self.files.len() + self.memfds.len() + 1)?;
        self.files.insert(id, file);
        Ok(id)
    }

    fn mapped_ring(&mut self, _: Pid, _: &smaps::Mapping) -> Option<u32> {
        None
    }

    fn mapped_socket(
        &mut self,
        _: &smaps::Mapping,
    ) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
        Err("no socket is mapped".into())
    }

    fn mapped_memfd(&mut self, inode_id: u32, open_flags: u32) -> u32 {
        let id = u32::try_from(self.files.len() + self.memfds.len() + 1).expect("few");
        self.memfds.insert(id, (inode_id, open_flags));
        id
    }
}

fn program(mappings: &[Mapping], hole: AddressRange) -> Program {
    let mut p = Program::new("victim");
    leave_rseq(&mut p);
    if let Some(vdso) = KernelVdso::read().expect("maps") {
        vdso.park(&mut p, parked_at(hole));
    }
    unmap_all_but(&mut p, hole);
    for mapping in mappings {
        let args = [
            mapping.range.start.into(),
            mapping.range.len().into(),
            mapping.prot.into(),
            (mapping.flags | firn_sys::mm::map::FIXED_NOREPLACE).into(),
            mapping.fd.into(),
        ];
        let at = mapping.range.start.cast_signed();
        p.call(nr::MMAP, &args, Rule::Exact(at), "mmap");
    }
    p
}

/// The break, which is not part of what these tests look at: any value that the kernel takes.
fn space_brk(pid: Pid) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let after = stat.rsplit(") ").next().expect("fields");
    after
        .split_whitespace()
        .nth(47 - 3)
        .expect("start_brk")
        .parse()
        .expect("a number")
}

/// The one child that a task has.
pub fn only_child(pid: Pid) -> Pid {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let list = list.expect("the kernel lists children");
    Pid::from_raw(list.trim().parse().expect("one child"))
}
