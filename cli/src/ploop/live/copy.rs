//! `firn ploop copy`: a disk through a pipe or into a file, while it is written.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use firn_ploop::copy::{
    CopyError, CopyOptions, CopyPhase, CopyProgress, CopyReport, CopySource, FileTarget,
    OfflineSource, OnlineSource, Rate, ReceiveOptions, ReceiveProgress, Sink, StreamSink,
    TargetFormat, copy, receive, wire,
};
use firn_ploop::descriptor::Guid;
use firn_ploop::folder::{Folder, OpenOptions};
use firn_ploop::{Access, Disk};
use serde_json::{Value, json};

use super::{connect, refused, served};
use crate::output::{Failure, bytes};
use crate::ploop::report::{Steps, answer, failure};
use crate::ploop::words::{session, size};

/// Connections that blocks are read over: while one waits for the disk, another hands its bytes over.
const READERS: u32 = 3;

/// What a received file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// ploop's own
    Expanded,
    /// The disk's bytes
    Raw,
}

/// Options of copy.
#[derive(Debug, Args)]
pub struct CopyArgs {
    /// Send this disk: descriptor, device or mount point; without it, receive
    #[arg(short, value_name = "DISK")]
    pub source: Option<PathBuf>,
    /// Write this image; it is NAME.partial until it is whole
    #[arg(short, value_name = "FILE", required_unless_present = "source")]
    pub destination: Option<PathBuf>,
    /// Shell command that stops all writes, run when the rest is small
    #[arg(short = 'F', value_name = "COMMAND", requires = "source")]
    pub freeze: Option<String>,
    /// Send to this descriptor
    #[arg(
        short,
        value_name = "FD",
        default_value_t = 1,
        conflicts_with = "destination"
    )]
    pub output: i32,
    /// Receive from this descriptor
    #[arg(
        short,
        value_name = "FD",
        default_value_t = 0,
        conflicts_with = "source"
    )]
    pub input: i32,
    /// The other direction: what has arrived is told here
    #[arg(short = 'f', value_name = "FD")]
    pub feedback: Option<i32>,
    /// Name of the copy; one that broke off is continued under its name [default: a random one]
    #[arg(long, value_name = "NAME", value_parser = session)]
    pub session: Option<String>,
    /// Pack with zstd at this level
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=19))]
    pub zstd: Option<i32>,
    /// Send no more than this in a second
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub rate: Option<u64>,
    /// Rounds before writing is stopped, at most
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    pub rounds: u32,
    /// What the image becomes
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Expanded)]
    pub format: Format,
    /// Take no larger disk
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_size: Option<u64>,
    /// Print one JSON object; of a sender to stderr where the stream goes to stdout
    #[arg(long)]
    pub json: bool,
}

/// Copies.
pub fn run(args: &CopyArgs) -> Result<u8, Failure> {
    match &args.source {
        Some(source) => send(args, source),
        None => take(args),
    }
}

fn told(error: &CopyError) -> Failure {
    refused(error, error.exit_code())
}

fn target(args: &CopyArgs, path: &Path) -> FileTarget {
    let format = match args.format {
        Format::Expanded => TargetFormat::Expanded,
        Format::Raw => TargetFormat::Raw,
    };
    FileTarget::new(path, format, args.max_size.unwrap_or(wire::MAX_SIZE))
}

/// A descriptor that the caller handed over.
fn descriptor(number: i32) -> Result<File, Failure> {
    let wrong = |error: std::io::Error| Failure::io(format!("descriptor {number}"), &error);
    firn_ploop::kernel::duplicate(number)
        .map(File::from)
        .map_err(wrong)
}

fn take(args: &CopyArgs) -> Result<u8, Failure> {
    let Some(path) = &args.destination else {
        return Err(Failure::usage("name the image with -d"));
    };
    let mut input = descriptor(args.input)?;
    if input.is_terminal() {
        return Err(Failure::usage("the stream has to come from a pipe"));
    }
    let mut feedback = args.feedback.map(descriptor).transpose()?;
    let options = ReceiveOptions {
        max_size: args.max_size.unwrap_or(wire::MAX_SIZE),
    };
    let back = feedback
        .as_mut()
        .map(|file| file as &mut (dyn Write + Send));
    let mut steps = Steps::of("receiving", args.json);
    let mut show = |at: ReceiveProgress| match at.size_bytes {
        0 => steps.show_bytes(at.data_bytes),
        size => {
            steps.show(at.reached_bytes, size);
        }
    };
    let report = receive(&mut input, back, target(args, path), &options, &mut show);
    drop(steps);
    let report = report.map_err(|error| told(&error))?;
    let object = json!({
        "file": path,
        "data_bytes": report.data_bytes,
        "zero_bytes": report.zero_bytes,
        "barriers": report.barriers,
        "legacy": report.is_legacy,
    });
    let talks = !args.json && args.feedback == Some(1);
    let text = match talks {
        true => String::new(),
        false => format!(
            "{}: {} received\n",
            path.display(),
            bytes(report.data_bytes)
        ),
    };
    answer(args.json, &object, &text)
}

fn send(args: &CopyArgs, disk: &Path) -> Result<u8, Failure> {
    let session = match &args.session {
        Some(session) => session.clone(),
        None => {
            let random = Guid::random()
                .map_err(|error| Failure::io("no random name can be made", &error))?;
            random.to_string().trim_matches(['{', '}']).to_owned()
        }
    };
    let mut source = open_source(disk, &session)?;
    let options = CopyOptions {
        max_rounds: args.rounds,
        ..CopyOptions::new(&session)
    };
    let mut sink: Box<dyn Sink> = match &args.destination {
        Some(path) => Box::new(target(args, path)),
        None => stream(args, &session)?,
    };
    let mut stop = || match &args.freeze {
        Some(command) => run_freeze(command),
        None => Ok(()),
    };
    let mut bars = Bars::new(args.json);
    let report = copy(&mut *source, &mut *sink, &options, &mut stop, &mut |at| {
        bars.show(at);
    });
    drop(bars);
    let report = report.map_err(|error| told(&error))?;
    tell(args, &session, &report)
}

fn open_source(disk: &Path, session: &str) -> Result<Box<dyn CopySource>, Failure> {
    if let Some(record) = served(disk)? {
        let (client, freezer) = (connect(&record)?, connect(&record)?);
        let ahead = (0..READERS).map(|_| connect(&record));
        let ahead = ahead.collect::<Result<Vec<_>, Failure>>()?;
        let mountpoint = record.mountpoint.filter(|_| !record.read_only);
        let online = OnlineSource::new(client, freezer, session, mountpoint);
        let online = online.map_err(|error| told(&error))?;
        return Ok(Box::new(online.read_ahead(ahead)));
    }
    let folder = Folder::view(disk).map_err(|error| failure(&error))?;
    // It may be served where this user can't see it.
    folder
        .must_be_unwritten()
        .map_err(|error| failure(&error))?;
    let opened = folder.open_disk(&OpenOptions::new(Access::ReadOnly));
    let disk: Arc<dyn Disk> = Arc::new(opened.map_err(|error| failure(&error))?.disk);
    Ok(Box::new(OfflineSource::new(disk)))
}

fn stream(args: &CopyArgs, session: &str) -> Result<Box<dyn Sink>, Failure> {
    let output = descriptor(args.output)?;
    if output.is_terminal() {
        return Err(Failure::usage(
            "the stream does not go to a terminal; use -d or a pipe",
        ));
    }
    let feedback = args.feedback.map(descriptor).transpose()?;
    let feedback = feedback.map(|file| Box::new(file) as Box<dyn Read + Send>);
    let rate = Rate::new(args.rate.unwrap_or(0));
    let output = Box::new(output);
    Ok(Box::new(StreamSink::new(
        output, feedback, session, args.zstd, rate,
    )))
}

/// Runs the user's command. Its output must not get into the stream.
fn run_freeze(command: &str) -> Result<(), CopyError> {
    let failed = |what: String| CopyError::Freeze { what };
    let null = File::open("/dev/null").map_err(|error| failed(error.to_string()))?;
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(command).stdin(null);
    shell.stdout(std::io::stderr());
    let status = shell.status().map_err(|error| failed(error.to_string()))?;
    match status.success() {
        true => Ok(()),
        false => Err(failed(format!("'{command}' ended with {status}"))),
    }
}

/// One bar per phase.
struct Bars {
    json: bool,
    phase: Option<(CopyPhase, Steps)>,
}

impl Bars {
    fn new(json: bool) -> Bars {
        Bars { json, phase: None }
    }

    fn show(&mut self, at: CopyProgress) {
        let name = match at.phase {
            CopyPhase::First => "copy",
            CopyPhase::Round => "changes",
            CopyPhase::Frozen => "last changes",
        };
        if self
            .phase
            .as_ref()
            .is_none_or(|(phase, _)| *phase != at.phase)
        {
            self.phase = Some((at.phase, Steps::of(name, self.json)));
        }
        if let Some((_, steps)) = &mut self.phase {
            steps.show(at.done_bytes, at.total_bytes.max(1));
        }
    }
}

fn tell(args: &CopyArgs, session: &str, report: &CopyReport) -> Result<u8, Failure> {
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let rounds: Vec<Value> = report
        .rounds
        .iter()
        .map(|round| json!({ "found_bytes": round.found_bytes, "took_ms": ms(round.took) }))
        .collect();
    let object = json!({
        "session": session,
        "first_bytes": report.first_bytes,
        "first_ms": ms(report.first_took),
        "resumed_bytes": report.resumed_bytes,
        "rounds": rounds,
        "stop": format!("{:?}", report.stop),
        "frozen_bytes": report.frozen_bytes,
        "frozen_ms": ms(report.frozen_took),
        "sent_bytes": report.sent_bytes,
    });
    if args.destination.is_some() {
        let text = format!(
            "{} copied, {} of it frozen for {:.1?}\n",
            bytes(report.first_bytes),
            bytes(report.frozen_bytes),
            report.frozen_took
        );
        return answer(args.json, &object, &text);
    }
    if args.json {
        // A reader who has left does not want to know.
        let _ = writeln!(std::io::stderr(), "{object}");
    }
    Ok(0)
}
