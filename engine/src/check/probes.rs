//! How each feature is probed.

use std::cmp::Ordering;
use std::fs::File;
use std::os::fd::AsRawFd;

use firn_sys::kcmp::{Resource, kcmp};
use firn_sys::probe::{self, IdleChild};
use firn_sys::process_vm::{self, RemoteRange};
use firn_sys::{Errno, Pid, pidfd, ptrace, wait};

use crate::memory::KernelVdso;
use crate::memory::vdso::VdsoError;

use super::{Feature, Verdict, cgroup, needed, replaceable};

const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_GUARD: u64 = 1 << 8;
const PM_PRESENT: u64 = 1 << 63;
const PM_PFN: u64 = (1 << 55) - 1;

pub(super) fn probe(feature: Feature) -> Verdict {
    match feature {
        Feature::Rights => rights(),
        Feature::Ptrace => needed(
            stopped_child(|_| Ok(())),
            "no task can be dumped or restored",
        ),
        Feature::Xsave => needed(
            stopped_child(xstate),
            "vector and FPU registers would be lost",
        ),
        Feature::PeekSiginfo => needed(
            stopped_child(signals),
            "pending signals of tasks would be lost",
        ),
        Feature::Rseq => needed(
            stopped_child(|pid| ptrace::rseq_config(pid).map(drop)),
            "tasks with restartable sequences, which are all of glibc, can't be dumped",
        ),
        Feature::PidfdStore => needed(
            fetch_descriptor(),
            "no descriptor can be dumped or restored",
        ),
        Feature::Kcmp => needed(
            compare(),
            "descriptors shared between tasks would come apart",
        ),
        Feature::SetTid => needed(probe::set_tid(), "tasks can't get their pids back"),
        Feature::ProcessVm => needed(copy_memory(), "memory of tasks can't be copied"),
        Feature::ProcMem => needed(
            probe::foreign_read(),
            "memory without read permission can't be dumped",
        ),
        Feature::MapFiles => needed(open_mapped(), "mapped files can't be dumped"),
        Feature::Pagemap => needed(present_page(), "no memory can be dumped"),
        Feature::SetMmMap => needed(set_mm_map(), "no task can be restored"),
        Feature::TidAddress => needed(
            probe::tid_address().map(drop),
            "threads can't be joined after a restore",
        ),
        Feature::VdsoSyscall => needed(syscall_in_vdso(), "no task can be dumped"),
        Feature::VdsoMove => needed(move_vdso(), "no task that has a vdso can be restored"),
        Feature::MntId => needed(mount_id(), "files can't be told apart by mount"),
        other => probe_extra(other),
    }
}

fn probe_extra(feature: Feature) -> Verdict {
    match feature {
        Feature::PagemapScan => replaceable(
            probe::pagemap_scan(PAGE_IS_PRESENT).map(drop),
            "/proc/PID/pagemap",
            "finding pages takes about four times as long",
        ),
        Feature::GuardPages => needed(
            probe::pagemap_scan(PAGE_IS_GUARD).map(drop),
            "tasks with guard regions lose them",
        ),
        Feature::GuardInstall => needed(
            probe::guard_regions(),
            "images with guard regions can't be restored",
        ),
        Feature::PagemapPfn => replaceable(
            page_numbers(),
            "comparing contents",
            "pages that tasks share since a fork are stored once for each task",
        ),
        Feature::CanMapVdso => replaceable(
            probe::map_vdso(),
            "moving the own vdso",
            "none, unless the restoring program has no vdso",
        ),
        Feature::Memfd => needed(
            probe::memfd(),
            "tasks with anonymous files can't be restored",
        ),
        Feature::MemfdHugetlb => needed(
            probe::memfd_hugetlb(),
            "tasks with anonymous huge page files can't be restored",
        ),
        Feature::ShadowStack => needed(
            firn_sys::shadow_stack::probe(),
            "images of programs with shadow stacks can't be restored",
        ),
        Feature::Ia32 => needed(ia32(), "32-bit programs can't be restored"),
        Feature::Collapse => replaceable(
            collapse(),
            "the kernel's own collapsing",
            "huge pages come back some time after a restore",
        ),
        Feature::SuspendSeccomp => needed(
            probe::suspend_seccomp(),
            "tasks under seccomp filters can't be dumped",
        ),
        Feature::CapSysResource => replaceable(
            capability(CAP_SYS_RESOURCE),
            "the limits that the restoring program has",
            "raising a hard limit back can fail, which the restore then reports",
        ),
        Feature::CapSysAdmin => replaceable(
            capability(CAP_SYS_ADMIN),
            "CAP_CHECKPOINT_RESTORE",
            "no freezing by cgroup",
        ),
        Feature::Uffd => replaceable(
            firn_sys::uffd::probe_copy(),
            "process_vm_writev",
            "large memory takes up to twice as long to restore",
        ),
        Feature::Cgroup2Freeze => replaceable(
            cgroup::freeze_v2(),
            "ptrace",
            "large trees take longer to stop, and tasks stop one after the other",
        ),
        Feature::Cgroup1Freezer => needed(
            cgroup::freeze_v1(),
            "--freeze-cgroup takes no version 1 cgroup",
        ),
        other => probe_experimental(other),
    }
}

const NO_TRACKING: &str = "every dump is a full one";

fn probe_experimental(feature: Feature) -> Verdict {
    match feature {
        Feature::TimerIds => replaceable(
            probe::timer_restore_ids(),
            "counting up to the ids",
            "a timer with a large id takes long to restore",
        ),
        Feature::UffdNoncoop => needed(uffd_events(), "no lazy restore of tasks that fork"),
        Feature::SoftDirty if probe::write_tracking().is_ok() => {
            replaceable(probe::soft_dirty(), "uffd_wp_async", "none")
        }
        Feature::WriteTracking => needed(probe::write_tracking(), NO_TRACKING),
        Feature::SoftDirty => needed(probe::soft_dirty(), NO_TRACKING),
        Feature::TcpRepair => needed(probe::tcp_repair(), "no TCP connection can be saved"),
        Feature::Nftables => needed(
            probe::nft_generation(),
            "packets can't be held back by nftables",
        ),
        core => probe(core),
    }
}

/// A vdso for 32-bit programs in place of the own one, and their calls.
fn ia32() -> Result<(), Errno> {
    probe::ia32_calls()?;
    KernelVdso::read_ia32()
        .map(drop)
        .map_err(|error| match error {
            VdsoError::Ia32(errno) | VdsoError::Own(errno) => errno,
            _ => Errno::EINVAL,
        })
}

fn capability(number: u32) -> Result<(), Errno> {
    let effective = probe::capabilities()?;
    if effective >> number & 1 == 1 {
        Ok(())
    } else {
        Err(Errno::EPERM)
    }
}

fn rights() -> Verdict {
    let has = |number| capability(number).is_ok();
    let choose_pids = has(CAP_CHECKPOINT_RESTORE) || has(CAP_SYS_ADMIN);
    let see_tasks = has(CAP_SYS_PTRACE);
    let why = match (choose_pids, see_tasks) {
        (true, true) => return Verdict::Works,
        (true, false) => "CAP_SYS_PTRACE is missing",
        (false, true) => "CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN) is missing",
        (false, false) => {
            "CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN) and CAP_SYS_PTRACE are missing"
        }
    };
    Verdict::Missing {
        why: why.to_owned(),
        cost: "nothing can be dumped or restored; use sudo",
    }
}

/// Runs `look` on a child in a ptrace stop.
fn stopped_child(look: impl FnOnce(Pid) -> Result<(), Errno>) -> Result<(), Errno> {
    let child = IdleChild::spawn()?;
    ptrace::seize(child.pid(), 0)?;
    ptrace::interrupt(child.pid())?;
    wait::wait(child.pid())?;
    let result = look(child.pid());
    ptrace::detach(child.pid(), 0)?;
    result
}

fn xstate(pid: Pid) -> Result<(), Errno> {
    // Room for AMX tiles, the largest state that there is.
    let area = ptrace::xstate(pid, 16 << 10)?;
    // Legacy area and header are the least that every CPU with xsave has.
    if area.len() >= 576 {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

fn signals(pid: Pid) -> Result<(), Errno> {
    ptrace::signal_mask(pid)?;
    ptrace::pending_signals(pid, ptrace::SignalQueue::Thread)?;
    ptrace::pending_signals(pid, ptrace::SignalQueue::Process).map(drop)
}

fn fetch_descriptor() -> Result<(), Errno> {
    let file = File::open("/dev/null")?;
    let child = IdleChild::spawn()?;
    let fetched = pidfd::getfd(pidfd::open(child.pid())?, file.as_raw_fd())?;
    let resource = Resource::File {
        fd1: file.as_raw_fd(),
        fd2: fetched.as_raw_fd(),
    };
    match kcmp(Pid::this(), Pid::this(), resource) {
        // Without kcmp there is no telling, and its own row says so.
        Ok(Ordering::Equal) | Err(Errno::ENOSYS) => Ok(()),
        Ok(_) => Err(Errno::EINVAL),
        Err(errno) => Err(errno),
    }
}

fn compare() -> Result<(), Errno> {
    let file = File::open("/dev/null")?;
    let twin = file.try_clone()?;
    let other = File::open("/dev/null")?;
    let with = |fd: &File| {
        let resource = Resource::File {
            fd1: file.as_raw_fd(),
            fd2: fd.as_raw_fd(),
        };
        kcmp(Pid::this(), Pid::this(), resource)
    };
    let right = with(&twin)? == Ordering::Equal && with(&other)? != Ordering::Equal;
    if right { Ok(()) } else { Err(Errno::EINVAL) }
}

fn copy_memory() -> Result<(), Errno> {
    let word = Box::new(*b"firn was");
    let address = u64::try_from((&raw const *word).addr()).map_err(|_| Errno::EINVAL)?;
    let child = IdleChild::spawn()?;
    let mut copy = [0; 8];
    let range = RemoteRange {
        address,
        len: copy.len(),
    };
    let got = process_vm::read(child.pid(), &[range], &mut copy)?;
    if got == copy.len() && copy == *word {
        Ok(())
    } else {
        Err(Errno::EIO)
    }
}

fn open_mapped() -> Result<(), Errno> {
    let child = IdleChild::spawn()?;
    let dir = std::fs::read_dir(format!("/proc/{}/map_files", child.pid()))?;
    let first = dir.into_iter().next().ok_or(Errno::ENOENT)??;
    File::open(first.path())?;
    Ok(())
}

fn present_page() -> Result<(), Errno> {
    let present = probe::pagemap_entry()? & PM_PRESENT != 0;
    if present { Ok(()) } else { Err(Errno::ENODATA) }
}

fn page_numbers() -> Result<(), Errno> {
    let visible = probe::pagemap_entry()? & PM_PFN != 0;
    if visible { Ok(()) } else { Err(Errno::EPERM) }
}

fn set_mm_map() -> Result<(), Errno> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    probe::set_mm_map(&layout(&stat).ok_or(Errno::ENODATA)?)
}

/// Reads the address space's fields out of /proc/PID/stat.
fn layout(stat: &str) -> Option<probe::Layout> {
    // The name may hold spaces and parentheses; fields count from behind its last one, which is field 2.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse().ok();
    Some(probe::Layout {
        code: (field(26)?, field(27)?),
        start_stack: field(28)?,
        data: (field(45)?, field(46)?),
        start_brk: field(47)?,
        args: (field(48)?, field(49)?),
        env: (field(50)?, field(51)?),
    })
}

/// The areas `(start, length)` of the own vdso and its data pages.
fn vdso_areas() -> Result<Vec<(u64, u64, bool)>, Errno> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    Ok(maps.lines().filter_map(vdso_area).collect())
}

fn vdso_area(line: &str) -> Option<(u64, u64, bool)> {
    let name = line.split_whitespace().nth(5)?;
    if name != "[vdso]" && !name.starts_with("[vvar") {
        return None;
    }
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    Some((start, end.checked_sub(start)?, name == "[vdso]"))
}

fn syscall_in_vdso() -> Result<(), Errno> {
    let areas = vdso_areas()?;
    let (address, len, _) = areas.iter().find(|area| area.2).ok_or(Errno::ENOENT)?;
    let mut code = vec![0; usize::try_from(*len).map_err(|_| Errno::EINVAL)?];
    let range = RemoteRange {
        address: *address,
        len: code.len(),
    };
    process_vm::read(Pid::this(), &[range], &mut code)?;
    let found = code.windows(2).any(|pair| pair == [0x0f, 0x05]);
    if found { Ok(()) } else { Err(Errno::ENOENT) }
}

fn move_vdso() -> Result<(), Errno> {
    let areas: Vec<(u64, u64)> = vdso_areas()?.iter().map(|area| (area.0, area.1)).collect();
    if areas.is_empty() {
        return Err(Errno::ENOENT);
    }
    probe::move_areas(&areas)
}

fn mount_id() -> Result<(), Errno> {
    let file = File::open("/dev/null")?;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let told = info.lines().any(|line| line.starts_with("mnt_id:"));
    if told { Ok(()) } else { Err(Errno::ENODATA) }
}

fn collapse() -> Result<(), Errno> {
    match probe::collapse() {
        // No huge page is free at this moment; the call is there.
        Err(Errno::ENOMEM | Errno::EAGAIN | Errno::EBUSY) => Ok(()),
        other => other,
    }
}

fn uffd_events() -> Result<(), Errno> {
    let events = UFFD_FEATURE_EVENT_FORK
        | UFFD_FEATURE_EVENT_REMAP
        | UFFD_FEATURE_EVENT_REMOVE
        | UFFD_FEATURE_EVENT_UNMAP;
    let there = probe::uffd_features()? & events == events;
    if there { Ok(()) } else { Err(Errno::EINVAL) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_an_odd_name() {
        let numbers: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        let stat = format!("1 (a) b) S {}", numbers.join(" "));
        let layout = layout(&stat).unwrap();
        assert_eq!(layout.code, (26, 27));
        assert_eq!(layout.env, (50, 51));
        assert_eq!(super::layout("1 (x"), None);
        assert_eq!(super::layout("1 (x) S 2"), None);
    }

    #[test]
    fn vdso_areas_are_told_from_files() {
        let line = "7fff1000-7fff3000 r-xp 00000000 00:00 0                  [vdso]";
        assert_eq!(vdso_area(line), Some((0x7fff_1000, 0x2000, true)));
        let clock = "7ffe0000-7ffe2000 r--p 00000000 00:00 0   [vvar_vclock]";
        assert_eq!(vdso_area(clock), Some((0x7ffe_0000, 0x2000, false)));
        assert_eq!(
            vdso_area("7fff1000-7fff3000 r-xp 00000000 00:00 0 /lib/[vdso]"),
            None
        );
        assert_eq!(vdso_area("7fff1000-7fff3000 rw-p 00000000 00:00 0"), None);
    }
}
