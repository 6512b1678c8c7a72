//! Memory that few programs use, and files that changed under those who map them.

use std::fs::{self, File};
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};

use crate::sys::{self, PAGE, RW, Region};
use crate::{Need, Stage, Workload, proc};

pub static SEALED: Workload = Workload::new(
    "memory/sealed",
    "mappings sealed by mseal, with several protections",
    sealed,
)
.needs(&[Need::Call(libc::SYS_mseal, "mseal")]);
pub static DROPPABLE: Workload = Workload::new(
    "memory/droppable",
    "memory that the kernel may drop, by MAP_DROPPABLE",
    droppable,
)
.needs(&[Need::GuardRegions]);
pub static REPLACED: Workload = Workload::new(
    "memory/file-replaced",
    "libraries replaced by an upgrade while they are mapped",
    replaced,
)
// The removed file's old name has another file now, so it comes back under another one.
.moves(&["maps"]);
pub static OVERLAY: Workload = Workload::new(
    "memory/overlay",
    "mappings of files of an overlay: of the lower layer, and copied up",
    overlay,
)
.needs(&[Need::FileSystem("overlay"), Need::Root]);
pub static DEVICE: Workload = Workload::new(
    "refusals/device-memory",
    "a mapping of the first page of the BIOS by /dev/mem",
    |stage| {
        let device = File::open("/dev/mem").context("opening /dev/mem")?;
        let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
        let region = Region::map(None, PAGE, prot, flags, Some(device.as_fd()), 0xf_0000)?;
        drop(device);
        stage.ready_and_wait()?;
        ensure!(proc::vma_at(region.addr)?.is_some(), "it is gone");
        Ok(())
    },
)
.needs(&[Need::File("/dev/mem")])
.refused(&["/dev/mem", "device"]);
pub static KERNEL: Workload = Workload::new(
    "refusals/kernel-memory",
    "a mapping of pages that the kernel has for itself: the types of its image",
    |stage| {
        let file = File::open(KERNEL_TYPES).context("opening it")?;
        let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE);
        let region = Region::map(None, PAGE, prot, flags, Some(file.as_fd()), 0)?;
        drop(file);
        ensure!(
            proc::details_at(region.addr)?.has_flag("pf"),
            "ordinary pages"
        );
        stage.ready_and_wait()?;
        ensure!(proc::vma_at(region.addr)?.is_some(), "it is gone");
        Ok(())
    },
)
.needs(&[Need::File(KERNEL_TYPES)])
.refused(&["btf/vmlinux", "device"]);
/// Linux 6.16 maps it.
const KERNEL_TYPES: &str = "/sys/kernel/btf/vmlinux";

fn sealed(stage: &Stage) -> Result<()> {
    let regions = [(RW, 1), (libc::PROT_READ, 2), (libc::PROT_NONE, 3)];
    let mut sealed = Vec::new();
    for (prot, seed) in regions {
        let region = Region::anon(4 * PAGE)?;
        region.part(0, 2 * PAGE).fill(seed);
        region.protect(prot)?;
        region.seal().context("mseal")?;
        sealed.push((region, prot, seed));
    }
    stage.ready_and_wait()?;
    for (region, prot, seed) in sealed {
        let changed = region.protect(libc::PROT_EXEC);
        let errno = changed.map_err(|error| error.raw_os_error());
        ensure!(errno == Err(Some(libc::EPERM)), "no seal: {errno:?}");
        if prot != libc::PROT_NONE {
            region.part(0, 2 * PAGE).check(seed)?;
            region.part(2 * PAGE, 2 * PAGE).check_zero()?;
        }
    }
    Ok(())
}

/// What was in it may be gone, all of a page or nothing of it; that is what the program asked for.
fn droppable(stage: &Stage) -> Result<()> {
    const DROPPABLE: i32 = 0x8;
    let region = Region::map(None, 4 * PAGE, RW, DROPPABLE | libc::MAP_ANONYMOUS, None, 0)?;
    region.fill(4);
    stage.ready_and_wait()?;
    let details = proc::details_at(region.addr)?;
    ensure!(details.has_flag("dp"), "it is not droppable any more");
    for page in region.pages() {
        page.fill(5);
        page.check(5)?;
    }
    Ok(())
}

/// As a package manager does: a new file is written beside the old one, and renamed over it.
fn replaced(stage: &Stage) -> Result<()> {
    let text = |version: u8| vec![version; 6 * PAGE];
    let mut mapped = Vec::new();
    for (name, is_linked) in [("libone.so.1", false), ("libtwo.so.1", true)] {
        let path = stage.path(name);
        fs::write(&path, text(1))?;
        let file = File::open(&path)?;
        let map = |prot, offset| {
            let fd = Some(file.as_fd());
            Region::map(None, 2 * PAGE, prot, libc::MAP_PRIVATE, fd, offset)
        };
        let code = map(libc::PROT_READ | libc::PROT_EXEC, 0)?;
        let data = map(RW, 4 * PAGE as i64)?;
        data.put(0, b"relocated");
        drop(file);
        if is_linked {
            // Backups of package managers keep the old file under another name.
            fs::hard_link(&path, stage.path("backup"))?;
        }
        let new = stage.path("new");
        fs::write(&new, text(2))?;
        fs::rename(&new, &path)?;
        mapped.push((path, code, data));
    }
    stage.ready_and_wait()?;
    for (path, code, data) in mapped {
        ensure!(
            code.get(0, 2 * PAGE) == vec![1; 2 * PAGE],
            "the code has changed"
        );
        ensure!(data.get(0, 9) == b"relocated", "what was written is lost");
        ensure!(
            data.get(PAGE, PAGE) == vec![1; PAGE],
            "the data has changed"
        );
        ensure!(fs::read(&path)? == text(2), "the new version is gone");
        let vma = proc::vma_at(code.addr)?.context("the code is not mapped")?;
        ensure!(
            vma.path.ends_with(" (deleted)"),
            "the mapping is called {}",
            vma.path
        );
    }
    ensure!(
        fs::read(stage.path("backup"))? == text(1),
        "the backup has changed"
    );
    let files = fs::read_dir(stage.path("."))?.count();
    ensure!(files == 3, "{files} files in place of 3");
    Ok(())
}

/// The layers are on a file system of their own: an overlay can't be the upper layer of another.
fn overlay(stage: &Stage) -> Result<()> {
    let base = stage.path("layers");
    fs::create_dir(&base)?;
    sys::mount(Some(c"tmpfs"), &sys::c_path(&base)?, Some(c"tmpfs"), 0).context("a tmpfs")?;
    fs::create_dir(base.join("lower"))?;
    for name in ["plain", "copied"] {
        fs::write(base.join("lower").join(name), vec![7; 4 * PAGE])?;
    }
    let merged = sys::mount_overlay(&base).context("an overlay")?;

    let plain = File::open(merged.join("plain"))?;
    let copied = sys::open(merged.join("copied"), libc::O_RDWR)?;
    let code = Region::file(plain.as_fd(), 2 * PAGE, libc::PROT_READ, libc::MAP_PRIVATE)?;
    let data = Region::file(plain.as_fd(), 2 * PAGE, RW, libc::MAP_PRIVATE)?;
    let shared = Region::file(copied.as_fd(), 2 * PAGE, RW, libc::MAP_SHARED)?;
    drop((plain, copied));
    data.put(0, b"private");
    shared.put(0, b"shared");
    stage.ready_and_wait()?;
    ensure!(
        code.get(0, 2 * PAGE) == vec![7; 2 * PAGE],
        "the code has changed"
    );
    ensure!(data.get(0, 8) == b"private\x07", "what was written is lost");
    shared.put(PAGE, b"on");
    let text = fs::read(merged.join("copied"))?;
    ensure!(
        &text[..7] == b"shared\x07" && &text[PAGE..PAGE + 2] == b"on",
        "another file"
    );
    let beneath = fs::read(base.join("lower/copied"))?;
    ensure!(
        beneath == vec![7; 4 * PAGE],
        "the lower layer was written to"
    );
    for region in [code, data, shared] {
        region.unmap()?;
    }
    sys::unmount(&sys::c_path(&merged)?)?;
    Ok(sys::unmount(&sys::c_path(&base)?)?)
}

/// Flags of personality(2) that show in a running task.
pub static PERSONALITY: Workload = Workload::new(
    "task/personality",
    "personalities: no randomisation, no zero page, another kernel version",
    |stage| {
        const NO_RANDOMIZE: i64 = 0x004_0000;
        const UNAME26: i64 = 0x002_0000;
        const STICKY_TIMEOUTS: i64 = 0x400_0000;
        let ask = || sys::call_plain(libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0, 0]);
        let children = [NO_RANDOMIZE, UNAME26 | STICKY_TIMEOUTS, 0]
            .into_iter()
            .map(|flags| {
                stage.child(move |stage| {
                    sys::call_plain(libc::SYS_personality, [flags, 0, 0, 0, 0, 0])?;
                    stage.ready_and_wait()?;
                    let found = ask()?;
                    let wanted = flags.cast_unsigned();
                    ensure!(found == wanted, "{found:#x} instead of {wanted:#x}");
                    Ok(())
                })
            })
            .collect::<Result<Vec<_>>>()?;
        stage.ready_and_wait()?;
        children.into_iter().try_for_each(crate::Child::finish)
    },
);
