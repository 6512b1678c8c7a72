//! Tasks whose memory is rebuilt out of images.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use firn_engine::cancel::CancelFlag;
use firn_engine::memory::fresh::FreshFacts;
use firn_engine::memory::space_modes::SpaceModes;
use firn_engine::memory::{
    AddressRange, Filling, KernelVdso, KernelVdsos, MappingFds, MappingSource, MemoryFacts,
    MemoryImage, MemoryPlan, PageFill, SharedRestore, TaskMemory, VdsoChoice, Vma, Way, When, fill,
    plan_tree, smaps,
};
use firn_engine::program::{Arena, CloneSpec, Program, ProgramSet, Slot, Word};
use firn_engine::task::mempolicy::Nodes;
use firn_images::ImageDir;
use firn_sys::Pid;
use firn_sys::uffd::Uffd;

use crate::victim::{
    Child, Dumped, Files, PAGE, expect_reached, leave_rseq, new_hole, only_child, parked_at, run,
    unmap_all_but,
};

const TIMEOUT: Duration = Duration::from_secs(60);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A rebuilt task.
pub struct Rebuilt {
    child: std::rc::Rc<Child>,
    pid: Pid,
    hole: AddressRange,
    _arena: std::rc::Rc<Arena>,
}

struct Descriptors<'a> {
    files: &'a Files,
    shared: &'a SharedRestore,
    exe: File,
}

impl MappingFds for Descriptors<'_> {
    fn mapping_source(&mut self, vma: &Vma) -> Result<MappingSource, BoxError> {
        let id = u32::try_from(vma.shmid)?;
        if let Some(file) = self.files.files.get(&id) {
            return Ok(MappingSource::Fd(file.as_raw_fd()));
        }
        let (inode, flags) = self.files.memfds[&id];
        let source = self.shared.mapping_source(inode, Some(flags))?;
        Ok(source.expect("made"))
    }

    fn ring_fd(&mut self, _: &Vma) -> Result<i32, BoxError> {
        Err("there are no rings".into())
    }

    fn own_ring_fd(&self, _: Pid, _: &Vma) -> Option<i32> {
        None
    }

    fn exe_fd(&mut self, _: u32) -> Result<i32, BoxError> {
        Ok(self.exe.as_raw_fd())
    }

    fn null_fd(&mut self) -> Result<i32, BoxError> {
        Err("the victim has no asynchronous I/O context".into())
    }
}

/// What all programs of a restore have in common.
struct Stage<'a> {
    vdso: &'a KernelVdso,
    hole: AddressRange,
    mapped: Word,
    filled: Word,
}

impl Stage<'_> {
    /// The slot tells the userfaultfd to fill through.
    fn finish(
        &self,
        p: &mut Program,
        plan: &MemoryPlan,
        fds: &mut Descriptors<'_>,
    ) -> Option<Slot> {
        plan.place_vdso(p, Some(self.vdso), parked_at(self.hole));
        let uffd = plan.map(p, fds).expect("descriptors");
        p.post(self.mapped, "mapped");
        p.wait(self.filled, 1, "filled");
        plan.settle(p, uffd);
        plan.finish(p, fds).expect("descriptors");
        p.park();
        uffd
    }
}

impl Rebuilt {
    pub fn of(dumped: &Dumped, choice: VdsoChoice) -> Rebuilt {
        let (rebuilt, _) = rebuild(&[dumped], choice);
        rebuilt
    }

    pub fn of_tree(dumped: &[Dumped]) -> (Rebuilt, Rebuilt) {
        let all: Vec<&Dumped> = dumped.iter().collect();
        let (parent, child) = rebuild(&all, VdsoChoice::ByContent);
        (parent, child.expect("a child"))
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    fn mappings(pid: Pid) -> Vec<smaps::Mapping> {
        let text = std::fs::read(format!("/proc/{pid}/smaps")).expect("smaps");
        smaps::parse(&text).expect("text")
    }

    /// The mappings, but those of the restore itself and of old system calls.
    fn own_mappings(&self) -> Vec<smaps::Mapping> {
        let mut mappings = Rebuilt::mappings(self.pid);
        mappings.retain(|mapping| !self.hole.overlaps(mapping.range));
        mappings
    }

    pub fn assert_same_maps(&self, dumped: &Dumped) {
        // The victim's arena is shared memory like any other, with a new number.
        let comparable = |mut mapping: smaps::Mapping| {
            mapping.resident = 0;
            mapping.shared = 0;
            if mapping.name.starts_with(b"/dev/zero") || mapping.name.starts_with(b"/memfd") {
                mapping.inode = 0;
            }
            mapping
        };
        let own: Vec<_> = self.own_mappings().into_iter().map(comparable).collect();
        let old: Vec<_> = Rebuilt::mappings(dumped.pid)
            .into_iter()
            .map(comparable)
            .collect();
        for (own, old) in own.iter().zip(&old) {
            assert_eq!(own, old);
        }
        assert_eq!(own.len(), old.len());
    }

    pub fn assert_same_contents(&self, dumped: &Dumped) {
        let (own_memory, old_memory) = (memory(self.pid), memory(dumped.pid));
        for mapping in Rebuilt::mappings(dumped.pid) {
            if mapping.name.starts_with(b"[v") {
                continue;
            }
            let mut at = mapping.range.start;
            while at < mapping.range.end {
                let (own, old) = (read_page(&own_memory, at), read_page(&old_memory, at));
                assert!(own == old, "page {at:#x} of {} differs", mapping.title());
                at += PAGE;
            }
        }
    }

    /// Old code that is ordinary memory now, with a jump in its clock, and a new vdso elsewhere.
    pub fn assert_vdso_redirected(&self, dumped: &Dumped) {
        let vdso_of = |mappings: &[smaps::Mapping]| {
            let vdso = mappings.iter().find(|mapping| mapping.name == b"[vdso]");
            vdso.expect("a vdso").range
        };
        let old = vdso_of(&Rebuilt::mappings(dumped.pid));
        let own = self.own_mappings();
        let new = vdso_of(&own);
        assert_ne!(old, new);
        let kept = own.iter().find(|mapping| mapping.range.covers(old));
        assert_eq!(kept.expect("still mapped").name, b"");
        let memory = memory(self.pid);
        let functions = |at: u64| {
            let pages = (0..old.nr_pages()).flat_map(|n| read_page(&memory, at + n * PAGE));
            pages.flatten().collect::<Vec<u8>>()
        };
        let (kept, real) = (functions(old.start), functions(new.start));
        assert_eq!(real.len(), kept.len());
        assert_ne!(real, kept);
        let changed = real.iter().zip(&kept).filter(|(a, b)| a != b).count();
        assert!(changed < 400, "{changed} bytes changed");
    }

    /// Number of pages in memory of the mapping at an address.
    pub fn resident(&self, at: u64) -> u64 {
        let mappings = Rebuilt::mappings(self.pid);
        let mapping = mappings.iter().find(|mapping| mapping.range.contains(at));
        mapping.expect("mapped").resident / PAGE
    }

    /// Number of the physical page, 0 where there is none.
    pub fn frame(&self, at: u64) -> u64 {
        frame(self.pid, at)
    }
}

/// Number of the physical page, 0 where there is none.
pub fn frame(pid: Pid, at: u64) -> u64 {
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).expect("pagemap");
    let mut entry = [0u8; 8];
    pagemap
        .read_exact_at(&mut entry, at / PAGE * 8)
        .expect("entry");
    u64::from_le_bytes(entry) & ((1 << 55) - 1)
}

fn memory(pid: Pid) -> File {
    File::open(format!("/proc/{pid}/mem")).expect("mem")
}

/// A page, whatever its protection; None where nothing is to be read.
fn read_page(memory: &File, at: u64) -> Option<Vec<u8>> {
    let mut page = vec![0; 4096];
    memory.read_exact_at(&mut page, at).ok()?;
    Some(page)
}

fn rebuild(dumped: &[&Dumped], choice: VdsoChoice) -> (Rebuilt, Option<Rebuilt>) {
    let images = ImageDir::open(dumped[0].dir.path()).expect("images");
    let hole = new_hole();
    let facts = MemoryFacts {
        fresh: FreshFacts::probe(),
        vdsos: KernelVdsos {
            native: KernelVdso::read().expect("maps"),
            ia32: None,
        },
        vdso_choice: choice,
        nodes: Nodes::usable(),
        own_modes: SpaceModes::own(),
    };
    let tasks: Vec<TaskMemory> = dumped
        .iter()
        .enumerate()
        .map(|(index, dumped)| TaskMemory {
            image: MemoryImage::load(&images, dumped.pid).expect("image"),
            maker: index.checked_sub(1),
            instruction_pointers: Vec::new(),
        })
        .collect();
    let mut shared =
        SharedRestore::load(&images, tasks.iter().map(|task| &task.image)).expect("shared memory");
    let (written, cancel) = (AtomicU64::new(0), CancelFlag::new());
    let how = PageFill {
        written: &written,
        cancel: &cancel,
        workers: 2,
    };
    shared.open_all(&images, &how).expect("shared memory");
    let plans = plan_tree(tasks, hole, &facts).expect("plan");
    let mut fds = Descriptors {
        files: &dumped[0].files,
        shared: &shared,
        exe: File::open("/bin/true").expect("a program"),
    };

    let mut set = ProgramSet::new();
    let vdso = facts
        .vdsos
        .native
        .as_ref()
        .expect("these tests need a vdso");
    let stage = Stage {
        vdso,
        hole,
        mapped: set.word(),
        filled: set.word(),
    };
    let child = (plans.len() > 1).then(|| {
        let mut p = Program::new("child");
        plans[1].unmap_not_inherited(&mut p);
        let uffd = stage.finish(&mut p, &plans[1], &mut fds);
        (set.add(p), uffd)
    });
    let mut p = Program::new("root");
    leave_rseq(&mut p);
    vdso.park(&mut p, parked_at(hole));
    unmap_all_but(&mut p, hole);
    let early = plans[0]
        .map_before_fork(&mut p, &mut fds)
        .expect("descriptors");
    assert!(
        !plans[0].needs_fill_before_fork(),
        "these parents are small"
    );
    plans[0].settle(&mut p, early);
    let child_pid = child.map(|(child, _)| {
        let spec = CloneSpec {
            exit_signal: 17,
            ..CloneSpec::default()
        };
        p.fork(&spec, child, "fork");
    });
    let uffd = stage.finish(&mut p, &plans[0], &mut fds);
    let root = set.add(p);
    let mut doors = vec![(root, uffd)];
    doors.extend(child);
    let (arena, root_child) = run(&set, root, hole);
    let nr = u32::try_from(plans.len()).expect("few");
    expect_reached(arena.wait(&set, stage.mapped, nr, TIMEOUT, || Ok::<(), ()>(())));
    let child_pid = child_pid.map(|()| only_child(root_child.0));
    let mut pids = vec![root_child.0];
    pids.extend(child_pid);
    let tasks = pids.iter().zip(&plans).zip(doors);
    let fillings: Vec<Filling<'_>> = tasks
        .map(|((&pid, plan), (program, slot))| {
            let fd = slot.map(|slot| i32::try_from(arena.slot(program, slot)).expect("a number"));
            let uffd = fd.map(|fd| Uffd::of_task(pid, fd).expect("userfaultfd"));
            let way = uffd.map_or(Way::Written, Way::Fresh);
            Filling { pid, plan, way }
        })
        .collect();
    fill(&fillings, When::Mapped, &how).expect("fill");
    drop(fillings);
    arena.post(stage.filled);
    expect_reached(arena.wait_parked(&set, nr, TIMEOUT, || Ok::<(), ()>(())));
    let arena = std::rc::Rc::new(arena);
    let rebuilt = |pid, child| Rebuilt {
        child,
        pid,
        hole,
        _arena: arena.clone(),
    };
    let second = child_pid.map(|pid| rebuilt(pid, std::rc::Rc::new(Child(pid))));
    let first = rebuilt(root_child.0, std::rc::Rc::new(root_child));
    let _ = &first.child;
    (first, second)
}
