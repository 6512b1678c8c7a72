//! `firn ploop init`, `clone`, `restore-descriptor`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use firn_ploop::descriptor::Guid;
use firn_ploop::folder::{self, Folder, NewDisk};
use firn_ploop::format::expanded::DEFAULT_CLUSTER;
use firn_ploop::guest::{FormatOptions, FsType};
use serde_json::{Value, json};

use super::live;
use super::report::{answer, failure};
use super::words::{Arrangement, cluster, size};
use crate::output::{Failure, bytes};

/// Options of init.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Size: sectors, or a number with K, M, G or T; rounded up to whole clusters
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    size: u64,
    /// Make a partition and this file system on it, by the host's mkfs
    #[arg(short = 't', long = "fstype", value_name = "TYPE", value_enum, default_value_t = Contents::None)]
    contents: Contents,
    /// Label of the file system
    #[arg(short = 'L', long, value_name = "LABEL")]
    label: Option<String>,
    /// Bytes of the file system's blocks
    #[arg(short = 'B', long, value_name = "BYTES")]
    fs_block: Option<u32>,
    /// Write all of the file system's tables now
    #[arg(short, long)]
    nolazy: bool,
    /// How the image is arranged
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Arrangement::Expanded)]
    format: Arrangement,
    /// Cluster: sectors, or a number with K or M; a power of two from 64K to 64M [default: 1M]
    #[arg(short = 'b', long, value_name = "CLUSTER", value_parser = cluster)]
    blocksize: Option<u32>,
    /// Directory of the disk; made where it is missing
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Options of clone.
#[derive(Debug, Args)]
pub struct CloneArgs {
    /// Begin with this snapshot instead of the current state
    #[arg(short, long, value_name = "UUID")]
    uuid: Option<Guid>,
    /// Descriptor of the disk to build on, or its directory
    #[arg(value_name = "DiskDescriptor.xml")]
    golden: PathBuf,
    /// Directory of the new disk
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Options of restore-descriptor.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// How the image is arranged
    #[arg(short, long, value_name = "FORMAT", value_enum)]
    format: Arrangement,
    /// Cluster of a raw image: sectors, or a number with K or M [default: the largest that fits]
    #[arg(short = 'b', long, value_name = "CLUSTER", value_parser = cluster)]
    blocksize: Option<u32>,
    /// Directory of the descriptor
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The base image; a relative name is one in DIR
    #[arg(value_name = "BASE_DELTA")]
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What a new disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Contents {
    /// Nothing
    None,
    /// A partition with ext4
    Ext4,
    /// A partition with XFS
    Xfs,
    /// A partition with Btrfs
    Btrfs,
}

impl Contents {
    fn fs(self) -> Option<FsType> {
        match self {
            Contents::None => None,
            Contents::Ext4 => Some(FsType::Ext4),
            Contents::Xfs => Some(FsType::Xfs),
            Contents::Btrfs => Some(FsType::Btrfs),
        }
    }
}

/// Makes a disk.
pub fn init(args: &InitArgs) -> Result<u8, Failure> {
    let new = NewDisk {
        cluster_bytes: args.blocksize.unwrap_or(DEFAULT_CLUSTER),
        format: args.format.format(),
        preallocation: args.format.preallocation(),
        ..NewDisk::new(args.size)
    };
    let is_new_dir = !args.dir.exists();
    let made = folder::create(&args.dir, &new).map_err(|error| failure(&error))?;
    if let Some(fs) = args.contents.fs() {
        let options = FormatOptions {
            label: args.label.clone(),
            block_bytes: args.fs_block,
            full: args.nolazy,
        };
        if let Err(error) = live::format::format(made.xml(), fs, &options) {
            made.take_back(is_new_dir);
            return Err(error);
        }
    }
    tell(&made, args.json)
}

/// Makes a disk upon another one.
pub fn clone(args: &CloneArgs) -> Result<u8, Failure> {
    let made = folder::clone_disk(&args.golden, args.uuid, &args.dir);
    tell(&made.map_err(|error| failure(&error))?, args.json)
}

/// Writes a descriptor.
pub fn restore_descriptor(args: &RestoreArgs) -> Result<u8, Failure> {
    let format = args.format.format();
    let made = folder::restore_descriptor(&args.dir, &args.file, format, args.blocksize);
    tell(&made.map_err(|error| failure(&error))?, args.json)
}

/// Says what kind of disk was made.
pub fn tell(made: &Folder, json: bool) -> Result<u8, Failure> {
    let descriptor = made.descriptor();
    let object = json!({
        "descriptor": made.xml(),
        "size_bytes": descriptor.size_bytes(),
        "cluster_bytes": descriptor.cluster_bytes(),
        "images": files(made),
    });
    let text = format!(
        "{}: a disk of {} in clusters of {}\n",
        made.xml().display(),
        bytes(descriptor.size_bytes()),
        bytes(descriptor.cluster_bytes().into())
    );
    answer(json, &object, &text)
}

/// The files of a disk's images, base first.
pub fn files(folder: &Folder) -> Vec<Value> {
    let images = folder.descriptor().images.iter();
    let path = |image| path_text(&folder.path_of(image));
    images.map(path).collect()
}

fn path_text(path: &Path) -> Value {
    Value::from(path.to_string_lossy().into_owned())
}
