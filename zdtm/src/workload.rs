//! What the runner knows about a workload before it starts it.

use anyhow::Result;

use crate::Stage;

/// One conformance workload.
#[derive(Debug)]
pub struct Workload {
    /// `area/name`, unique.
    pub name: &'static str,
    /// What state it holds, in a few words.
    pub about: &'static str,
    /// The program.
    pub body: Body,
    /// What a dump of it must come to.
    pub expect: Expect,
    /// What the machine must have for it.
    pub needs: &'static [Need],
    /// Whether it gets a controlling terminal from outside of its tree, as a job of a shell has
    /// one; dump and restore are then told `--shell-job`.
    pub shell_job: bool,
    /// More options for the dump.
    pub dump_options: &'static [&'static str],
    /// More options for the restore.
    pub restore_options: &'static [&'static str],
    /// What its standard input is, whose other side the runner holds.
    pub outside: Option<Outside>,
    /// Aspects of the runner's view from outside that change by themselves while it waits, such as
    /// `maps` of a program that goes on allocating.
    pub moves: &'static [&'static str],
    /// Takes so long that it runs only when it is asked for by its whole name.
    pub heavy: bool,
    /// The limit of descriptors (RLIMIT_NOFILE) that the engine gets.
    pub descriptor_limit: Option<usize>,
}

/// An object whose other side is outside of the tree: the runner declares it external to a dump, gives it to
/// the restore, and at the end lets the tree read [`OUTSIDE_WORDS`] from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outside {
    /// The reading end of a pipe.
    Pipe,
    /// A pseudo terminal.
    Terminal,
    /// A file, in whose place the restore is given another one.
    File,
    /// A connected unix socket without a name.
    Socket,
    /// A TCP connection, in whose place the restore is given another one.
    Connection,
}

/// What a tree reads from outside, at the end.
pub const OUTSIDE_WORDS: &[u8] = b"from outside\n";

/// The program of a workload.
#[derive(Debug, Clone, Copy)]
pub enum Body {
    /// A function of this binary.
    Native(fn(&Stage) -> Result<()>),
    /// A script, run by an interpreter with the instance's directory as its argument.
    Script {
        /// The interpreter's name, looked up in `PATH`.
        interpreter: &'static str,
        /// The text of the script.
        source: &'static str,
    },
}

/// What a dump must come to.
#[derive(Debug, Clone, Copy)]
pub enum Expect {
    /// Dumped and restored.
    Restored,
    /// Refused: a non-zero exit, every one of these words in the message, the tree untouched.
    Refused(&'static [&'static str]),
}

/// Something the machine must have, or the workload is skipped by name and reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// AVX registers.
    Avx,
    /// AVX-512 registers, with 64-bit masks.
    Avx512,
    /// The FSGSBASE instructions.
    FsGsBase,
    /// This many free huge pages of 2 MiB; the runner reserves them and puts the number back.
    HugePages(u64),
    /// A program in `PATH`.
    Program(&'static str),
    /// Root's rights, which it does not have when the runner is told `--uid`.
    Root,
    /// `MADV_GUARD_INSTALL`, Linux 6.13.
    GuardRegions,
    /// A system call, by number and name, that with zeros only does nothing.
    Call(i64, &'static str),
    /// Shadow stacks, of CPU and kernel.
    ShadowStack,
    /// The CPUID instruction can be forbidden.
    CpuidFaulting,
    /// Names of mappings, CONFIG_ANON_VMA_NAME.
    VmaNames,
    /// A file.
    File(&'static str),
    /// A console that can be opened.
    Console,
    /// A protocol that the kernel can run on a TCP connection.
    Ulp(&'static str),
    /// A file system that the kernel knows.
    FileSystem(&'static str),
}

impl Workload {
    /// Makes a workload that is a function and needs nothing special.
    pub const fn new(
        name: &'static str,
        about: &'static str,
        run: fn(&Stage) -> Result<()>,
    ) -> Self {
        Workload {
            name,
            about,
            body: Body::Native(run),
            expect: Expect::Restored,
            needs: &[],
            shell_job: false,
            dump_options: &[],
            restore_options: &[],
            outside: None,
            moves: &[],
            heavy: false,
            descriptor_limit: None,
        }
    }

    /// Makes a workload that is a script.
    pub const fn script(
        name: &'static str,
        about: &'static str,
        interpreter: &'static str,
        source: &'static str,
    ) -> Self {
        Workload {
            body: Body::Script {
                interpreter,
                source,
            },
            ..Workload::new(name, about, |_| Ok(()))
        }
    }

    /// Says what the machine must have.
    pub const fn needs(mut self, needs: &'static [Need]) -> Self {
        self.needs = needs;
        self
    }

    /// Makes it a job of a shell, see [`Workload::shell_job`].
    pub const fn shell_job(mut self) -> Self {
        self.shell_job = true;
        self.dump_options = &["--shell-job"];
        self
    }

    /// Gives the dump more options.
    pub const fn dump_options(mut self, options: &'static [&'static str]) -> Self {
        self.dump_options = options;
        self
    }

    /// Gives the restore more options.
    pub const fn restore_options(mut self, options: &'static [&'static str]) -> Self {
        self.restore_options = options;
        self
    }

    /// Makes its standard input an object that has another side outside.
    pub const fn outside(mut self, outside: Outside) -> Self {
        self.outside = Some(outside);
        self
    }

    /// Names aspects that change by themselves, see [`Workload::moves`].
    pub const fn moves(mut self, aspects: &'static [&'static str]) -> Self {
        self.moves = aspects;
        self
    }

    /// Leaves it out of runs that don't ask for it by name, see [`Workload::heavy`].
    pub const fn heavy(mut self) -> Self {
        self.heavy = true;
        self
    }

    /// Gives the engine no more descriptors than this, see [`Workload::descriptor_limit`].
    pub const fn descriptor_limit(mut self, limit: usize) -> Self {
        self.descriptor_limit = Some(limit);
        self
    }

    /// Says that a dump must be refused with a message that has all of `words` in it.
    pub const fn refused(mut self, words: &'static [&'static str]) -> Self {
        self.expect = Expect::Refused(words);
        self
    }

    /// Reads why it cannot run on this machine, or `None` when it can.
    pub fn unmet_need(&self) -> Option<String> {
        if let Body::Script { interpreter, .. } = self.body
            && find_program(interpreter).is_none()
        {
            return Some(format!("no {interpreter} in PATH"));
        }
        self.needs.iter().find_map(Need::unmet)
    }
}

impl Need {
    /// Reads why the need is not met, or `None` when it is.
    pub fn unmet(&self) -> Option<String> {
        let (met, reason) = match self {
            Need::Avx => (std::is_x86_feature_detected!("avx"), "no AVX".to_owned()),
            Need::Avx512 => (
                std::is_x86_feature_detected!("avx512bw"),
                "no AVX-512".to_owned(),
            ),
            Need::FsGsBase => (crate::sys::has_fsgsbase(), "no FSGSBASE".to_owned()),
            Need::HugePages(count) => {
                let free = free_huge_pages();
                (
                    free >= *count,
                    format!("{free} free huge pages, {count} needed"),
                )
            }
            Need::Program(name) => (find_program(name).is_some(), format!("no {name} in PATH")),
            Need::Call(number, name) => {
                let result = crate::sys::call_plain(*number, [0; 6]);
                let errno = result.err().and_then(|error| error.raw_os_error());
                (errno != Some(libc::ENOSYS), format!("no {name}"))
            }
            Need::ShadowStack => match crate::sys::no_shadow_stacks() {
                None => (true, String::new()),
                Some(error) => (false, format!("no shadow stacks here: {error}")),
            },
            Need::FileSystem(name) => {
                let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
                let is_known = known.split_whitespace().any(|word| word == *name);
                (is_known, format!("the kernel has no {name}"))
            }
            Need::Console => (
                crate::sys::open("/dev/console", libc::O_RDWR | libc::O_NOCTTY).is_ok(),
                "no /dev/console that can be opened".to_owned(),
            ),
            Need::Ulp(name) => (
                crate::sys::has_ulp(name),
                format!("the kernel can't run {name} on a connection"),
            ),
            Need::File(name) => (std::path::Path::new(name).exists(), format!("no {name}")),
            Need::CpuidFaulting => (
                crate::sys::call_plain(libc::SYS_arch_prctl, [0x1012, 1, 0, 0, 0, 0]).is_ok(),
                "the CPU can't forbid CPUID".to_owned(),
            ),
            Need::VmaNames => (
                crate::sys::has_vma_names(),
                "the kernel keeps no names of mappings".to_owned(),
            ),
            Need::Root => (true, String::new()),
            Need::GuardRegions => (
                crate::sys::has_guard_regions(),
                "no MADV_GUARD_INSTALL".to_owned(),
            ),
        };
        (!met).then_some(reason)
    }
}

/// Finds a program in `PATH`; shims that only start another program are passed over, since the
/// workload has to be the interpreter itself.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file() && !file.parent().is_some_and(|dir| dir.ends_with("shims")))
}

fn free_huge_pages() -> u64 {
    std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// Makes a directory name out of a workload's name.
pub fn directory_name(name: &str) -> String {
    name.replace('/', ".")
}

/// Tells whether `name` matches a pattern: `*` stands for any text, and a pattern without one
/// matches anywhere in the name.
pub fn matches(pattern: &str, name: &str) -> bool {
    if !pattern.contains('*') {
        return name.contains(pattern);
    }
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_match_whole_names_with_stars_and_parts_without() {
        assert!(matches("tree/*", "tree/chain"));
        assert!(matches("*chain", "tree/chain"));
        assert!(matches("t*e/*n", "tree/chain"));
        assert!(matches("chain", "tree/chain"));
        assert!(matches("*", ""));
        assert!(!matches("tree/*x", "tree/chain"));
        assert!(!matches("a*a", "a"));
        assert!(!matches("files", "tree/chain"));
        assert!(!matches("ree/*", "tree/chain"));
    }
}
