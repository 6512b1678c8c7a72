//! `firn ploop resize`.

use clap::Args;
use firn_ploop::Folder;
use firn_ploop::server::Record;
use serde_json::json;

use super::live;
use super::report::{Waiting, answer, failure};
use super::words::{DiskArgs, closed_disk, size};
use crate::output::{Failure, bytes};

/// Options of resize.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// New size: sectors, or a number with K, M, G or T; rounded up to whole clusters
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    size: u64,
    /// Change the image alone; what lies behind a smaller size is lost
    #[arg(long)]
    image_only: bool,
    #[command(flatten)]
    disk: DiskArgs,
}

/// Changes the size.
pub fn run(args: &ResizeArgs) -> Result<u8, Failure> {
    if let Some(record) = live::served(&args.disk.disk)? {
        return run_mounted(args, &record);
    }
    let view = Folder::view(&args.disk.disk).map_err(|error| failure(&error))?;
    let has_contents = !args.image_only && live::resize::has_contents(&view)?;
    let shrinks = args.size < view.descriptor().size_bytes();
    if shrinks && !has_contents && !args.image_only {
        let text = "the disk holds no file system that is known; what it holds would be cut off";
        let hint = "make its contents smaller first, then add --image-only";
        return Err(Failure::usage(text).hint(hint));
    }
    let waiting = Waiting::of("resizing", args.disk.json);
    if has_contents && shrinks {
        live::resize::shrink_contents(view.xml(), args.size)?;
    }
    let mut folder = Folder::open(&args.disk.disk).map_err(|error| failure(&error))?;
    let old = folder.descriptor().size_bytes();
    let resized = if args.size >= old {
        folder.grow(args.size, None, &closed_disk())
    } else {
        folder.shrink(args.size, &closed_disk())
    };
    let new = resized.map_err(|error| failure(&error))?;
    drop(folder);
    if has_contents && !shrinks {
        live::resize::grow_contents(view.xml())?;
    }
    drop(waiting);
    let object = json!({ "old_bytes": old, "new_bytes": new });
    let text = format!("{} -> {}\n", bytes(old), bytes(new));
    answer(args.disk.json, &object, &text)
}

/// Enlarges a mounted disk, and its file system where that is mounted by us.
fn run_mounted(args: &ResizeArgs, record: &Record) -> Result<u8, Failure> {
    let size = |record| {
        let stat = live::connect(record)?.stat();
        stat.map(|stat| stat.size_bytes)
            .map_err(|error| live::refused(&error, error.exit_code()))
    };
    let old = size(record)?;
    if args.size < old {
        let text = "a mounted disk can't be made smaller; unmount it first";
        return Err(Failure::usage(text));
    }
    let waiting = Waiting::of("resizing", args.disk.json);
    live::resize::grow(record, args.size)?;
    drop(waiting);
    let new = size(record)?;
    let object = json!({ "old_bytes": old, "new_bytes": new });
    let text = format!("{} -> {}\n", bytes(old), bytes(new));
    answer(args.disk.json, &object, &text)
}
