//! Every option that CRIU's command line has, and Firn's own, as data.
//!
//! The table lets Firn read a CRIU command line or configuration file token by token, knows which
//! options come later and says so, and tells an option that has no meaning for a command from one
//! that nobody knows.

use self::State::{Here, Later, Removed};
use self::Value::{Flag, Optional, Required};

/// What follows an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// Nothing.
    Flag,
    /// A value, only in the same word (`-v4`, `--verbosity=4`).
    Optional,
    /// A value, in the same word or the next one.
    Required,
}

/// Whether this version acts on an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It does.
    Here,
    /// It does not yet; the text says what holds instead.
    Later(&'static str),
    /// Nobody has it any more; the text says what took its place.
    Removed(&'static str),
}

/// Bits of [`Opt::commands`].
pub const DUMP: u8 = 1;
/// See [`DUMP`].
pub const RESTORE: u8 = 2;
/// See [`DUMP`].
pub const CHECK: u8 = 4;
const ALL: u8 = DUMP | RESTORE | CHECK;
/// Commands of CRIU that this version does not have.
const OTHER: u8 = 0;

/// One option.
#[derive(Debug, Clone, Copy)]
pub struct Opt {
    /// Long name without dashes.
    pub long: &'static str,
    /// Short name.
    pub short: Option<char>,
    /// What follows it.
    pub value: Value,
    /// Whether `--no-LONG` takes it back.
    pub negatable: bool,
    /// Commands that it means something to.
    pub commands: u8,
    /// Whether this version acts on it.
    pub state: State,
}

const fn opt(long: &'static str, value: Value, commands: u8, state: State) -> Opt {
    Opt {
        long,
        short: None,
        value,
        negatable: false,
        commands,
        state,
    }
}

impl Opt {
    const fn short(mut self, short: char) -> Opt {
        self.short = Some(short);
        self
    }

    const fn negatable(mut self) -> Opt {
        self.negatable = true;
        self
    }
}

const NAMESPACES: &str = "tasks in namespaces of their own are refused at dump until then";
const CGROUPS: &str = "tasks come back in the cgroup of the restoring process";
const MEMORY_SERVER: &str = "memory goes to and comes from the image directory";
const DEVICES: &str = "each device is reopened by its own path";

/// The table.
pub const OPTIONS: &[Opt] = &[
    opt("tree", Required, DUMP, Here).short('t'),
    opt("leave-stopped", Flag, DUMP | RESTORE, Here).short('s'),
    opt("leave-running", Flag, DUMP, Here).short('R'),
    opt("restore-detached", Flag, RESTORE, Here)
        .short('d')
        .negatable(),
    opt("restore-sibling", Flag, RESTORE, Here)
        .short('S')
        .negatable(),
    opt("images-dir", Required, ALL, Here).short('D'),
    opt("work-dir", Required, ALL, Here).short('W'),
    opt("log-file", Required, ALL, Here).short('o'),
    opt("root", Required, RESTORE, Here).short('r'),
    opt("help", Flag, ALL, Here).short('h'),
    opt("log-pid", Flag, RESTORE, Here).negatable(),
    opt("version", Flag, ALL, Here).short('V'),
    opt("pidfile", Required, RESTORE, Here),
    opt("action-script", Required, DUMP | RESTORE, Here),
    opt("link-remap", Flag, DUMP, Here).negatable(),
    opt("shell-job", Flag, DUMP | RESTORE, Here)
        .short('j')
        .negatable(),
    opt("prev-images-dir", Required, DUMP, Here),
    opt("track-mem", Flag, DUMP, Here).negatable(),
    opt("exec-cmd", Flag, RESTORE, Here),
    opt("feature", Required, CHECK, Here),
    opt("freeze-cgroup", Required, DUMP, Here),
    opt("ghost-limit", Required, DUMP, Here),
    opt("timeout", Required, DUMP, Here),
    opt("extra", Flag, CHECK, Here).negatable(),
    opt("experimental", Flag, CHECK, Here).negatable(),
    opt("all", Flag, CHECK, Here),
    opt("display-stats", Flag, DUMP | RESTORE, Here).negatable(),
    opt("verbosity", Optional, ALL, Here).short('v'),
    opt("config", Required, ALL, Here),
    opt("no-default-config", Flag, ALL, Here),
    opt("file-validation", Required, DUMP | RESTORE, Here),
    opt("skip-file-rwx-check", Flag, RESTORE, Here).negatable(),
    // Firn's own.
    opt("json", Flag, ALL, Here),
    opt("plan", Flag, RESTORE, Here),
    opt("strict", Flag, RESTORE, Here),
    opt("file-policy", Required, RESTORE, Here),
    // CRIU's that come with later capabilities.
    opt("join-ns", Required, RESTORE, Later(NAMESPACES)).short('J'),
    opt("outside-peer", Required, RESTORE, Here),
    opt("ext-unix-sk", Optional, DUMP | RESTORE, Here).short('x'),
    opt("tcp-established", Flag, DUMP | RESTORE, Here).negatable(),
    opt("skip-in-flight", Flag, DUMP, Here).negatable(),
    opt("tcp-close", Flag, DUMP | RESTORE, Here).negatable(),
    opt("network-lock", Required, DUMP, Here),
    opt("evasive-devices", Flag, DUMP, Later(DEVICES)).negatable(),
    opt("veth-pair", Required, RESTORE, Later(NAMESPACES)),
    opt("file-locks", Flag, DUMP | RESTORE, Here)
        .short('l')
        .negatable(),
    opt("page-server", Flag, DUMP, Later(MEMORY_SERVER)).negatable(),
    opt("address", Required, DUMP, Later(MEMORY_SERVER)),
    opt("port", Required, DUMP, Later(MEMORY_SERVER)),
    opt("ps-socket", Required, DUMP, Later(MEMORY_SERVER)),
    opt("tls", Flag, DUMP, Later(MEMORY_SERVER)).negatable(),
    opt("tls-cacert", Required, DUMP, Later(MEMORY_SERVER)),
    opt("tls-cacrl", Required, DUMP, Later(MEMORY_SERVER)),
    opt("tls-cert", Required, DUMP, Later(MEMORY_SERVER)),
    opt("tls-key", Required, DUMP, Later(MEMORY_SERVER)),
    opt("tls-no-cn-verify", Flag, DUMP, Later(MEMORY_SERVER)),
    opt("stream", Flag, DUMP | RESTORE, Later(MEMORY_SERVER)).negatable(),
    opt(
        "lazy-pages",
        Flag,
        DUMP | RESTORE,
        Later("all memory is filled before tasks run"),
    ),
    opt(
        "auto-dedup",
        Flag,
        DUMP | RESTORE,
        Later("images keep all their pages"),
    )
    .negatable(),
    opt(
        "libdir",
        Required,
        DUMP | RESTORE,
        Later("plugins are given to the library: firn_engine::files::plugin"),
    )
    .short('L'),
    opt(
        "cpu-cap",
        Optional,
        DUMP | RESTORE,
        Later("restore always compares the CPU's features"),
    ),
    opt(
        "force-irmap",
        Flag,
        DUMP,
        Later("watched files are found by handle, else by a walk over their filesystem"),
    )
    .negatable(),
    opt(
        "irmap-scan-path",
        Required,
        DUMP,
        Later("watched files are found by handle, else by a walk over their filesystem"),
    ),
    opt("ext-mount-map", Required, DUMP | RESTORE, Later(NAMESPACES)).short('M'),
    opt("skip-mnt", Required, DUMP, Later(NAMESPACES)),
    opt("enable-fs", Required, DUMP, Later(NAMESPACES)),
    opt("enable-external-sharing", Flag, DUMP, Later(NAMESPACES)),
    opt("enable-external-masters", Flag, DUMP, Later(NAMESPACES)),
    opt("mntns-compat-mode", Flag, RESTORE, Later(NAMESPACES)).negatable(),
    opt("empty-ns", Required, DUMP | RESTORE, Later(NAMESPACES)),
    opt("weak-sysctls", Flag, RESTORE, Later(NAMESPACES)).negatable(),
    opt("manage-cgroups", Optional, DUMP | RESTORE, Later(CGROUPS)),
    opt("cgroup-root", Required, RESTORE, Later(CGROUPS)),
    opt("cgroup-props", Required, DUMP, Later(CGROUPS)),
    opt("cgroup-props-file", Required, DUMP, Later(CGROUPS)),
    opt("cgroup-dump-controller", Required, DUMP, Later(CGROUPS)),
    opt("cgroup-yard", Required, DUMP | RESTORE, Later(CGROUPS)),
    opt("inherit-fd", Required, RESTORE, Here),
    opt("external", Required, DUMP | RESTORE, Here),
    opt("lsm-profile", Required, RESTORE, Here),
    opt(
        "lsm-mount-context",
        Required,
        RESTORE,
        Later("mounts come with namespaces"),
    ),
    opt(
        "unprivileged",
        Flag,
        DUMP | RESTORE,
        Later("'firn check' tells what rights are needed"),
    )
    .negatable(),
    opt(
        "ghost-fiemap",
        Flag,
        DUMP,
        Later("holes of deleted files are found by SEEK_HOLE"),
    )
    .negatable(),
    opt(
        "allow-uprobes",
        Flag,
        DUMP,
        Later("tasks with uprobes are refused"),
    )
    .negatable(),
    opt(
        "close",
        Required,
        ALL,
        Later("close the descriptor in the calling shell: 'firn ... 5>&-'"),
    ),
    opt(
        "deprecated",
        Flag,
        ALL,
        Later("deprecated parts of images are refused"),
    )
    .negatable(),
    // Meant for commands that come later; no meaning here, as in CRIU.
    opt("daemon", Flag, OTHER, Here).negatable(),
    opt("status-fd", Required, OTHER, Here),
    opt("pre-dump-mode", Required, OTHER, Here),
    opt(
        "ms",
        Flag,
        ALL,
        Removed("use 'check --all' to see what is missing"),
    ),
];

/// CRIU's commands that this version does not have.
pub const LATER_COMMANDS: &[&str] = &[
    "pre-dump",
    "lazy-pages",
    "page-server",
    "service",
    "swrk",
    "dedup",
    "cpuinfo",
];

/// Finds an option by its long name.
pub fn by_long(name: &str) -> Option<&'static Opt> {
    OPTIONS.iter().find(|opt| opt.long == name)
}

/// Finds an option by its short name.
pub fn by_short(name: char) -> Option<&'static Opt> {
    OPTIONS.iter().find(|opt| opt.short == Some(name))
}

/// Finds the option that `--no-X` takes back.
pub fn negated(name: &str) -> Option<&'static Opt> {
    by_long(name.strip_prefix("no-")?).filter(|opt| opt.negatable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for (at, opt) in OPTIONS.iter().enumerate() {
            let rest = &OPTIONS[at + 1..];
            assert!(
                rest.iter().all(|other| other.long != opt.long),
                "--{} twice",
                opt.long
            );
            let clash = |other: &Opt| opt.short.is_some() && other.short == opt.short;
            assert!(!rest.iter().any(clash), "-{:?} twice", opt.short);
        }
    }

    #[test]
    fn all_options_of_criu_4_2_are_known() {
        let names = include_str!("../tests/criu-options.txt");
        for line in names.lines() {
            let (name, rest) = line.split_once(' ').expect("name, short, negatable");
            let (short, negatable) = rest.split_once(' ').expect("short, negatable");
            let opt = by_long(name).unwrap_or_else(|| panic!("--{name} is not in the table"));
            let wanted = short.strip_prefix('-').and_then(|s| s.chars().next());
            assert_eq!(opt.short, wanted, "--{name}");
            assert_eq!(opt.negatable, negatable == "yes", "--{name}");
        }
    }
}
