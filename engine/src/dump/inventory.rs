//! The inventory: what makes a directory a checkpoint, and by whom and where it was made.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use firn_images::IMG_VERSION;
use firn_proto::{
    FirnInventoryEntry, InventoryEntry, PluginsEntry, TaskKobjIdsEntry, TimensEntry, Timespec,
};
use firn_sys::clock;
use firn_sys::procfs;

use crate::arch::{self, XsaveLayout};
use crate::memory::sysv::OWN_IPC_NAMESPACE;
use crate::task::core_image::ROOT_CG_SET;
use crate::task::lsm::Module;

/// Network lock method "skip": nothing was locked.
const LOCK_SKIP: u32 = 2;
/// The first id of a dumped task's own objects; 1 is the dumper's.
const FIRST_ID: u32 = 2;

/// Ids of the dumper: a restored task gets a new namespace where its own differ.
pub fn root_ids() -> TaskKobjIdsEntry {
    TaskKobjIdsEntry {
        vm_id: 1,
        files_id: 1,
        fs_id: 1,
        sighand_id: 1,
        pid_ns_id: Some(1),
        net_ns_id: Some(2),
        ipc_ns_id: Some(OWN_IPC_NAMESPACE),
        uts_ns_id: Some(4),
        time_ns_id: Some(5),
        mnt_ns_id: Some(6),
        user_ns_id: Some(7),
        cgroup_ns_id: Some(8),
    }
}

/// Ids of the `nth` living task, in the namespaces of the dumper.
pub fn task_ids(nth: u32, files_id: u32) -> TaskKobjIdsEntry {
    let own = FIRST_ID + nth;
    TaskKobjIdsEntry {
        vm_id: own,
        files_id,
        fs_id: own,
        sighand_id: own,
        ..root_ids()
    }
}

/// The clocks of this machine, for tasks without a time namespace.
pub fn clocks() -> TimensEntry {
    let spec = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    TimensEntry {
        monotonic: spec(clock::monotonic()),
        boottime: spec(clock::boottime()),
    }
}

/// What the inventory says about the network.
pub struct Network {
    /// Names the dump, and its lock of the network.
    pub run_id: String,
    /// How the network is locked; None where nothing had to be.
    pub lock_method: Option<u32>,
    /// TCP connections are to be closed by the restore.
    pub closes_tcp: bool,
}

/// The inventory of a dump made now.
pub fn inventory(network: Network) -> InventoryEntry {
    let (sec, nsec) = clock::boottime();
    InventoryEntry {
        img_version: IMG_VERSION,
        fdinfo_per_id: Some(true),
        root_ids: Some(root_ids()),
        ns_per_id: Some(true),
        root_cg_set: Some(ROOT_CG_SET),
        lsmtype: Some(Module::to_image(Module::of_host())),
        dump_uptime: Some(sec * 1_000_000 + nsec / 1000),
        network_lock_method: Some(network.lock_method.unwrap_or(LOCK_SKIP)),
        tcp_close: network.closes_tcp.then_some(true),
        plugins_entry: Some(PluginsEntry::default()),
        dump_criu_run_id: Some(network.run_id),
        firn: Some(extension()),
        ..InventoryEntry::default()
    }
}

/// Learns what the inventory says of this machine, so that a stopped tree need not wait for it.
pub fn know_host() {
    kernel_release();
    clocks();
    arch::cpu_model();
    XsaveLayout::of_this_cpu();
}

/// Release of the running kernel, read once.
fn kernel_release() -> Option<String> {
    static RELEASE: OnceLock<Option<String>> = OnceLock::new();
    let read = || {
        let release = procfs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
        Some(release.trim().to_owned())
    };
    RELEASE.get_or_init(read).clone()
}

fn extension() -> FirnInventoryEntry {
    let layout = XsaveLayout::of_this_cpu();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    FirnInventoryEntry {
        version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        xfeatures: Some(layout.features()),
        xsave_size: u32::try_from(layout.size()).ok(),
        cpu_model: arch::cpu_model().map(str::to_owned),
        created_at_unix: Some(now.as_secs()),
        cpu_flags: Vec::new(),
        kernel_release: kernel_release(),
    }
}
