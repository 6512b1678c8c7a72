//! `firn ploop resize` with the file system on the disk.

use std::io;
use std::path::Path;

use firn_ploop::device::loopdev::LoopDevice;
use firn_ploop::device::{self, View};
use firn_ploop::folder::{Folder, OpenOptions};
use firn_ploop::guest::gpt::{self, OpenDisk};
use firn_ploop::guest::{self, FsType, GuestError};
use firn_ploop::server::{Record, where_seen_by};
use firn_ploop::{Access, Disk, kernel};

use super::bare::{partition_view, with_device};
use super::{connect, refused};
use crate::output::Failure;
use crate::ploop::report::failure;

/// Enlarges a mounted disk and the file system that is mounted from it.
pub fn grow(record: &Record, size_bytes: u64) -> Result<(), Failure> {
    let mut client = connect(record)?;
    let len = client
        .grow(size_bytes)
        .map_err(|error| refused(&error, error.exit_code()))?;
    let Some(device) = &record.device else {
        return Ok(());
    };
    let failed = |error| Failure::io(format!("{} can't be resized", device.display()), &error);
    let view = View {
        offset: record.partition_offset,
        limit: None,
    };
    device::resize(device, view, size_bytes).map_err(failed)?;
    let (Some(target), Some(fs_type)) = (&record.mountpoint, &record.fs_type) else {
        return Ok(());
    };
    let grown = where_seen_by(record.supervisor, || {
        guest::grow_fs(device, target, fs_type, len)
    });
    grown.map_err(failed)?.map_err(|error| {
        told(&error).hint(
            "the disk has its new size, the file system not yet; a mounted ext4 grows only with \
             CAP_SYS_RESOURCE: unmount and run the command once more",
        )
    })
}

/// Whether a disk that is not mounted holds a partition table or a known file system.
pub fn has_contents(folder: &Folder) -> Result<bool, Failure> {
    let opened = folder.open_disk(&OpenOptions::new(Access::ReadOnly));
    let disk = opened.map_err(|error| failure(&error))?.disk;
    let place = OpenDisk(&disk);
    let look = || {
        let has_table = gpt::first_partition(&place, disk.size_bytes())?.is_some();
        Ok(has_table || guest::fs_type_in(&place, 0)?.is_some())
    };
    look().map_err(|error| Failure::io("the disk can't be looked at", &error))
}

/// Lets the partition and the ext file system of a disk that is not mounted fill it. Other file systems
/// grow when they are mounted.
pub fn grow_contents(xml: &Path) -> Result<(), Failure> {
    with_device(xml, &|device, disk| {
        let whole = kernel::block_device_size(disk).map_err(failed(device))?;
        let partition = gpt::fit(disk, whole).map_err(failed(device))?;
        let view = partition
            .map(|found| partition_view(disk, found).map_err(failed(device)))
            .transpose()?;
        let path = view.as_ref().map_or(device, LoopDevice::path);
        if guest::fs_type_of(path).map_err(|error| told(&error))? == FsType::Ext4 {
            guest::grow_unmounted_fs(path).map_err(|error| told(&error))?;
        }
        view.map_or(Ok(()), |view| view.file().sync_all())
            .map_err(failed(device))
    })
}

/// Makes the file system of a disk that is not mounted smaller, and its partition with it, so that
/// nothing lies behind `size_bytes`.
pub fn shrink_contents(xml: &Path, size_bytes: u64) -> Result<(), Failure> {
    with_device(xml, &|device, disk| {
        let whole = kernel::block_device_size(disk).map_err(failed(device))?;
        let Some(partition) = gpt::first_partition(disk, whole).map_err(failed(device))? else {
            return shrink_fs(device, size_bytes);
        };
        let view = partition_view(disk, partition).map_err(failed(device))?;
        let room = size_bytes.saturating_sub(partition.offset + (1 << 20));
        shrink_fs(view.path(), room)?;
        view.file().sync_all().map_err(failed(device))?;
        drop(view);
        gpt::fit(disk, size_bytes).map_err(failed(device))?;
        Ok(())
    })
}

fn shrink_fs(device: &Path, size_bytes: u64) -> Result<(), Failure> {
    let fs = guest::fs_type_of(device).map_err(|error| told(&error))?;
    guest::shrink_fs(device, fs.name(), size_bytes).map_err(|error| told(&error))
}

fn told(error: &GuestError) -> Failure {
    refused(error, error.exit_code())
}

fn failed(device: &Path) -> impl Fn(io::Error) -> Failure + '_ {
    |error| Failure::io(format!("{} can't be resized", device.display()), &error)
}
