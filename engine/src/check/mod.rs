//! What this kernel and these privileges can do.
//!
//! Each [`Feature`] is probed by using it, in children and scratch mappings of our own, never by
//! version numbers. A probe takes well under a millisecond; nothing is probed before it is asked for.
//!
//! ```
//! use firn_engine::check::{Feature, Verdict};
//!
//! match Feature::PidfdStore.probe() {
//!     Verdict::Works => println!("descriptors are fetched by pidfd_getfd"),
//!     Verdict::FallsBack { to, cost } => println!("{to} is used instead: {cost}"),
//!     Verdict::Missing { why, cost } => println!("{why}: {cost}"),
//! }
//! ```

mod cgroup;
mod probes;

use firn_sys::Errno;

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The feature works.
    Works,
    /// It does not, and something else does its work.
    FallsBack {
        /// What does its work.
        to: &'static str,
        /// What the user notices.
        cost: &'static str,
    },
    /// It does not, and nothing takes its place.
    Missing {
        /// What the kernel said, or which right is missing.
        why: String,
        /// What can't be done.
        cost: &'static str,
    },
}

impl Verdict {
    /// Whether the work gets done, by the feature or by what stands in for it.
    pub fn is_served(&self) -> bool {
        !matches!(self, Verdict::Missing { .. })
    }
}

/// How much depends on a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Every dump or restore needs it.
    Core,
    /// Only tasks with certain objects need it, or it makes things faster.
    Extra,
    /// Capabilities to come will use it.
    Experimental,
}

macro_rules! features {
    ($($(#[$doc:meta])* $variant:ident $name:literal $group:ident $what:literal,)*) => {
        /// A kernel facility or a privilege.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Feature {
            $(#[doc = $what] $variant,)*
        }

        impl Feature {
            /// All of them, in the order of the table.
            pub const ALL: &'static [Feature] = &[$(Feature::$variant,)*];

            /// Name on the command line; CRIU's where CRIU probes the same.
            pub fn name(self) -> &'static str {
                match self {
                    $(Feature::$variant => $name,)*
                }
            }

            /// How much depends on it.
            pub fn group(self) -> Group {
                match self {
                    $(Feature::$variant => Group::$group,)*
                }
            }

            /// What it is for, one clause.
            pub fn what(self) -> &'static str {
                match self {
                    $(Feature::$variant => $what,)*
                }
            }
        }
    };
}

features! {
    Rights "cap_checkpoint_restore" Core "right to see into tasks and to choose pids",
    Ptrace "ptrace_seize" Core "stopping tasks and setting their registers",
    Xsave "xsave" Core "vector and FPU registers of other tasks",
    PeekSiginfo "ptrace_peeksiginfo" Core "pending signals and signal masks",
    Rseq "get_rseq_conf" Core "restartable sequences of other tasks",
    PidfdStore "pidfd_store" Core "fetching descriptors of other tasks",
    Kcmp "kcmp" Core "telling which descriptors and tables are shared",
    SetTid "clone3_set_tid" Core "giving tasks their old pids",
    ProcessVm "process_vm_readv" Core "copying memory of other tasks",
    ProcMem "proc_mem" Core "copying memory that a task itself can't read",
    MapFiles "map_files" Core "opening what tasks have mapped",
    Pagemap "pagemap" Core "finding which pages exist",
    SetMmMap "prctl_mm_map" Core "restoring heap, arguments and auxiliary vector",
    TidAddress "tid_address" Core "the address that is cleared when a thread ends",
    VdsoSyscall "vdso_syscall" Core "a first system call in a task without touching its code",
    VdsoMove "vdso_mremap" Core "putting the vdso where it was",
    MntId "mnt_id" Core "the mount that a descriptor belongs to",
    PagemapScan "pagemap_scan" Extra "finding pages fast",
    GuardPages "pagemap_scan_guard_pages" Extra "finding guard regions",
    GuardInstall "guard_regions" Extra "restoring guard regions",
    Memfd "memfd" Extra "anonymous files",
    MemfdHugetlb "memfd_hugetlb" Extra "anonymous files of huge pages",
    ShadowStack "shadow_stack" Extra "programs with shadow stacks",
    Ia32 "compat_cr" Extra "32-bit programs",
    CapSysResource "cap_sys_resource" Extra "raising limits of tasks",
    CapSysAdmin "cap_sys_admin" Extra "administration rights",
    Uffd "uffd" Extra "filling the memory of restored tasks without faults",
    Cgroup2Freeze "cgroup2_freeze" Extra "freezing a whole cgroup at once",
    SuspendSeccomp "seccomp_suspend" Extra "working inside tasks under seccomp filters",
    TimerIds "timer_cr_ids" Extra "POSIX timers with their old ids",
    WriteTracking "uffd_wp_async" Extra "finding written pages between dumps",
    TcpRepair "tcp_repair" Extra "TCP connections",
    Nftables "network_lock_nftables" Extra "holding packets back while a task is frozen",
    PagemapPfn "pagemap_pfn" Experimental "seeing which pages tasks share copy-on-write",
    CanMapVdso "can_map_vdso" Experimental "a new vdso at a place of our choice",
    Collapse "madv_collapse" Experimental "making huge pages again at restore",
    Cgroup1Freezer "cgroup1_freezer" Experimental "freezing through a version 1 cgroup",
    UffdNoncoop "uffd-noncoop" Experimental "filling memory of tasks that fork and remap",
    SoftDirty "soft_dirty" Experimental "finding written pages on older kernels",
}

impl Feature {
    /// Finds a feature by its name.
    pub fn from_name(name: &str) -> Option<Feature> {
        Feature::ALL
            .iter()
            .copied()
            .find(|feature| feature.name() == name)
    }

    /// Probes it.
    pub fn probe(self) -> Verdict {
        probes::probe(self)
    }
}

/// Names that CRIU's `check --feature` knows and that nothing in this version depends on.
pub const UNUSED_OF_CRIU: &[&str] = &[
    "mem_dirty_track",
    "aio_remap",
    "timerfd",
    "tun",
    "tun_ns",
    "userns",
    "fdinfo_lock",
    "seccomp_filters",
    "loginuid",
    "cgroupns",
    "autofs",
    "tcp_half_closed",
    "sk_ns",
    "sk_unix_file",
    "net_diag_raw",
    "nsid",
    "link_nsid",
    "kcmp_epoll",
    "timens",
    "external_net_ns",
    "newifindex",
    "nftables",
    "has_ipt_legacy",
    "ns_pid",
    "apparmor_stacking",
    "sockopt_buf_lock",
    "move_mount_set_group",
    "openat2",
    "ipv6_freebind",
    "overlayfs_maps",
    "breakpoints",
];

/// The verdict on a feature without which something can't be done.
fn needed(result: Result<(), Errno>, cost: &'static str) -> Verdict {
    match result {
        Ok(()) => Verdict::Works,
        Err(errno) => Verdict::Missing {
            why: errno.to_string(),
            cost,
        },
    }
}

/// The verdict on a feature that something else can stand in for.
fn replaceable(result: Result<(), Errno>, to: &'static str, cost: &'static str) -> Verdict {
    match result {
        Ok(()) => Verdict::Works,
        Err(_) => Verdict::FallsBack { to, cost },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for feature in Feature::ALL {
            assert_eq!(Feature::from_name(feature.name()), Some(*feature));
            assert!(
                !UNUSED_OF_CRIU.contains(&feature.name()),
                "{}",
                feature.name()
            );
        }
        assert_eq!(Feature::from_name("nonsense"), None);
    }

    #[test]
    fn every_probe_answers_and_leaves_no_child() {
        for feature in Feature::ALL {
            let verdict = feature.probe();
            if let Verdict::Missing { why, cost } = &verdict {
                assert!(!why.is_empty() && !cost.is_empty(), "{}", feature.name());
            }
        }
        let none_left = firn_sys::wait::try_wait(firn_sys::Pid::from_raw(-1));
        // Other tests of this program may have children of their own, but none that has ended.
        assert!(
            matches!(none_left, Err(Errno::ECHILD) | Ok(None)),
            "{none_left:?}"
        );
    }
}
