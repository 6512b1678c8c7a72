//! Making a file system on a new disk: `firn ploop init -t`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use firn_ploop::guest::{self, FormatOptions, FsType, gpt};
use firn_ploop::kernel;

use super::bare::{partition_view, with_device};
use super::refused;
use crate::output::Failure;

/// Partitions a new disk and makes a file system on it.
pub fn format(xml: &Path, fs: FsType, options: &FormatOptions) -> Result<(), Failure> {
    with_device(xml, &|device, disk| fill(device, disk, fs, options))
}

fn fill(device: &Path, disk: &File, fs: FsType, options: &FormatOptions) -> Result<(), Failure> {
    let failed = |error| Failure::io(format!("{} can't be partitioned", device.display()), &error);
    let mut random = [0; 32];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(failed)?;
    let size = kernel::block_device_size(disk).map_err(failed)?;
    let partition = gpt::create(disk, size, 1 << 20, random).map_err(failed)?;
    let view = partition_view(disk, partition).map_err(failed)?;
    guest::format(view.path(), fs, options).map_err(|error| refused(&error, error.exit_code()))?;
    view.file().sync_all().map_err(failed)
}
