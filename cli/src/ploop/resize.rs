//! `firn ploop resize`.

use clap::Args;
use firn_ploop::Folder;
use serde_json::json;

use super::report::{answer, failure};
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
    let mut folder = Folder::open(&args.disk.disk).map_err(|error| failure(&error))?;
    let old = folder.descriptor().size_bytes();
    let resized = if args.size >= old {
        folder.grow(args.size, None, &closed_disk())
    } else if args.image_only {
        folder.shrink(args.size, &closed_disk())
    } else {
        let text = "a file system in the disk would be cut off";
        let hint = "make it smaller first, then add --image-only";
        return Err(Failure::usage(text).hint(hint));
    };
    let new = resized.map_err(|error| failure(&error))?;
    let object = json!({ "old_bytes": old, "new_bytes": new });
    let text = format!("{} -> {}\n", bytes(old), bytes(new));
    answer(args.disk.json, &object, &text)
}
