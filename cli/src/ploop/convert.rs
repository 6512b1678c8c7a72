//! `firn ploop convert`.

use std::path::{Path, PathBuf};

use clap::Args;
use firn_ploop::descriptor::Guid;
use firn_ploop::folder::{self, Folder, OpenOptions, Target};
use firn_ploop::{Access, Disk, Format};
use serde_json::json;

use super::report::{Steps, answer, failure};
use super::words::{Arrangement, DiskArgs, closed_disk, cluster};
use crate::output::{Failure, bytes};

/// Options of convert.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// How the images are arranged then [default: expanded]
    #[arg(short, long, value_name = "FORMAT", value_enum)]
    format: Option<Arrangement>,
    /// Version of the expanded format; 1 is only read
    #[arg(short = 'v', long = "version-number", value_name = "VERSION", value_parser = ["2"])]
    version: Option<String>,
    /// Cluster: sectors, or a number with K or M [default: as it is]
    #[arg(short = 'b', long, value_name = "CLUSTER", value_parser = cluster)]
    blocksize: Option<u32>,
    /// Write one state into this new file, and leave the disk as it is
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The state that --output writes [default: the current one]
    #[arg(short, long, value_name = "UUID", requires = "output")]
    uuid: Option<Guid>,
    #[command(flatten)]
    disk: DiskArgs,
}

/// Converts.
pub fn run(args: &ConvertArgs) -> Result<u8, Failure> {
    if args.format.is_none() && args.version.is_none() && args.blocksize.is_none() {
        return Err(Failure::usage("nothing is to be converted").hint("add -f, -v or -b"));
    }
    let arrangement = args.format.unwrap_or(Arrangement::Expanded);
    let target = Target {
        format: arrangement.format(),
        preallocation: arrangement.preallocation(),
        cluster_bytes: args.blocksize,
    };
    match &args.output {
        Some(path) => export(args, path, target),
        None => in_place(args, target),
    }
}

fn in_place(args: &ConvertArgs, target: Target) -> Result<u8, Failure> {
    let mut folder = Folder::open(&args.disk.disk).map_err(|error| failure(&error))?;
    let mut steps = Steps::of("converting", args.disk.json);
    let done = folder
        .convert(target, &closed_disk(), &mut |now, all| steps.show(now, all))
        .map_err(|error| failure(&error))?;
    drop(steps);
    let images = done.files.len();
    let object = json!({
        "format": target.format.name(),
        "images": super::init::files(&folder),
        "copied_bytes": done.copied_bytes,
    });
    let text = format!(
        "{}: {} copied in {images} images\n",
        target.format.name(),
        bytes(done.copied_bytes)
    );
    answer(args.disk.json, &object, &text)
}

fn export(args: &ConvertArgs, path: &Path, mut target: Target) -> Result<u8, Failure> {
    let folder = Folder::open(&args.disk.disk).map_err(|error| failure(&error))?;
    // The current state must stand still; a snapshot does.
    let options = match args.uuid {
        Some(_) => OpenOptions {
            snapshot: args.uuid,
            ..OpenOptions::new(Access::ReadOnly)
        },
        None if folder.descriptor().is_sealed() => OpenOptions::new(Access::ReadOnly),
        None => closed_disk(),
    };
    let opened = folder
        .open_disk(&options)
        .map_err(|error| failure(&error))?;
    if target.cluster_bytes.is_none() && target.format == Format::Expanded {
        let cluster = opened.disk.cluster_bytes();
        let fits = cluster.is_power_of_two() && cluster >= 64 << 10;
        target.cluster_bytes = Some(if fits { cluster } else { 1 << 20 });
    }
    let mut steps = Steps::of("converting", args.disk.json);
    let copied = folder::export(&opened.disk, path, target, &mut |now, all| {
        steps.show(now, all)
    });
    drop(steps);
    let closed = opened.disk.close();
    let copied = copied.map_err(|error| failure(&error))?;
    closed.map_err(|error| failure(&error.into()))?;
    let object = json!({
        "format": target.format.name(),
        "file": path.to_string_lossy(),
        "copied_bytes": copied,
    });
    let text = format!("{}: {} copied\n", path.display(), bytes(copied));
    answer(args.disk.json, &object, &text)
}
