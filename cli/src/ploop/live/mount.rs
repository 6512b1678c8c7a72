//! `firn ploop mount`, `umount` and `list`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use firn_ploop::descriptor;
use firn_ploop::device::Choice;
use firn_ploop::format::expanded::DEFAULT_CLUSTER;
use firn_ploop::server::{
    LaunchError, Launcher, MountConfig, NotServed, Record, Registry, ServeConfig, Source, THREADS,
    unmount,
};
use firn_ploop::{Access, Format, HostFile};
use serde_json::{Value, json};

use super::{must_be_served, refused, unreadable};
use crate::output::Failure;
use crate::ploop::report::answer;
use crate::ploop::rights;
use crate::ploop::words::{Arrangement, cluster};

/// So long umount waits for the last user of the device.
const PATIENCE: Duration = Duration::from_secs(30);

/// A kind of device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// The best that the kernel offers
    #[default]
    Auto,
    /// The kernel's ublk driver
    Ublk,
    /// The kernel's NBD client
    Nbd,
    /// A FUSE file with a loop device on it
    Fuse,
}

impl DeviceKind {
    fn choice(self) -> Choice {
        match self {
            DeviceKind::Auto => Choice::Auto,
            DeviceKind::Ublk => Choice::Ublk,
            DeviceKind::Nbd => Choice::Nbd,
            DeviceKind::Fuse => Choice::Fuse,
        }
    }
}

/// Options of mount.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// Mount the file system here; else there is only a device
    #[arg(short, value_name = "DIR")]
    pub mountpoint: Option<PathBuf>,
    /// Read only
    #[arg(short)]
    pub read_only: bool,
    /// Show this snapshot, read-only
    #[arg(short, long, value_name = "UUID")]
    pub uuid: Option<String>,
    /// Type of the file system [default: what is found]
    #[arg(short = 't', value_name = "TYPE", requires = "mountpoint")]
    pub fs_type: Option<String>,
    /// Mount options
    #[arg(short = 'o', value_name = "OPTIONS", default_value = "")]
    pub options: String,
    /// Check the file system first
    #[arg(short = 'F', requires = "mountpoint")]
    pub check: bool,
    /// Take a disk that was not closed as it was when it was flushed last
    #[arg(long)]
    pub recover: bool,
    /// Kind of device [default: the best that the kernel offers]
    #[arg(
        long,
        value_name = "KIND",
        value_enum,
        default_value_t,
        hide_default_value = true
    )]
    pub device: DeviceKind,
    /// Make no device: serve the disk to copy, NBD and backup only
    #[arg(long, conflicts_with_all = ["mountpoint", "device"])]
    pub without_device: bool,
    /// Read and write the image through the page cache
    #[arg(long)]
    pub cached: bool,
    /// Requests carried out at once
    #[arg(long, value_name = "COUNT", default_value_t = THREADS)]
    pub threads: usize,
    /// Format of an image without descriptor; a raw one has to be named so, for it looks like any file
    #[arg(short, long, value_name = "FORMAT", value_enum)]
    pub format: Option<Arrangement>,
    /// Cluster of a raw image without descriptor
    #[arg(short = 'b', long, value_name = "CLUSTER", value_parser = cluster)]
    pub blocksize: Option<u32>,
    /// Descriptor of the disk or its directory, or an image
    #[arg(value_name = "DiskDescriptor.xml|IMAGE")]
    pub disk: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Options of snapshot-mount.
#[derive(Debug, Args)]
pub struct SnapshotMountArgs {
    /// The snapshot
    #[arg(short, long, value_name = "UUID")]
    pub uuid: String,
    /// Where its file system is mounted; without it there is only a device
    #[arg(short, value_name = "DIR")]
    pub mountpoint: Option<PathBuf>,
    /// Type of the file system [default: found out]
    #[arg(short = 't', value_name = "TYPE", requires = "mountpoint")]
    pub fs_type: Option<String>,
    /// Mount options
    #[arg(short = 'o', value_name = "OPTIONS", default_value = "")]
    pub options: String,
    /// Descriptor of the disk, or its directory
    #[arg(value_name = "DiskDescriptor.xml")]
    pub disk: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Options of umount.
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// The device
    #[arg(short, value_name = "DEVICE", conflicts_with_all = ["mountpoint", "disk"])]
    pub device: Option<PathBuf>,
    /// Where it is mounted
    #[arg(short, value_name = "DIR", conflicts_with = "disk")]
    pub mountpoint: Option<PathBuf>,
    /// Descriptor, image, device or mount point
    #[arg(value_name = "DISK", required_unless_present_any = ["device", "mountpoint"])]
    pub disk: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Options of list.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Also print where each is mounted
    #[arg(short, long)]
    pub all: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Which disk a path names.
pub fn source(
    disk: &Path,
    snapshot: Option<String>,
    format: Option<Arrangement>,
    blocksize: Option<u32>,
) -> Result<Source, Failure> {
    let path = std::fs::canonicalize(disk).map_err(|error| missing(disk, &error))?;
    let xml = match path.is_dir() {
        true => path.join(descriptor::FILE_NAME),
        false => path.clone(),
    };
    let is_xml = path.is_dir() || path.extension().is_some_and(|end| end == "xml");
    match (is_xml, snapshot) {
        (true, snapshot) => Ok(Source::Descriptor {
            path: xml,
            snapshot,
        }),
        (false, None) => {
            must_be(&path, format)?;
            Ok(Source::File {
                path,
                cluster_bytes: blocksize.unwrap_or(DEFAULT_CLUSTER),
            })
        }
        (false, Some(_)) => Err(Failure::usage(
            "only a disk with a descriptor has snapshots",
        )),
    }
}

/// A path that was named and can't be opened.
fn missing(path: &Path, error: &std::io::Error) -> Failure {
    Failure {
        code: 4,
        ..Failure::io(format!("{} can't be opened", path.display()), error)
    }
}

/// Holds an image without descriptor against the format that it is said to have.
fn must_be(path: &Path, format: Option<Arrangement>) -> Result<(), Failure> {
    let file = HostFile::open(path, Access::ReadOnly).map_err(|error| missing(path, &error))?;
    let found = Format::detect(&file).map_err(|error| refused(&error, error.exit_code()))?;
    match format.map(Arrangement::format) {
        None if found == Format::Raw => {
            let what = format!("{} is neither a descriptor nor an image", path.display());
            Err(Failure::usage(what).hint("add '-f raw' if it is a raw disk"))
        }
        Some(said) if said != found => {
            let what = format!(
                "{} is {}, not {}",
                path.display(),
                found.name(),
                said.name()
            );
            Err(Failure::usage(what))
        }
        _ => Ok(()),
    }
}

/// Mounts a snapshot, beside the running disk.
pub fn snapshot_mount(args: &SnapshotMountArgs) -> Result<u8, Failure> {
    mount(&MountArgs {
        mountpoint: args.mountpoint.clone(),
        read_only: true,
        uuid: Some(args.uuid.clone()),
        fs_type: args.fs_type.clone(),
        options: args.options.clone(),
        json: args.json,
        ..MountArgs::plain(&args.disk)
    })
}

impl MountArgs {
    /// A bare device, writable.
    pub fn plain(disk: &Path) -> MountArgs {
        MountArgs {
            mountpoint: None,
            read_only: false,
            uuid: None,
            fs_type: None,
            options: String::new(),
            check: false,
            recover: false,
            device: DeviceKind::Auto,
            without_device: false,
            cached: false,
            threads: THREADS,
            format: None,
            blocksize: None,
            disk: disk.to_owned(),
            json: false,
        }
    }
}

/// Mounts, and says where.
pub fn mount(args: &MountArgs) -> Result<u8, Failure> {
    let record = start(args)?;
    let text = match &record.device {
        Some(device) => format!("{}\n", device.display()),
        None => format!("{}\n", record.control.display()),
    };
    answer(args.json, &object(&record), &text)
}

/// Mounts.
pub fn start(args: &MountArgs) -> Result<Record, Failure> {
    let mount = match &args.mountpoint {
        None => None,
        Some(dir) => Some(MountConfig {
            target: std::fs::canonicalize(dir).map_err(|error| missing(dir, &error))?,
            fs_type: args.fs_type.clone(),
            options: args.options.clone(),
            check: args.check,
        }),
    };
    let config = ServeConfig {
        source: source(&args.disk, args.uuid.clone(), args.format, args.blocksize)?,
        read_only: args.read_only || args.uuid.is_some(),
        recover: args.recover,
        threads: args.threads,
        direct_io: !args.cached,
        run_dir: Registry::from_environment().dir().to_owned(),
        mount,
        device: match args.without_device {
            true => Choice::None,
            false => args.device.choice(),
        },
    };
    launch(&config)
}

/// Starts a server.
pub fn launch(config: &ServeConfig) -> Result<Record, Failure> {
    Launcher::firn()
        .launch(config)
        .map_err(|error| told(&error))
}

fn told(error: &LaunchError) -> Failure {
    let failure = refused(error, error.exit_code());
    if let LaunchError::Failed(NotServed {
        denied: Some(denied),
        ..
    }) = error
    {
        return failure.hint(rights::of(*denied));
    }
    match error.exit_code() {
        37 => failure.hint(
            "unmount it where it is mounted; if nobody has it open, use 'firn ploop mount --recover' \
             or 'firn ploop check --repair'",
        ),
        _ => failure,
    }
}

/// Takes a disk down and waits until its image is closed.
pub fn take_down(record: &Record) -> Result<(), Failure> {
    unmount(record, PATIENCE).map_err(|error| told(&error))
}

/// Unmounts.
pub fn umount(args: &UmountArgs) -> Result<u8, Failure> {
    let named = [&args.device, &args.mountpoint, &args.disk];
    let Some(path) = named.into_iter().flatten().next() else {
        return Err(Failure::usage("name a disk"));
    };
    let record = must_be_served(path)?;
    take_down(&record)?;
    answer(args.json, &object(&record), "")
}

/// Lists what is mounted.
pub fn list(args: &ListArgs) -> Result<u8, Failure> {
    let registry = Registry::from_environment();
    let records = registry.list();
    let records = records.map_err(|error| unreadable(&registry, &error))?;
    let mut text = String::new();
    for record in &records {
        let device = record.device.as_deref().unwrap_or(Path::new("-"));
        let disk = record.source.path().display();
        let _ = write!(text, "{:<12} {disk}", device.display());
        if args.all {
            let target = record.mountpoint.as_deref().unwrap_or(Path::new("-"));
            let _ = write!(text, " {}", target.display());
        }
        text.push('\n');
    }
    let disks: Vec<Value> = records.iter().map(object).collect();
    answer(args.json, &json!({ "disks": disks }), &text)
}

fn object(record: &Record) -> Value {
    json!({
        "disk": record.source.path(),
        "snapshot": record.source.snapshot(),
        "read_only": record.read_only,
        "device": record.device,
        "via": record.via,
        "mountpoint": record.mountpoint,
        "fs_type": record.fs_type,
        "control": record.control,
        "supervisor": record.supervisor,
    })
}
