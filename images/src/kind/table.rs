//! The table of image kinds: one row per kind of file.
//!
//! A row reads: variant => CRIU's name: file name in three parts, when it exists; header and
//! magic, name in crit's JSON, entries, what follows them. Facts about the format and nothing else
//! stand here; `tests/kinds.rs` holds the rows against two tables of facts.

use super::Entries::{HeadThenMany, Many, One, Opaque};
use super::Header::{Bare, Common, Raw, Service};
use super::KindInfo;
use super::Number::{Decimal, Hexadecimal, Unnumbered};
use super::Payload::{Ghost, IpcMsg, IpcSem, IpcShm, Lengths, Nothing};
use super::Presence::{Always, LegacyRead, Unused, WhenNeeded};

macro_rules! kinds {
    ($(
        $(#[$doc:meta])*
        $kind:ident => $tag:literal: $prefix:literal $number:ident $suffix:literal, $presence:ident,
        $header:ident $magic:literal, $crit:expr, $entries:ident [$($message:literal),*],
        $payload:expr;
    )*) => {
        /// A kind of file in an image set.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ImageKind {
            $( $(#[$doc])* $kind, )*
        }

        /// One row per kind, in the order of the variants.
        pub(super) const TABLE: &[KindInfo] = &[
            $( KindInfo {
                kind: ImageKind::$kind,
                tag: $tag,
                prefix: $prefix,
                number: $number,
                suffix: $suffix,
                presence: $presence,
                header: $header,
                magic: $magic,
                crit_name: $crit,
                entries: $entries,
                messages: &[$($message),*],
                payload: $payload,
            }, )*
        ];
    };
}

kinds! {
    /// What the set is; written last.
    Inventory => "INVENTORY": "inventory" Unnumbered ".img", Always,
        Bare 0x5831_3116, Some("INVENTORY"), One ["inventory_entry"], Nothing;
    /// Descriptor table, by files id.
    Fdinfo => "FDINFO": "fdinfo-" Decimal ".img", Always,
        Common 0x5621_3732, Some("FDINFO"), Many ["fdinfo_entry"], Nothing;
    /// Runs of private pages of a process, by pid.
    Pagemap => "PAGEMAP": "pagemap-" Decimal ".img", Always,
        Common 0x5608_4025, Some("PAGEMAP"), HeadThenMany ["pagemap_head", "pagemap_entry"], Nothing;
    /// Runs of pages of a shared memory object, by shmem id.
    ShmemPagemap => "SHMEM_PAGEMAP": "pagemap-shmem-" Decimal ".img", Always,
        Common 0x5608_4025, Some("PAGEMAP"), HeadThenMany ["pagemap_head", "pagemap_entry"], Nothing;
    /// Regular files, in old sets.
    RegFiles => "REG_FILES": "reg-files" Unnumbered ".img", LegacyRead,
        Common 0x5036_3636, Some("REG_FILES"), Many ["reg_file_entry"], Nothing;
    /// Files handled by plugins, in old sets.
    ExtFiles => "EXT_FILES": "ext-files" Unnumbered ".img", LegacyRead,
        Common 0x5925_5641, Some("EXT_FILES"), Many ["ext_file_entry"], Nothing;
    /// Namespace files, in old sets.
    NsFiles => "NS_FILES": "ns-files" Unnumbered ".img", LegacyRead,
        Common 0x6139_4011, Some("NS_FILES"), Many ["ns_file_entry"], Nothing;
    /// Eventfds, in old sets.
    EventfdFile => "EVENTFD_FILE": "eventfd" Unnumbered ".img", LegacyRead,
        Common 0x4452_3722, Some("EVENTFD_FILE"), Many ["eventfd_file_entry"], Nothing;
    /// Epolls, in old sets.
    EventpollFile => "EVENTPOLL_FILE": "eventpoll" Unnumbered ".img", LegacyRead,
        Common 0x4502_3858, Some("EVENTPOLL_FILE"), Many ["eventpoll_file_entry"], Nothing;
    /// Targets of epolls, in old sets.
    EventpollTfd => "EVENTPOLL_TFD": "eventpoll-tfd" Unnumbered ".img", LegacyRead,
        Common 0x4443_3746, Some("EVENTPOLL_TFD"), Many ["eventpoll_tfd_entry"], Nothing;
    /// Signalfds, in old sets.
    Signalfd => "SIGNALFD": "signalfd" Unnumbered ".img", LegacyRead,
        Common 0x5732_3820, Some("SIGNALFD"), Many ["signalfd_entry"], Nothing;
    /// Inotifies, in old sets.
    InotifyFile => "INOTIFY_FILE": "inotify" Unnumbered ".img", LegacyRead,
        Common 0x4842_4431, Some("INOTIFY_FILE"), Many ["inotify_file_entry"], Nothing;
    /// Watches of inotifies, in old sets.
    InotifyWd => "INOTIFY_WD": "inotify-wd" Unnumbered ".img", LegacyRead,
        Common 0x5456_2009, Some("INOTIFY_WD"), Many ["inotify_wd_entry"], Nothing;
    /// Fanotifies, in old sets.
    FanotifyFile => "FANOTIFY_FILE": "fanotify" Unnumbered ".img", LegacyRead,
        Common 0x5509_6122, Some("FANOTIFY_FILE"), Many ["fanotify_file_entry"], Nothing;
    /// Marks of fanotifies, in old sets.
    FanotifyMark => "FANOTIFY_MARK": "fanotify-mark" Unnumbered ".img", LegacyRead,
        Common 0x5650_6035, Some("FANOTIFY_MARK"), Many ["fanotify_mark_entry"], Nothing;
    /// A thread, and with a leader its process, by tid.
    Core => "CORE": "core-" Decimal ".img", Always,
        Common 0x5505_3847, Some("CORE"), One ["core_entry"], Nothing;
    /// Kernel objects of a process, by pid.
    Ids => "IDS": "ids-" Decimal ".img", Always,
        Common 0x5443_2030, Some("IDS"), One ["task_kobj_ids_entry"], Nothing;
    /// Address space of a process, by pid.
    Mm => "MM": "mm-" Decimal ".img", Always,
        Common 0x5749_2820, Some("MM"), One ["mm_entry"], Nothing;
    /// Mappings of a process, in old sets.
    Vmas => "VMAS": "vmas-" Decimal ".img", LegacyRead,
        Common 0x5412_3737, Some("VMAS"), Many ["vma_entry"], Nothing;
    /// Pipes, in old sets.
    Pipes => "PIPES": "pipes" Unnumbered ".img", LegacyRead,
        Common 0x5651_3555, Some("PIPES"), Many ["pipe_entry"], Nothing;
    /// Bytes waiting in pipes.
    PipesData => "PIPES_DATA": "pipes-data" Unnumbered ".img", WhenNeeded,
        Common 0x5645_3709, Some("PIPES_DATA"), Many ["pipe_data_entry"], Lengths(&["bytes"]);
    /// Fifos, in old sets.
    Fifo => "FIFO": "fifo" Unnumbered ".img", LegacyRead,
        Common 0x5836_4939, Some("FIFO"), Many ["fifo_entry"], Nothing;
    /// Bytes waiting in fifos.
    FifoData => "FIFO_DATA": "fifo-data" Unnumbered ".img", WhenNeeded,
        Common 0x5933_3054, Some("FIFO_DATA"), Many ["pipe_data_entry"], Lengths(&["bytes"]);
    /// The process tree.
    Pstree => "PSTREE": "pstree" Unnumbered ".img", Always,
        Common 0x5027_3030, Some("PSTREE"), Many ["pstree_entry"], Nothing;
    /// Signal handlers, in old sets.
    Sigact => "SIGACT": "sigacts-" Decimal ".img", LegacyRead,
        Common 0x5534_4201, Some("SIGACT"), Many ["sa_entry"], Nothing;
    /// Unix sockets, in old sets.
    Unixsk => "UNIXSK": "unixsk" Unnumbered ".img", LegacyRead,
        Common 0x5437_3943, Some("UNIXSK"), Many ["unix_sk_entry"], Nothing;
    /// Inet sockets, in old sets.
    Inetsk => "INETSK": "inetsk" Unnumbered ".img", LegacyRead,
        Common 0x5644_3851, Some("INETSK"), Many ["inet_sk_entry"], Nothing;
    /// Packet sockets, in old sets.
    Packetsk => "PACKETSK": "packetsk" Unnumbered ".img", LegacyRead,
        Common 0x6045_4618, Some("PACKETSK"), Many ["packet_sock_entry"], Nothing;
    /// Netlink sockets, in old sets.
    NetlinkSk => "NETLINK_SK": "netlinksk" Unnumbered ".img", LegacyRead,
        Common 0x5800_5614, Some("NETLINK_SK"), Many ["netlink_sk_entry"], Nothing;
    /// Packets queued in unix sockets.
    SkQueues => "SK_QUEUES": "sk-queues" Unnumbered ".img", WhenNeeded,
        Common 0x5626_4026, Some("SK_QUEUES"), Many ["sk_packet_entry"], Lengths(&["length"]);
    /// Interval timers, in old sets.
    Itimers => "ITIMERS": "itimers-" Decimal ".img", LegacyRead,
        Common 0x5746_4056, Some("ITIMERS"), Many ["itimer_entry"], Nothing;
    /// POSIX timers, in old sets.
    PosixTimers => "POSIX_TIMERS": "posix-timers-" Decimal ".img", LegacyRead,
        Common 0x5260_3957, Some("POSIX_TIMERS"), Many ["posix_timer_entry"], Nothing;
    /// Credentials, in old sets.
    Creds => "CREDS": "creds-" Decimal ".img", LegacyRead,
        Common 0x5402_3547, Some("CREDS"), One ["creds_entry"], Nothing;
    /// UTS namespace.
    Utsns => "UTSNS": "utsns-" Decimal ".img", WhenNeeded,
        Common 0x5447_3203, Some("UTSNS"), One ["utsns_entry"], Nothing;
    /// Settings of an IPC namespace.
    IpcVar => "IPC_VAR": "ipcns-var-" Decimal ".img", WhenNeeded,
        Common 0x5311_5007, Some("IPC_VAR"), One ["ipc_var_entry"], Nothing;
    /// System V shared memory.
    IpcnsShm => "IPCNS_SHM": "ipcns-shm-" Decimal ".img", WhenNeeded,
        Common 0x4628_3044, Some("IPCNS_SHM"), Many ["ipc_shm_entry"], IpcShm;
    /// System V message queues.
    IpcnsMsg => "IPCNS_MSG": "ipcns-msg-" Decimal ".img", WhenNeeded,
        Common 0x5545_3737, Some("IPCNS_MSG"), Many ["ipc_msg_entry"], IpcMsg;
    /// System V semaphores.
    IpcnsSem => "IPCNS_SEM": "ipcns-sem-" Decimal ".img", WhenNeeded,
        Common 0x5957_3019, Some("IPCNS_SEM"), Many ["ipc_sem_entry"], IpcSem;
    /// Working directory, root and umask, by pid.
    Fs => "FS": "fs-" Decimal ".img", Always,
        Common 0x5140_3912, Some("FS"), One ["fs_entry"], Nothing;
    /// Files whose path no longer leads to them.
    RemapFpath => "REMAP_FPATH": "remap-fpath" Unnumbered ".img", WhenNeeded,
        Common 0x5913_3954, Some("REMAP_FPATH"), Many ["remap_file_path_entry"], Nothing;
    /// Content of a deleted file, by ghost id.
    GhostFile => "GHOST_FILE": "ghost-file-" Hexadecimal ".img", WhenNeeded,
        Common 0x5258_3605, Some("GHOST_FILE"), One ["ghost_file_entry", "ghost_chunk_entry"], Ghost;
    /// Memory files.
    MemfdInode => "MEMFD_INODE": "memfd" Unnumbered ".img", WhenNeeded,
        Common 0x4845_3499, Some("MEMFD_INODE"), Many ["memfd_inode_entry"], Nothing;
    /// A TCP connection and its queues, by socket inode.
    TcpStream => "TCP_STREAM": "tcp-stream-" Hexadecimal ".img", WhenNeeded,
        Common 0x5146_5506, Some("TCP_STREAM"), One ["tcp_stream_entry"], Lengths(&["inq_len", "outq_len"]);
    /// Mount namespace.
    Mnts => "MNTS": "mountpoints-" Decimal ".img", WhenNeeded,
        Common 0x5556_3928, Some("MNTS"), Many ["mnt_entry"], Nothing;
    /// Devices of a network namespace.
    Netdev => "NETDEV": "netdev-" Decimal ".img", WhenNeeded,
        Common 0x5737_3951, Some("NETDEV"), Many ["net_device_entry"], Nothing;
    /// Settings of a network namespace.
    Netns => "NETNS": "netns-" Decimal ".img", WhenNeeded,
        Common 0x5593_3752, Some("NETNS"), One ["netns_entry"], Nothing;
    /// Addresses of a network namespace, as iproute2 saves them.
    Ifaddr => "IFADDR": "ifaddr-" Decimal ".img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// IPv4 routes, as iproute2 saves them.
    Route => "ROUTE": "route-" Decimal ".img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// IPv6 routes, as iproute2 saves them.
    Route6 => "ROUTE6": "route6-" Decimal ".img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// Routing rules, as iproute2 saves them.
    Rule => "RULE": "rule-" Decimal ".img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// Text of iptables-save.
    Iptables => "IPTABLES": "iptables-" Decimal ".img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// Text of ip6tables-save.
    Ip6tables => "IP6TABLES": "ip6tables-" Decimal ".img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// Text of the nftables ruleset.
    Nftables => "NFTABLES": "nftables-" Decimal ".img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// Content of a tmpfs as a tar archive, by mount id, in old sets.
    TmpfsImg => "TMPFS_IMG": "tmpfs-" Decimal ".tar.gz.img", LegacyRead,
        Raw 0, None, Opaque [], Nothing;
    /// Content of a tmpfs as a tar archive, by device.
    TmpfsDev => "TMPFS_DEV": "tmpfs-dev-" Decimal ".tar.gz.img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// An autofs mount, by device.
    Autofs => "AUTOFS": "autofs-" Decimal ".img", WhenNeeded,
        Common 0x4935_3943, Some("AUTOFS"), One ["autofs_entry"], Nothing;
    /// Binary formats, by device, in old sets.
    BinfmtMiscOld => "BINFMT_MISC_OLD": "binfmt-misc-" Decimal ".img", LegacyRead,
        Common 0x6734_3323, Some("BINFMT_MISC"), Many ["binfmt_misc_entry"], Nothing;
    /// Binary formats.
    BinfmtMisc => "BINFMT_MISC": "binfmt-misc" Unnumbered ".img", WhenNeeded,
        Common 0x6734_3323, Some("BINFMT_MISC"), Many ["binfmt_misc_entry"], Nothing;
    /// Open terminals, in old sets.
    TtyFiles => "TTY_FILES": "tty" Unnumbered ".img", LegacyRead,
        Common 0x5943_3025, Some("TTY_FILES"), Many ["tty_file_entry"], Nothing;
    /// Terminals.
    TtyInfo => "TTY_INFO": "tty-info" Unnumbered ".img", WhenNeeded,
        Common 0x5945_3036, Some("TTY_INFO"), Many ["tty_info_entry"], Nothing;
    /// Bytes waiting in pseudo terminals.
    TtyData => "TTY_DATA": "tty-data" Unnumbered ".img", WhenNeeded,
        Common 0x5941_3026, Some("TTY_DATA"), Many ["tty_data_entry"], Nothing;
    /// File locks.
    FileLocks => "FILE_LOCKS": "filelocks" Unnumbered ".img", WhenNeeded,
        Common 0x5432_3616, Some("FILE_LOCKS"), Many ["file_lock_entry"], Nothing;
    /// Resource limits, in old sets.
    Rlimit => "RLIMIT": "rlimit-" Decimal ".img", LegacyRead,
        Common 0x5711_3925, Some("RLIMIT"), Many ["rlimit_entry"], Nothing;
    /// Contents of pages, by pages id.
    Pages => "PAGES": "pages-" Decimal ".img", Always,
        Raw 0, None, Opaque [], Nothing;
    /// Pages with their addresses, of sets older than any that is read.
    PagesOld => "PAGES_OLD": "pages-" Decimal ".img", Unused,
        Common 0x5608_4025, Some("PAGEMAP"), Opaque [], Nothing;
    /// Shared pages with their addresses, of sets older than any that is read.
    ShmPagesOld => "SHM_PAGES_OLD": "pages-shmem-" Decimal ".img", Unused,
        Common 0x5608_4025, Some("PAGEMAP"), Opaque [], Nothing;
    /// Signals pending for a process, in old sets.
    Signal => "SIGNAL": "signal-s-" Decimal ".img", LegacyRead,
        Common 0x5925_5647, Some("SIGNAL"), Many ["siginfo_entry"], Nothing;
    /// Signals pending for a thread, in old sets.
    Psignal => "PSIGNAL": "signal-p-" Decimal ".img", LegacyRead,
        Common 0x5925_5647, Some("SIGNAL"), Many ["siginfo_entry"], Nothing;
    /// Open tun devices, in old sets.
    Tunfile => "TUNFILE": "tunfile" Unnumbered ".img", LegacyRead,
        Common 0x5714_3751, Some("TUNFILE"), Many ["tunfile_entry"], Nothing;
    /// Control groups.
    Cgroup => "CGROUP": "cgroup" Unnumbered ".img", WhenNeeded,
        Common 0x5938_3330, Some("CGROUP"), One ["cgroup_entry"], Nothing;
    /// Timerfds, in old sets.
    Timerfd => "TIMERFD": "timerfd" Unnumbered ".img", LegacyRead,
        Common 0x5049_3712, Some("TIMERFD"), Many ["timerfd_entry"], Nothing;
    /// CPU of the dumping host.
    Cpuinfo => "CPUINFO": "cpuinfo" Unnumbered ".img", WhenNeeded,
        Common 0x6140_4013, Some("CPUINFO"), One ["cpuinfo_entry"], Nothing;
    /// Seccomp filters.
    Seccomp => "SECCOMP": "seccomp" Unnumbered ".img", Always,
        Common 0x6441_3049, Some("SECCOMP"), One ["seccomp_entry"], Nothing;
    /// User namespace.
    Userns => "USERNS": "userns-" Decimal ".img", WhenNeeded,
        Common 0x5547_4906, Some("USERNS"), One ["userns_entry"], Nothing;
    /// Connection tracking, as netlink messages.
    NetnfCt => "NETNF_CT": "netns-ct-" Decimal ".img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// Expected connections, as netlink messages.
    NetnfExp => "NETNF_EXP": "netns-exp-" Decimal ".img", WhenNeeded,
        Raw 0, None, Opaque [], Nothing;
    /// Open files of every type.
    Files => "FILES": "files" Unnumbered ".img", Always,
        Common 0x5630_3138, Some("FILES"), Many ["file_entry"], Nothing;
    /// Time namespace, or the host clocks under number 0.
    Timens => "TIMENS": "timens-" Decimal ".img", Always,
        Common 0x4311_4433, Some("TIMENS"), One ["timens_entry"], Nothing;
    /// External pid namespace.
    Pidns => "PIDNS": "pidns-" Decimal ".img", WhenNeeded,
        Common 0x6115_7326, Some("PIDNS"), One ["pidns_entry"], Nothing;
    /// BPF maps, in old sets.
    BpfmapFile => "BPFMAP_FILE": "bpfmap-file" Unnumbered ".img", LegacyRead,
        Common 0x5750_6142, Some("BPFMAP_FILE"), Many ["bpfmap_file_entry"], Nothing;
    /// Contents of BPF maps.
    BpfmapData => "BPFMAP_DATA": "bpfmap-data" Unnumbered ".img", WhenNeeded,
        Common 0x6432_4033, Some("BPFMAP_DATA"), Many ["bpfmap_data_entry"], Lengths(&["keys_bytes", "values_bytes"]);
    /// AppArmor policies.
    Apparmor => "APPARMOR": "apparmor" Unnumbered ".img", WhenNeeded,
        Common 0x5942_3047, Some("APPARMOR"), One ["apparmor_entry"], Nothing;
    /// Pidfds, in old sets.
    Pidfd => "PIDFD": "pidfd" Unnumbered ".img", LegacyRead,
        Common 0x5443_5556, Some("PIDFD"), Many ["pidfd_entry"], Nothing;
    /// Counters and times of the last dump; in the work directory.
    StatsDump => "STATS": "stats-dump" Unnumbered "", Always,
        Service 0x5709_3306, Some("STATS"), One ["stats_entry"], Nothing;
    /// Counters and times of the last restore; in the work directory.
    StatsRestore => "STATS": "stats-restore" Unnumbered "", Always,
        Service 0x5709_3306, Some("STATS"), One ["stats_entry"], Nothing;
    /// Paths found for inodes; in the work directory.
    IrmapCache => "IRMAP_CACHE": "irmap-cache" Unnumbered "", WhenNeeded,
        Service 0x5700_4059, Some("IRMAP_CACHE"), Many ["irmap_cache_entry"], Nothing;
}
