//! The command line's definitions: help, man pages and completions all come from here.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{
    Arg, ArgAction, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum,
};
use firn_engine::{FilePolicy, LabelChoice};

use crate::external::{ExternalArgs, InheritArgs};
use crate::normalize::DEFAULT_VERBOSITY;
use crate::options;
use crate::sockets::{SocketDumpArgs, SocketRestoreArgs};

/// Freezes running programs, saves them to files, and brings them back.
#[derive(Debug, Parser)]
#[command(name = "firn", version, about, long_about = None, disable_help_subcommand = true)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Task,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Save a process tree to an image directory
    ///
    /// The tree is stopped, saved and then killed, unless -R or -s says otherwise. When anything goes
    /// wrong, the tasks run on as before and the files written so far are removed.
    Dump(DumpArgs),
    /// Bring a saved process tree back
    ///
    /// Stays in the foreground as the parent of the tree and ends with the status of its root task,
    /// unless --restore-detached is given. When anything goes wrong, whatever was made is removed.
    Restore(RestoreArgs),
    /// Show, decode, encode, check or explain images
    Image(crate::image::ImageArgs),
    /// Tell what this kernel and these privileges can do
    ///
    /// Every feature is probed by using it. The table says what works, what falls back to what, and
    /// what that costs.
    Check(CheckArgs),
    /// Take away the network lock that a dump has left
    ///
    /// After a dump with TCP connections, packets for them are held off until a restore has brought them
    /// back. Who gives the tasks up, or starts the program anew, ends that with this command, in the
    /// network namespace of the dump.
    Unlock(crate::unlock::UnlockArgs),
    /// Keep a container's disk in a file: snapshots, backups, sizes
    Ploop(crate::ploop::PloopArgs),
    /// Freeze, kill and bring back a little world of its own
    Demo(crate::demo::DemoArgs),
    /// Print completions for a shell
    Completions {
        /// Shell to complete for
        shell: clap_complete::Shell,
    },
    /// Write the man pages to a directory
    #[command(hide = true)]
    Man {
        /// Directory for the pages
        dir: PathBuf,
    },
    /// Keeps track of memory between dumps; a dump starts it
    #[command(hide = true)]
    HoldTracker,
    /// Program of the demo's world
    #[command(hide = true)]
    DemoWorld(crate::demo::world::WorldArgs),
}

/// Options of all commands that work on an image directory.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Directory of the images
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    pub images_dir: PathBuf,
    /// Directory of logs, statistics and pid files [default: the image directory]
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    #[command(flatten)]
    /// How to log.
    pub log: LogArgs,
}

impl Common {
    /// The work directory.
    pub fn work_dir(&self) -> PathBuf {
        self.work_dir
            .clone()
            .unwrap_or_else(|| self.images_dir.clone())
    }
}

/// Options of logging, configuration and output.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// Log to this file, relative to the work directory; - is stdout [default: stderr]
    #[arg(short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Messages: 0 none, 1 errors, 2 warnings, 3 information, 4 everything; -v and each further v add one
    #[arg(short, long, value_name = "LEVEL", default_value_t = DEFAULT_VERBOSITY)]
    pub verbosity: u8,
    /// Print one JSON object with the report or the error to stdout
    #[arg(long)]
    pub json: bool,
    /// Read this configuration file instead of the default ones
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Leave the default configuration files out
    #[arg(long)]
    pub no_default_config: bool,
}

/// How a file is recognized at restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Validation {
    /// By its size
    Filesize,
    /// By the build-id of an ELF file, else by its size
    Buildid,
    /// By the time of its last change, and by its size
    Mtime,
}

/// Options of dump.
#[derive(Debug, Args)]
pub struct DumpArgs {
    /// Root of the process tree
    #[arg(short, long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub tree: i32,
    /// Leave the tasks stopped
    #[arg(short = 's', long, overrides_with = "leave_running")]
    pub leave_stopped: bool,
    /// Leave the tasks running
    #[arg(short = 'R', long, overrides_with = "leave_stopped")]
    pub leave_running: bool,
    #[command(flatten)]
    /// Options shared with restore.
    pub common: Common,
    /// Accept a terminal and a session leader outside the tree
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Save locks and leases of files
    #[arg(short = 'l', long)]
    pub file_locks: bool,
    /// Largest deleted file to take into the images, in bytes or with K, M or G [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub ghost_limit: Option<u64>,
    /// Link deleted files back into the file system where they can't be copied
    #[arg(long)]
    pub link_remap: bool,
    /// Give up when stopping the tasks takes longer; 0 waits forever
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u32,
    /// Freeze through this cgroup, which must hold the tree
    #[arg(long, value_name = "PATH")]
    pub freeze_cgroup: Option<PathBuf>,
    /// Earlier dump of the same tree, relative to the image directory; pages that have not been written to since
    /// are left to it, if it was made with --track-mem
    #[arg(long, value_name = "DIR")]
    pub prev_images_dir: Option<PathBuf>,
    /// Track which pages are written to, for a following dump; needs -R or -s
    #[arg(long)]
    pub track_mem: bool,
    /// What is stored to recognize files; size and time of last change always are
    #[arg(long, value_name = "METHOD", value_enum, default_value_t = Validation::Buildid)]
    pub file_validation: Validation,
    /// Shell command to run at each stage; may repeat, the last one runs first
    #[arg(long, value_name = "COMMAND")]
    pub action_script: Vec<OsString>,
    /// Print statistics
    #[arg(long)]
    pub display_stats: bool,
    #[command(flatten)]
    /// What is done with sockets.
    pub sockets: SocketDumpArgs,
    #[command(flatten)]
    /// Objects that tasks outside have, too.
    pub external: ExternalArgs,
}

/// Options of restore.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    /// Options shared with dump.
    pub common: Common,
    /// Leave when the tree runs; it gets the parent that orphans get
    #[arg(short = 'd', long)]
    pub restore_detached: bool,
    /// Make the root task a child of this program's parent; needs --restore-detached
    #[arg(short = 'S', long)]
    pub restore_sibling: bool,
    /// Leave the tasks stopped
    #[arg(short = 's', long)]
    pub leave_stopped: bool,
    /// Refuse what can't come back exactly as it was, instead of reporting it
    #[arg(long)]
    pub strict: bool,
    /// Confine the tasks that were confined by this label: apparmor:PROFILE, selinux:CONTEXT or none
    #[arg(long, value_name = "TYPE:NAME")]
    pub lsm_profile: Option<LabelChoice>,
    /// Accept a terminal and a session leader outside the tree
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Does nothing: locks that are in the images are always set again
    #[arg(short = 'l', long)]
    pub file_locks: bool,
    /// Write the pid of the root task to this file, relative to the work directory
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Root directory of the restored tree
    #[arg(short, long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Accept files whose permission bits have changed
    #[arg(long)]
    pub skip_file_rwx_check: bool,
    /// How files are recognized
    #[arg(long, value_name = "METHOD", value_enum, default_value_t = Validation::Buildid)]
    pub file_validation: Validation,
    /// What may have changed about files by their paths
    #[arg(
        help = "What may have changed about files by their paths in the images: PATTERN=exact, \
                PATTERN=grown (it may be longer), PATTERN=build-id or PATTERN=ignore; * stands for any text; \
                may repeat, the first that fits counts"
    )]
    #[arg(long, value_name = "PATTERN=POLICY", value_parser = file_policy)]
    pub file_policy: Vec<(String, FilePolicy)>,
    /// Shell command to run at each stage; may repeat, the last one runs first
    #[arg(long, value_name = "COMMAND")]
    pub action_script: Vec<OsString>,
    /// Run COMMAND in this program's place, as the parent of the restored tree
    #[arg(long, requires = "command")]
    pub exec_cmd: bool,
    /// Put the pid of the task that a line is about into the log
    #[arg(long)]
    pub log_pid: bool,
    /// Print statistics
    #[arg(long)]
    pub display_stats: bool,
    /// Print the programs that would rebuild the tree, and make nothing
    #[arg(long)]
    pub plan: bool,
    #[command(flatten)]
    /// What is done with sockets.
    pub sockets: SocketRestoreArgs,
    #[command(flatten)]
    /// Descriptors in the place of objects.
    pub inherit: InheritArgs,
    /// Command of --exec-cmd
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Options of check.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Probe only this feature; status 0 says that it works
    #[arg(long, value_name = "NAME")]
    pub feature: Option<String>,
    /// Also probe what only some programs need
    #[arg(long)]
    pub extra: bool,
    /// Also probe what later capabilities will use
    #[arg(long)]
    pub experimental: bool,
    /// Probe everything
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    /// Taken for the configuration files' sake.
    pub common: Common,
}

/// Parses the words of a command line.
///
/// Where it is short of nothing, the definitions of the one command do, and to define all the others would take
/// longer than the rest of a program's start.
///
/// # Errors
/// What is wrong with it, or a wish for help, out of all the definitions.
pub fn parse(words: &[OsString]) -> Result<Cli, clap::Error> {
    let command = match words.get(1).and_then(|name| name.to_str()) {
        Some("dump") => parse_one("dump", words).map(Task::Dump),
        Some("restore") => parse_one("restore", words).map(Task::Restore),
        _ => None,
    };
    match command {
        Some(command) => Ok(Cli { command }),
        None => Cli::from_arg_matches(&definitions().try_get_matches_from(words)?),
    }
}

fn parse_one<T: Args>(name: &'static str, words: &[OsString]) -> Option<T> {
    let command = with_negations(T::augment_args(Command::new(name)));
    let matches = command.try_get_matches_from(&words[1..]).ok()?;
    T::from_arg_matches(&matches).ok()
}

/// The definitions, with the `--no-X` forms that CRIU has.
pub fn definitions() -> Command {
    let mut command = Cli::command();
    for name in ["dump", "restore", "check"] {
        command = command.mut_subcommand(name, with_negations);
    }
    command
}

fn with_negations(command: Command) -> Command {
    let mut command = command.args_override_self(true);
    let flags: Vec<String> = command
        .get_arguments()
        .filter_map(|arg| arg.get_long())
        .filter(|long| options::by_long(long).is_some_and(|opt| opt.negatable))
        .map(str::to_owned)
        .collect();
    for long in &flags {
        let id = long.replace('-', "_");
        let negation = format!("no-{long}");
        let arg = Arg::new(negation.clone())
            .long(negation)
            .action(ArgAction::SetTrue)
            .overrides_with(id)
            .hide(true);
        command = command.arg(arg);
    }
    let list = flags.join(", --no-");
    command.after_help(format!("Taken back by the later of two: --no-{list}"))
}

fn file_policy(text: &str) -> Result<(String, FilePolicy), String> {
    let (pattern, policy) = text.rsplit_once('=').ok_or("expected PATTERN=POLICY")?;
    let policy = match policy {
        "exact" => FilePolicy::Exact,
        "grown" => FilePolicy::Grown,
        "build-id" => FilePolicy::BuildId,
        "ignore" => FilePolicy::Ignore,
        _ => return Err("the policy is exact, grown, build-id or ignore".to_owned()),
    };
    Ok((pattern.to_owned(), policy))
}

/// Bytes, with CRIU's suffixes.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "expected bytes, or a number and K, M or G")?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "that is too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Cli {
        let words = std::iter::once("firn").chain(line.split_whitespace());
        let words: Vec<OsString> = words.map(OsString::from).collect();
        super::parse(&words).unwrap()
    }

    fn restore(line: &str) -> RestoreArgs {
        match parse(line).command {
            Task::Restore(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn dump(line: &str) -> DumpArgs {
        match parse(line).command {
            Task::Dump(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definitions_hold_together() {
        definitions().debug_assert();
    }

    #[test]
    fn every_option_of_the_table_that_is_here_is_defined() {
        let definitions = definitions();
        let commands = [
            ("dump", options::DUMP),
            ("restore", options::RESTORE),
            ("check", options::CHECK),
        ];
        for (name, bit) in commands {
            let command = definitions.find_subcommand(name).unwrap();
            let longs: Vec<&str> = command.get_arguments().filter_map(Arg::get_long).collect();
            let here =
                |opt: &&options::Opt| opt.commands & bit != 0 && opt.state == options::State::Here;
            for opt in options::OPTIONS.iter().filter(here) {
                let built_in = matches!(opt.long, "help" | "version");
                assert!(
                    built_in || longs.contains(&opt.long),
                    "{name} lacks --{}",
                    opt.long
                );
            }
            for long in longs.iter().filter(|long| !long.starts_with("no-")) {
                let known = options::by_long(long).is_some_and(|opt| opt.commands & bit != 0);
                assert!(known, "--{long} of {name} is not in the table");
            }
        }
    }

    #[test]
    fn the_last_one_wins() {
        let stopped = dump("dump -t 1 -R -s");
        assert!(stopped.leave_stopped && !stopped.leave_running);
        let running = dump("dump -t 1 -s -R -R");
        assert!(running.leave_running && !running.leave_stopped);
        assert!(!restore("restore -d --no-restore-detached").restore_detached);
        assert!(restore("restore --no-restore-detached -d").restore_detached);
        assert_eq!(dump("dump --tree=1 --tree=2").tree, 2);
    }

    #[test]
    fn lists_add_up() {
        assert_eq!(
            dump("dump -t 1 --action-script=a --action-script=b")
                .action_script
                .len(),
            2
        );
    }

    #[test]
    fn policies_of_files() {
        let policy = |text| file_policy(text).map(|(_, policy)| policy);
        assert_eq!(policy("/var/log/*=grown"), Ok(FilePolicy::Grown));
        assert_eq!(policy("/a=b=ignore"), Ok(FilePolicy::Ignore));
        assert!(policy("/a").is_err() && policy("/a=").is_err());
    }

    #[test]
    fn sizes() {
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("2M"), Ok(2 << 20));
        assert_eq!(size("1G"), Ok(1 << 30));
        assert!(size("").is_err() && size("M").is_err() && size("1T").is_err());
        assert!(size("99999999999999999G").is_err());
    }
}
