//! Checking a disk: every image, and what the descriptor says of them.

use std::path::PathBuf;

use super::images::unopened;
use super::{Folder, FolderError, OnProgress, OpenOptions};
use crate::descriptor::{Guid, ImageEntry};
use crate::format::Format;
use crate::format::expanded::{self, Finding, Repair, Severity};
use crate::storage::{Access, HostFile};

/// Parts of an image that progress is told in.
const STEPS: u64 = 100;

/// What checking one image came to.
#[derive(Debug)]
pub struct ImageCheck {
    /// Its name.
    pub guid: Guid,
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// What was found.
    pub findings: Vec<Finding>,
    /// What of it is still so.
    pub left: Vec<Finding>,
    /// Clusters of the disk whose bytes are lost.
    pub lost: Vec<u32>,
    /// Clusters that have a place.
    pub allocated: u64,
}

/// What checking a disk came to.
#[derive(Debug, Default)]
pub struct FolderCheck {
    /// The images, base first.
    pub images: Vec<ImageCheck>,
    /// What the descriptor and the images don't agree on.
    pub disagreements: Vec<String>,
    /// Files that look like images of this disk and are named nowhere.
    pub strangers: Vec<PathBuf>,
    /// Whether a merge that had been cut off was finished.
    pub finished_merge: bool,
}

impl FolderCheck {
    /// The worst of what is left.
    pub fn worst(&self) -> Option<Severity> {
        let left = self.images.iter().flat_map(|image| &image.left);
        let worst = left.map(Finding::severity).max();
        match self.disagreements.is_empty() {
            true => worst,
            false => Some(Severity::Damage),
        }
    }
}

impl Folder {
    /// Checks all images up to a snapshot, and mends them where asked. The disk is not running. `progress`
    /// can't call it off.
    ///
    /// # Errors
    /// There is no such snapshot, an image is open elsewhere or beyond checking, or the host refused.
    pub fn check(
        &mut self,
        snapshot: Option<Guid>,
        repair: Repair,
        progress: OnProgress<'_>,
    ) -> Result<FolderCheck, FolderError> {
        let guid = snapshot.unwrap_or(Guid::TOP);
        let chain = self
            .descriptor()
            .chain(guid)
            .map_err(|source| self.wrong(source))?;
        let chain: Vec<ImageEntry> = chain.into_iter().cloned().collect();
        let mut done = FolderCheck::default();
        let all = chain.len() as u64;
        for (number, entry) in (0..).zip(&chain) {
            // Half mended is worse than not looked at: nobody calls it off inside of an image.
            let mut inside = |done, of: u64| {
                progress(number * STEPS + done * STEPS / of.max(1), all * STEPS);
            };
            let image = self.check_image(entry, repair, &mut inside)?;
            done.images.push(image);
        }
        if repair == Repair::Yes && self.interrupted()?.is_some() {
            self.finish_interrupted(None, &OpenOptions::new(Access::ReadWrite))?;
            done.finished_merge = true;
        } else if let Some(begun) = self.interrupted()? {
            let what = format!("the merge of snapshot {} was cut off", begun.id);
            done.disagreements.push(what);
        }
        self.compare(guid, &mut done)?;
        done.strangers = self.strangers()?;
        Ok(done)
    }

    fn check_image(
        &self,
        entry: &ImageEntry,
        repair: Repair,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<ImageCheck, FolderError> {
        let path = self.path_of(entry);
        let access = match repair == Repair::Yes && self.owns(entry) {
            true => Access::ReadWrite,
            false => Access::ReadOnly,
        };
        let file = HostFile::open(&path, access).map_err(|error| unopened(&path, error))?;
        // What is being written looks like damage at any moment.
        if access == Access::ReadOnly && file.has_writer().is_ok_and(|has| has) {
            return Err(unopened(&path, std::io::ErrorKind::WouldBlock.into()));
        }
        let format = match self.format_of(entry)? {
            // Whatever it was, the descriptor says that it is no raw image.
            Format::Raw if entry.kind == crate::descriptor::ImageType::Compressed => {
                Format::Expanded
            }
            known => known,
        };
        let mut image = ImageCheck {
            guid: entry.guid,
            path,
            format,
            findings: Vec::new(),
            left: Vec::new(),
            lost: Vec::new(),
            allocated: 0,
        };
        if format == Format::Expanded {
            let repair = match access {
                Access::ReadWrite => repair,
                Access::ReadOnly => Repair::No,
            };
            let checked = expanded::check_telling(&file, repair, progress)?;
            image.findings = checked.findings;
            image.left = checked.left;
            image.lost = checked.lost;
            image.allocated = checked.allocated;
        }
        Ok(image)
    }

    /// Holds the images' sizes and clusters against the descriptor's.
    fn compare(&self, guid: Guid, done: &mut FolderCheck) -> Result<(), FolderError> {
        if done.worst() == Some(Severity::Damage) {
            return Ok(());
        }
        let options = OpenOptions {
            snapshot: Some(guid),
            ..OpenOptions::new(Access::ReadOnly)
        };
        let opened = match self.open_disk(&options) {
            Ok(opened) => opened,
            Err(error) => {
                done.disagreements.push(error.to_string());
                return Ok(());
            }
        };
        let disk: &dyn crate::Disk = &opened.disk;
        let says = self.descriptor();
        if guid == Guid::TOP && disk.size_bytes() != says.size_bytes() {
            done.disagreements.push(format!(
                "the descriptor says {} bytes, the top has {}",
                says.size_bytes(),
                disk.size_bytes()
            ));
        }
        if disk.cluster_bytes() != says.cluster_bytes() {
            done.disagreements.push(format!(
                "the descriptor says clusters of {} bytes, the images have {}",
                says.cluster_bytes(),
                disk.cluster_bytes()
            ));
        }
        Ok(())
    }

    fn strangers(&self) -> Result<Vec<PathBuf>, FolderError> {
        let base = self
            .descriptor()
            .base()
            .map_err(|source| self.wrong(source))?;
        let prefix = base.file.file_name().unwrap_or_default().to_owned();
        let prefix = prefix.to_string_lossy().into_owned() + ".{";
        let entries =
            std::fs::read_dir(self.dir()).map_err(FolderError::host(self.dir(), "read"))?;
        let mut strangers = Vec::new();
        for entry in entries {
            let entry = entry.map_err(FolderError::host(self.dir(), "read"))?;
            let path = entry.path();
            let is_named = self
                .descriptor()
                .images
                .iter()
                .any(|i| self.path_of(i) == path);
            if entry.file_name().to_string_lossy().starts_with(&prefix) && !is_named {
                strangers.push(path);
            }
        }
        strangers.sort();
        Ok(strangers)
    }
}
