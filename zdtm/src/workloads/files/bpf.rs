//! BPF maps.

use std::ffi::CString;

use anyhow::{Context, Result, ensure};

use crate::{Need, Stage, Workload, sys};

pub static HASH: Workload = Workload::new(
    "files/bpf-hash",
    "a hash with entries, open twice, in two tasks",
    hash,
)
.needs(&[Need::Root]);
pub static ARRAY: Workload = Workload::new(
    "files/bpf-array",
    "an array with entries, and one that is frozen and only to be read",
    array,
)
.needs(&[Need::Root]);
pub static PINNED: Workload = Workload::new(
    "files/bpf-pinned",
    "a map that is pinned stays the one that others find there",
    pinned,
)
.needs(&[Need::Root, Need::FileSystem("bpf")]);
pub static OTHER_MAP: Workload = Workload::new(
    "files/bpf-other-map",
    "a map of prefixes, which is refused",
    |stage| {
        const NO_PREALLOC: u32 = 1;
        let map = sys::bpf_map(sys::BPF_LPM_TRIE, [8, 4, 4], NO_PREALLOC, "prefixes")?;
        stage.ready_and_wait()?;
        drop(map);
        Ok(())
    },
)
.needs(&[Need::Root])
.refused(&["LPM trie"]);
pub static PROGRAM: Workload = Workload::new(
    "files/bpf-program",
    "a program, which is refused",
    |stage| {
        let program = sys::bpf_program()?;
        stage.ready_and_wait()?;
        drop(program);
        Ok(())
    },
)
.needs(&[Need::Root])
.refused(&["BPF programs"]);

fn hash(stage: &Stage) -> Result<()> {
    let map = sys::bpf_map(sys::BPF_HASH, [4, 3, 100], 0, "firn_hash").context("a map")?;
    for n in 0..60u8 {
        sys::bpf_put(&map, &[n, 0, 0, 1], &[n, n + 1, n + 2])?;
    }
    let (id, _) = sys::bpf_map_info(&map)?;
    let again = sys::bpf_map_by_id(id, 0)?;
    let child = stage.child(|stage| {
        stage.ready_and_wait()?;
        let value = sys::bpf_get(&map, &[7, 0, 0, 1], 3).context("in the child")?;
        ensure!(value == [7, 8, 9], "the child reads {value:?}");
        sys::bpf_put(&map, &[200, 0, 0, 0], b"new")?;
        Ok(())
    })?;
    stage.ready_and_wait()?;
    let (_, name) = sys::bpf_map_info(&map)?;
    ensure!(name == "firn_hash", "it is called {name}");
    for n in 0..60u8 {
        let value = sys::bpf_get(&map, &[n, 0, 0, 1], 3)?;
        ensure!(value == [n, n + 1, n + 2], "entry {n} is {value:?}");
    }
    ensure!(sys::bpf_get(&map, &[0; 4], 3).is_err(), "an entry is new");
    child.finish()?;
    let value = sys::bpf_get(&again, &[200, 0, 0, 0], 3).context("through the other file")?;
    ensure!(value == b"new", "the child wrote {value:?}");
    Ok(())
}

fn array(stage: &Stage) -> Result<()> {
    const RDONLY: u32 = 8;
    let map = sys::bpf_map(sys::BPF_ARRAY, [4, 8, 32], 0, "firn_array").context("a map")?;
    let frozen = sys::bpf_map(sys::BPF_ARRAY, [4, 4, 2], 0, "firn_frozen")?;
    for n in 0..32u32 {
        sys::bpf_put(&map, &n.to_ne_bytes(), &u64::from(n * n).to_ne_bytes())?;
    }
    sys::bpf_put(&frozen, &1u32.to_ne_bytes(), b"cold")?;
    sys::bpf_freeze(&frozen)?;
    let (id, _) = sys::bpf_map_info(&map)?;
    let reader = sys::bpf_map_by_id(id, RDONLY)?;
    stage.ready_and_wait()?;
    for n in 0..32u32 {
        let value = sys::bpf_get(&reader, &n.to_ne_bytes(), 8)?;
        ensure!(
            value == u64::from(n * n).to_ne_bytes(),
            "entry {n} is {value:?}"
        );
    }
    let zero = 0u32.to_ne_bytes();
    ensure!(
        sys::bpf_put(&reader, &zero, &[1; 8]).is_err(),
        "the reader writes"
    );
    sys::bpf_put(&map, &zero, &[1; 8])?;
    ensure!(
        sys::bpf_get(&reader, &zero, 8)? == [1; 8],
        "the reader has another map"
    );
    let value = sys::bpf_get(&frozen, &1u32.to_ne_bytes(), 4)?;
    ensure!(value == b"cold", "the frozen one holds {value:?}");
    ensure!(
        sys::bpf_put(&frozen, &zero, b"warm").is_err(),
        "it is not frozen any more"
    );
    Ok(())
}

/// A filesystem of type bpf of its own, with a blank in its path.
fn filesystem(stage: &Stage) -> Result<CString> {
    let dir = stage.path("pins of maps");
    std::fs::create_dir(&dir)?;
    let target = sys::c_path(&dir)?;
    sys::mount(Some(c"bpf"), &target, Some(c"bpf"), 0).context("mounting bpf")?;
    std::fs::create_dir(dir.join("deep"))?;
    Ok(target)
}

fn pinned(stage: &Stage) -> Result<()> {
    let target = filesystem(stage)?;
    let path = sys::c_path(&stage.path("pins of maps/deep/map"))?;
    let map = sys::bpf_map(sys::BPF_HASH, [4, 4, 8], 0, "firn_pinned")?;
    sys::bpf_put(&map, &[1; 4], b"here")?;
    sys::bpf_pin(&map, &path).context("pinning")?;
    let (id, _) = sys::bpf_map_info(&map)?;
    stage.ready_and_wait()?;
    let (now, _) = sys::bpf_map_info(&map)?;
    ensure!(now == id, "it was map {id}, is {now}");
    let other = sys::bpf_pinned(&path).context("opening the pin")?;
    sys::bpf_put(&other, &[2; 4], b"both")?;
    ensure!(
        sys::bpf_get(&map, &[2; 4], 4)? == b"both",
        "it is another map"
    );
    ensure!(sys::bpf_get(&map, &[1; 4], 4)? == b"here", "it is empty");
    drop(other);
    Ok(sys::unmount(&target)?)
}
