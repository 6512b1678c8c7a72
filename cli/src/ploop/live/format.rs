//! Making a file system on a new disk: `firn ploop init -t`.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::Path;

use firn_ploop::device::Choice;
use firn_ploop::device::loopdev::{LoopDevice, LoopOptions};
use firn_ploop::guest::{self, FormatOptions, FsType, gpt};
use firn_ploop::kernel;
use firn_ploop::server::{Registry, ServeConfig, THREADS};

use super::{mount, refused};
use crate::output::Failure;

/// Partitions a new disk and makes a file system on it.
pub fn format(xml: &Path, fs: FsType, options: &FormatOptions) -> Result<(), Failure> {
    let config = ServeConfig {
        source: mount::source(xml, None, None, None)?,
        read_only: false,
        recover: false,
        threads: THREADS,
        direct_io: true,
        run_dir: Registry::from_environment().dir().to_owned(),
        mount: None,
        device: Choice::Auto,
    };
    let record = mount::launch(&config)?;
    let made = match &record.device {
        Some(device) => on_device(device, fs, options),
        None => Err(Failure::new("refused", "the disk has no device")),
    };
    let down = mount::take_down(&record);
    made.and(down)
}

fn on_device(device: &Path, fs: FsType, options: &FormatOptions) -> Result<(), Failure> {
    let failed = |error| Failure::io(format!("{} can't be partitioned", device.display()), &error);
    let mut random = [0; 32];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(failed)?;
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .map_err(failed)?;
    let size = kernel::block_device_size(&disk).map_err(failed)?;
    let partition = gpt::create(&disk, size, 1 << 20, random).map_err(failed)?;
    let loop_options = LoopOptions {
        offset: partition.offset,
        len_bytes: partition.len_bytes,
        read_only: false,
        direct_io: true,
        label: "firn-ploop partition",
    };
    let view = LoopDevice::attach(&disk, &loop_options).map_err(failed)?;
    guest::format(view.path(), fs, options).map_err(|error| refused(&error, error.exit_code()))?;
    view.file().sync_all().map_err(failed)
}
