//! `firn ploop`: a container's disk in a file.
//!
//! Each family of commands stands in its own file; this one only lists them.

mod backup;
mod check;
mod convert;
mod info;
mod init;
mod live;
mod report;
mod resize;
mod rights;
mod snapshot;
mod words;

use clap::{Args, Subcommand};

use crate::output::Failure;

/// Options of ploop.
#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct PloopArgs {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Make a disk: DIR/DiskDescriptor.xml and DIR/root.hds
    ///
    /// The disk is empty unless -t names a file system.
    Init(init::InitArgs),
    /// Make a disk upon another one, which can only be read from then on
    Clone(init::CloneArgs),
    /// Write a descriptor around a base image that is there
    RestoreDescriptor(init::RestoreArgs),
    /// Make a snapshot and print its name
    Snapshot(snapshot::NewArgs),
    /// List the snapshots and their files
    SnapshotList(snapshot::ListArgs),
    /// Go back to a snapshot; what was written since the last one is gone
    SnapshotSwitch(snapshot::OneArgs),
    /// Delete a snapshot; its only child takes its place
    ///
    /// May be interrupted: the next command that changes the disk finishes it.
    SnapshotDelete(snapshot::OneArgs),
    /// Merge the disk's changes, or a snapshot's, into the snapshot below
    #[command(visible_alias = "merge")]
    SnapshotMerge(snapshot::MergeArgs),
    /// Make the disk larger or smaller
    Resize(resize::ResizeArgs),
    /// Arrange the disk anew, or write one state of it into a file
    Convert(convert::ConvertArgs),
    /// Prove that a disk or image is whole, and mend it; status 1 says that it is not
    #[command(alias = "fsck")]
    Check(check::CheckArgs),
    /// Explain a disk: size, format, snapshots, space
    Info(info::InfoArgs),
    /// Write a backup of the disk, mounted or not, which is an image by itself
    Backup(backup::BackupArgs),
    /// Make a disk of a full backup and the incremental ones that followed it
    RestoreBackup(backup::RestoreBackupArgs),
    /// Make a block device of a disk, and mount its file system
    ///
    /// Prints the device. A server stays behind; it is started again should it die, and goes when the
    /// last user of the device has.
    Mount(live::mount::MountArgs),
    /// Mount a snapshot, read-only, beside the running disk
    SnapshotMount(live::mount::SnapshotMountArgs),
    /// Unmount a disk and close its image
    Umount(live::mount::UmountArgs),
    /// List the disks that are mounted
    List(live::mount::ListArgs),
    /// Print what a mounted disk has done, and its server's state
    Stat(live::stat::StatArgs),
    /// Measure how long small requests take
    Ping(live::ping::PingArgs),
    /// Give space back that the file system on a disk does not use
    Compact(live::compact::CompactArgs),
    /// Send a disk through a pipe, or receive one, while it is written
    Copy(live::copy::CopyArgs),
    /// Serve a mounted disk to programs that speak NBD, on a Unix socket
    Nbd(live::nbd::NbdArgs),
    /// What the processes of a disk's server run
    #[command(hide = true)]
    Serve(live::serve::ServeArgs),
}

/// Does it.
pub fn run(args: &PloopArgs) -> Result<u8, Failure> {
    carry_out(&args.task).map_err(rights::explained)
}

fn carry_out(task: &Task) -> Result<u8, Failure> {
    match task {
        Task::Init(args) => init::init(args),
        Task::Clone(args) => init::clone(args),
        Task::RestoreDescriptor(args) => init::restore_descriptor(args),
        Task::Snapshot(args) => snapshot::new(args),
        Task::SnapshotList(args) => snapshot::list(args),
        Task::SnapshotSwitch(args) => snapshot::switch(args),
        Task::SnapshotDelete(args) => snapshot::delete(args),
        Task::SnapshotMerge(args) => snapshot::merge(args),
        Task::Resize(args) => resize::run(args),
        Task::Convert(args) => convert::run(args),
        Task::Check(args) => check::run(args),
        Task::Info(args) => info::run(args),
        Task::Backup(args) => backup::run(args),
        Task::RestoreBackup(args) => backup::restore(args),
        Task::Mount(args) => live::mount::mount(args),
        Task::SnapshotMount(args) => live::mount::snapshot_mount(args),
        Task::Umount(args) => live::mount::umount(args),
        Task::List(args) => live::mount::list(args),
        Task::Stat(args) => live::stat::run(args),
        Task::Ping(args) => live::ping::run(args),
        Task::Compact(args) => live::compact::run(args),
        Task::Copy(args) => live::copy::run(args),
        Task::Nbd(args) => live::nbd::run(args),
        Task::Serve(args) => live::serve::run(args),
    }
}
