//! `firn ploop info`.

use std::path::Path;

use clap::Args;
use firn_ploop::descriptor::Guid;
use firn_ploop::folder::{Folder, OpenOptions};
use firn_ploop::format::expanded::{Header, Version};
use firn_ploop::{Access, Disk, HostFile, Storage};
use serde_json::{Value, json};

use super::live;
use super::report::{answer, failure};
use super::words::DiskArgs;
use crate::output::{Failure, bytes, counted, rows};

/// Options of info.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// Print size, blocksize and version, in sectors, as the original does
    #[arg(short, long)]
    spec: bool,
    #[command(flatten)]
    disk: DiskArgs,
}

/// Explains.
pub fn run(args: &InfoArgs) -> Result<u8, Failure> {
    let folder = Folder::view(&args.disk.disk).map_err(|error| failure(&error))?;
    let descriptor = folder.descriptor();
    let mounted = live::served(folder.xml())?;
    let mut opened = folder
        .open_disk(&OpenOptions::new(Access::ReadOnly))
        .map_err(|error| failure(&error))?;
    if mounted.is_some() {
        // That it is open is no news.
        opened.notes.clear();
    }
    let mut images = Vec::new();
    let mut on_host = 0;
    for image in &descriptor.images {
        let path = folder.path_of(image);
        let space = space_of(&path);
        on_host += space;
        let format = folder.format_of(image).map_err(|error| failure(&error))?;
        images.push(json!({
            "uuid": image.guid.to_string(),
            "file": path.to_string_lossy(),
            "format": format.name(),
            "host_bytes": space,
            "shared": !folder.owns(image),
        }));
    }
    let top = descriptor.image(Guid::TOP).ok();
    let format = top.and_then(|top| folder.format_of(top).ok());
    let format = format.map_or("unknown", |format| format.name());
    let version = top.and_then(|top| version_of(&folder.path_of(top)));
    let object = json!({
        "descriptor": folder.xml(),
        "size_bytes": descriptor.size_bytes(),
        "cluster_bytes": descriptor.cluster_bytes(),
        "fmt_version": version,
        "format": format,
        "preallocated": descriptor.preallocated,
        "sealed": descriptor.is_sealed(),
        "snapshots": descriptor.images.len() - 1,
        "host_bytes": on_host,
        "images": images,
        "device": mounted.as_ref().and_then(|record| record.device.clone()),
        "mountpoint": mounted.as_ref().and_then(|record| record.mountpoint.clone()),
        "notes": opened.notes,
    });
    let text = match args.spec {
        true => format!(
            "size:\t\t{}\nblocksize:\t{}\n{}",
            descriptor.size_bytes() / 512,
            descriptor.cluster_bytes() / 512,
            version.map_or_else(String::new, |it| format!("fmt_version:\t{it}\n"))
        ),
        false => table(
            &folder,
            &object,
            format,
            on_host,
            opened.disk.layers().len(),
        ),
    };
    answer(args.disk.json, &object, &text)
}

fn table(folder: &Folder, object: &Value, format: &str, on_host: u64, depth: usize) -> String {
    let descriptor = folder.descriptor();
    let mut state = Vec::new();
    if descriptor.preallocated {
        state.push("preallocated");
    }
    if descriptor.is_sealed() {
        state.push("sealed: others build on it");
    }
    let mut lines = vec![
        ("size", bytes(descriptor.size_bytes())),
        ("on the host", bytes(on_host)),
        ("format", format.to_owned()),
        ("cluster", bytes(descriptor.cluster_bytes().into())),
        ("snapshots", (descriptor.images.len() - 1).to_string()),
        ("current state", counted(depth, "image")),
    ];
    if !state.is_empty() {
        lines.push(("state", state.join(", ")));
    }
    for (name, key) in [("device", "device"), ("mounted at", "mountpoint")] {
        if let Some(path) = object[key].as_str() {
            lines.push((name, path.to_owned()));
        }
    }
    for note in object["notes"].as_array().into_iter().flatten() {
        lines.push(("note", note.as_str().unwrap_or_default().to_owned()));
    }
    rows(&folder.xml().display().to_string(), &lines)
}

/// The version of ploop's own format that a file has, if it has that.
fn version_of(path: &Path) -> Option<u32> {
    let mut bytes = [0; 64];
    let file = HostFile::open(path, Access::ReadOnly).ok()?;
    file.read_at(&mut bytes, 0).ok()?;
    Some(match Header::parse(&bytes).ok()?.version {
        Version::V1 => 1,
        Version::V2 => 2,
    })
}

/// Space that a file takes on the host.
fn space_of(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}
