//! An image set being written.
//!
//! Images are written into a private subdirectory of the images directory and moved into place
//! when all of them are there and on disk; the inventory comes last. So an images directory is
//! complete exactly when it has an inventory, and a dump that fails takes back what it wrote by
//! removing its subdirectory. Whatever else is in the images directory belongs to the caller.

mod private;
mod seal;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use firn_proto::{InventoryEntry, Message, Name};

use crate::dir::ImageDir;
use crate::error::ImageWriteError;
use crate::kind::ImageKind;
use crate::writer::EntryWriter;
use private::PrivateDir;

/// Writes a set of images into a directory; may be used by several threads.
///
/// [`seal`](Self::seal) puts the set in place. Dropping the writer before removes what was
/// written and leaves the directory as it was.
#[derive(Debug)]
pub struct ImageSetWriter {
    path: PathBuf,
    private: PrivateDir,
    state: Mutex<State>,
}

/// A set that is complete. Dropped, it removes the subdirectory in which it was written, which is empty by now.
#[derive(Debug)]
pub struct Sealed(#[expect(dead_code, reason = "held to be dropped")] PrivateDir);

#[derive(Debug, Default)]
struct State {
    /// Names of all files made so far.
    names: Vec<String>,
    /// A file that was begun and not finished.
    abandoned: Option<String>,
}

impl ImageSetWriter {
    /// Begins a set in an existing directory.
    ///
    /// What a writer of a dead process left there is removed.
    ///
    /// # Errors
    /// `Busy` while another process writes a set into the directory, `Directory` where it is
    /// missing, no directory, or not writable.
    pub fn create(path: &Path) -> Result<Self, ImageWriteError> {
        let refused = |source| ImageWriteError::Directory {
            path: path.into(),
            source,
        };
        let path = path.canonicalize().map_err(refused)?;
        let private = PrivateDir::create(&path).map_err(refused)?;
        if private::sweep(&path, &private).map_err(refused)? {
            return Err(ImageWriteError::Busy { path });
        }
        Ok(Self {
            path,
            private,
            state: Mutex::default(),
        })
    }

    /// Tells the images directory, as an absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Begins an image with entries.
    pub fn writer(&self, kind: ImageKind, id: u64) -> EntryWriter<'_> {
        EntryWriter::new(self, kind, id)
    }

    /// Writes an image of one entry.
    pub fn write_one<M: Message + Name>(
        &self,
        kind: ImageKind,
        id: u64,
        message: &M,
    ) -> Result<(), ImageWriteError> {
        let mut writer = self.writer(kind, id);
        writer.entry(message)?;
        writer.finish()
    }

    /// Writes an image of many entries; without entries there is no file.
    pub fn write_all<M: Message + Name>(
        &self,
        kind: ImageKind,
        id: u64,
        messages: &[M],
    ) -> Result<(), ImageWriteError> {
        let mut writer = self.writer(kind, id);
        messages
            .iter()
            .try_for_each(|message| writer.entry(message))?;
        writer.finish()
    }

    /// Creates a file without header, open for reading and writing, to be filled by the caller.
    pub fn raw_file(&self, kind: ImageKind, id: u64) -> Result<File, ImageWriteError> {
        self.create_file(&kind.file_name(id))
    }

    /// Makes the set an increment to another one: `text` becomes the `parent` link as it is, and
    /// is taken relative to the images directory.
    pub fn set_parent(&self, text: &Path) -> Result<ImageDir, ImageWriteError> {
        let at = self.path.join(text);
        let unusable = |source| ImageWriteError::Parent {
            path: at.clone(),
            source,
        };
        if !at.metadata().map_err(unusable)?.is_dir() {
            return Err(unusable(io::ErrorKind::NotADirectory.into()));
        }
        let linked = self.private.symlink(PARENT_LINK, text);
        linked.map_err(|source| self.file_error("create", PARENT_LINK, source))?;
        self.lock().names.push(PARENT_LINK.to_owned());
        ImageDir::open(&at).map_err(|_| unusable(io::ErrorKind::NotADirectory.into()))
    }

    /// Puts the set in place: everything else on disk and moved first, then the inventory.
    ///
    /// A set that was in the directory before is replaced, with its leftovers; other files stay.
    /// On an error the directory has no inventory and none of the new files. What is returned removes the
    /// empty subdirectory when it is dropped, which somebody who is in a hurry may do later.
    ///
    /// # Errors
    /// `Unfinished` where a writer was dropped early (whatever stopped it was its own error);
    /// `File` where the kernel refused to sync or move.
    pub fn seal(self, inventory: &InventoryEntry) -> Result<Sealed, ImageWriteError> {
        seal::seal(&self, inventory)?;
        Ok(Sealed(self.private))
    }

    /// Path that a file will have in the sealed set, for messages.
    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn file_error(
        &self,
        action: &'static str,
        name: &str,
        source: io::Error,
    ) -> ImageWriteError {
        ImageWriteError::File {
            action,
            path: self.path_of(name),
            source,
        }
    }

    fn directory_error(&self, action: &'static str, source: io::Error) -> ImageWriteError {
        ImageWriteError::File {
            action,
            path: self.path.clone(),
            source,
        }
    }

    pub(crate) fn create_file(&self, name: &str) -> Result<File, ImageWriteError> {
        let file = self.private.create_file(name);
        let file = file.map_err(|source| self.file_error("create", name, source))?;
        self.lock().names.push(name.to_owned());
        Ok(file)
    }

    pub(crate) fn abandon(&self, name: &str) {
        self.lock().abandoned = Some(name.to_owned());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic elsewhere leaves the list usable: it is only ever pushed to.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Name of the link to the directory that an increment builds upon.
pub const PARENT_LINK: &str = "parent";

/// Writes an image of one entry that belongs to no set (statistics, in the work directory),
/// replacing what was there at once.
pub fn write_single<M: Message + Name>(
    dir: &Path,
    kind: ImageKind,
    message: &M,
) -> Result<(), ImageWriteError> {
    let name = kind.file_name(0);
    let info = kind.info();
    assert!(
        info.has_message(M::NAME),
        "{} is no entry of {} images",
        M::NAME,
        info.tag
    );
    let failed = |source| ImageWriteError::File {
        action: "write",
        path: dir.join(&name),
        source,
    };
    let mut bytes = crate::framing::header_bytes(info);
    let len = u32::try_from(message.encoded_len()).expect("statistics are small");
    bytes.extend_from_slice(&len.to_le_bytes());
    message
        .encode(&mut bytes)
        .expect("a vector grows as needed");
    let mut temporary = OsString::from(format!(".{name}."));
    temporary.push(std::process::id().to_string());
    let temporary = dir.join(temporary);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(&bytes))
        .and_then(|()| std::fs::rename(&temporary, dir.join(&name)));
    written.map_err(|source| {
        let _ = std::fs::remove_file(&temporary);
        failed(source)
    })
}
