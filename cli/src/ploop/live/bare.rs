//! The device of a disk that is mounted for one piece of work, without its file system.

use std::fs::File;
use std::io;
use std::path::Path;

use firn_ploop::device::Choice;
use firn_ploop::device::loopdev::{LoopDevice, LoopOptions};
use firn_ploop::guest::Partition;
use firn_ploop::server::{Registry, ServeConfig, THREADS};

use super::mount;
use crate::output::Failure;

/// What is done with a device: its path, and the device open for reading and writing.
pub type Work<'a> = &'a dyn Fn(&Path, &File) -> Result<(), Failure>;

/// Does something with the device of a disk that is mounted for it.
pub fn with_device(xml: &Path, work: Work<'_>) -> Result<(), Failure> {
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
    let done = match &record.device {
        Some(device) => {
            let failed =
                |error| Failure::io(format!("{} can't be opened", device.display()), &error);
            let open = File::options().read(true).write(true).open(device);
            open.map_err(failed).and_then(|disk| work(device, &disk))
        }
        None => Err(Failure::new("refused", "the disk has no device")),
    };
    let down = mount::take_down(&record);
    done.and(down)
}

/// A device of a partition alone.
pub fn partition_view(disk: &File, partition: Partition) -> io::Result<LoopDevice> {
    let options = LoopOptions {
        offset: partition.offset,
        len_bytes: partition.len_bytes,
        read_only: false,
        direct_io: true,
        label: "firn-ploop partition",
    };
    LoopDevice::attach(disk, &options)
}
