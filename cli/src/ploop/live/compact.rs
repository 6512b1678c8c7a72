//! `firn ploop compact`: gives space back that the file system on a disk does not use.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use clap::Args;
use firn_ploop::guest;
use firn_ploop::server::where_seen_by;
use serde_json::json;

use super::mount::{self, MountArgs};
use super::{connect, must_be_served, refused, served};
use crate::output::{Failure, bytes};
use crate::ploop::report::{Steps, answer};

/// Options of compact.
#[derive(Debug, Args)]
pub struct CompactArgs {
    /// Descriptor, device or mount point
    #[arg(value_name = "DISK")]
    pub disk: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Compacts. A disk that is not mounted is mounted for it.
pub fn run(args: &CompactArgs) -> Result<u8, Failure> {
    if served(&args.disk)?.is_some() {
        return trim(args);
    }
    let dir = std::env::temp_dir().join(format!("firn-compact-{}", std::process::id()));
    let failed = |error| Failure::io(format!("{} can't be made", dir.display()), &error);
    std::fs::create_dir(&dir).map_err(failed)?;
    let mounted = mount::start(&MountArgs {
        mountpoint: Some(dir.clone()),
        ..MountArgs::plain(&args.disk)
    });
    let done = mounted.and_then(|_| {
        let trimmed = trim(args);
        let down = must_be_served(&args.disk).and_then(|record| mount::take_down(&record));
        trimmed.and_then(|code| down.map(|()| code))
    });
    // It is empty unless the unmount failed, which has been told.
    let _ = std::fs::remove_dir(&dir);
    done
}

fn trim(args: &CompactArgs) -> Result<u8, Failure> {
    let record = must_be_served(&args.disk)?;
    let Some(target) = &record.mountpoint else {
        let what = "its file system is not mounted by firn; run fstrim where it is mounted";
        return Err(Failure::usage(what));
    };
    let mut client = connect(&record)?;
    let told = |error: firn_ploop::server::ControlError| refused(&error, error.exit_code());
    let layers = client.stat().map_err(told)?.layers;
    let used = || {
        let blocks = layers
            .iter()
            .filter_map(|layer| std::fs::metadata(layer).ok());
        blocks.map(|meta| meta.blocks() * 512).sum::<u64>()
    };
    let before = used();
    let failed = |error| Failure::io(format!("{} can't be trimmed", target.display()), &error);
    let file = where_seen_by(record.supervisor, || File::open(target));
    let file = file.flatten().map_err(failed)?;
    file.sync_all().map_err(failed)?;
    let mut steps = Steps::of("trimming", args.json);
    let trimmed = guest::trim(&file, &mut |now, all| {
        steps.show(now, all);
    });
    drop(steps);
    let trimmed = trimmed.map_err(failed)?;
    // Space is given back when it is durable that nothing leads to it.
    client.flush().map_err(told)?;
    let after = used();
    let object = json!({ "trimmed_bytes": trimmed, "before_bytes": before, "after_bytes": after });
    let text = format!(
        "{} -> {} on the host ({} trimmed)\n",
        bytes(before),
        bytes(after),
        bytes(trimmed)
    );
    answer(args.json, &object, &text)
}
