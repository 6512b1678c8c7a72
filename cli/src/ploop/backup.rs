//! `firn ploop backup`.

use std::io::{BufWriter, IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use firn_ploop::folder::{self, Backup, BackupReport, Folder, PartialFile};
use serde_json::json;

use super::live;
use super::report::{Steps, answer, failure};
use super::words::{DiskArgs, closed_disk};
use crate::output::{Failure, bytes};

/// Options of backup.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// Only what changed since the last backup
    #[arg(short, long)]
    incremental: bool,
    /// Write to this new file; - is stdout
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    disk: DiskArgs,
}

/// Options of restore-backup.
#[derive(Debug, Args)]
pub struct RestoreBackupArgs {
    /// The full backup and the incremental ones that followed it, in their order
    #[arg(value_name = "BACKUP", required = true)]
    backups: Vec<PathBuf>,
    /// Directory of the new disk; made where it is missing
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Writes a backup.
pub fn run(args: &BackupArgs) -> Result<u8, Failure> {
    let kind = match args.incremental {
        true => Backup::Incremental,
        false => Backup::Full,
    };
    if args.output.as_os_str() == "-" {
        return to_stdout(args, kind);
    }
    let out = PartialFile::begin(&args.output).map_err(|error| failure(&error))?;
    let report = write(args, kind, &mut BufWriter::new(out.file()))?;
    out.finish().map_err(|error| failure(&error))?;
    let object = json!({
        "file": args.output.to_string_lossy(),
        "clusters": report.clusters,
        "bytes": report.bytes,
        "since": report.since.map(|guid| guid.to_string()),
        "next": report.next.to_string(),
    });
    let text = format!("{}: {}\n", args.output.display(), bytes(report.bytes));
    answer(args.disk.json, &object, &text)
}

/// Makes a disk of backups.
pub fn restore(args: &RestoreBackupArgs) -> Result<u8, Failure> {
    let mut steps = Steps::of("restoring", args.json);
    let made = folder::restore_backup(&args.backups, &args.dir, &mut |now, all| {
        steps.show(now, all)
    });
    drop(steps);
    super::init::tell(&made.map_err(|error| failure(&error))?, args.json)
}

fn to_stdout(args: &BackupArgs, kind: Backup) -> Result<u8, Failure> {
    if args.disk.json {
        return Err(Failure::usage(
            "the backup and JSON can't both go to stdout",
        ));
    }
    if std::io::stdout().is_terminal() {
        return Err(Failure::usage("a backup is nothing for a terminal").hint("use a pipe"));
    }
    let mut out = BufWriter::new(std::io::stdout().lock());
    write(args, kind, &mut out).map(|_| 0)
}

fn write(args: &BackupArgs, kind: Backup, out: &mut dyn Write) -> Result<BackupReport, Failure> {
    let mut steps = Steps::of("backing up", args.disk.json);
    if let Some(record) = live::served(&args.disk.disk)? {
        let backup =
            live::connect(&record)?.backup(kind, out, &mut |now, all| steps.show(now, all));
        return backup.map_err(|error| live::refused(&error, error.exit_code()));
    }
    let mut folder = Folder::open(&args.disk.disk).map_err(|error| failure(&error))?;
    folder
        .backup(kind, None, &closed_disk(), out, &mut |now, all| {
            steps.show(now, all)
        })
        .map_err(|error| failure(&error))
}
