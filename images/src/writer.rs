//! Writing the entries of one image.
//!
//! Small images are built in memory and written with one call; larger ones go out in pieces. A
//! file comes into being with its first piece, so an image with nothing to say does not exist.

use std::fs::File;
use std::io::{Read, Write};

use firn_proto::{Message, Name};

use crate::error::ImageWriteError;
use crate::framing::{MAX_MESSAGE_BYTES, header_bytes};
use crate::kind::ImageKind;
use crate::set::ImageSetWriter;

/// Buffered bytes that are worth a write of their own.
const FLUSH_BYTES: usize = 1 << 20;

/// Writes the entries of one image of a set.
///
/// [`finish`](Self::finish) completes the file; dropping the writer before makes the set
/// unsealable, because the file may hold half of what it should.
#[derive(Debug)]
pub struct EntryWriter<'set> {
    set: &'set ImageSetWriter,
    kind: ImageKind,
    name: String,
    buffer: Vec<u8>,
    file: Option<File>,
    finished: bool,
}

impl<'set> EntryWriter<'set> {
    pub(crate) fn new(set: &'set ImageSetWriter, kind: ImageKind, id: u64) -> Self {
        let name = kind.file_name(id);
        Self {
            set,
            kind,
            name,
            buffer: Vec::new(),
            file: None,
            finished: false,
        }
    }

    /// Appends an entry.
    pub fn entry<M: Message + Name>(&mut self, message: &M) -> Result<(), ImageWriteError> {
        let info = self.kind.info();
        assert!(
            info.has_message(M::NAME),
            "{} is no entry of {} images",
            M::NAME,
            info.tag
        );
        self.begin();
        let at = self.buffer.len();
        // The length comes first and is known last: to ask for it before takes as long as the encoding.
        self.buffer.extend_from_slice(&[0; 4]);
        message
            .encode(&mut self.buffer)
            .expect("a vector grows as needed");
        let len = self.buffer.len() - at - 4;
        let prefix = u32::try_from(len)
            .ok()
            .filter(|len| *len <= MAX_MESSAGE_BYTES);
        let Some(prefix) = prefix else {
            let path = self.set.path_of(&self.name);
            return Err(ImageWriteError::TooLong {
                path,
                message: M::NAME,
                len,
            });
        };
        self.buffer[at..at + 4].copy_from_slice(&prefix.to_le_bytes());
        self.flush_if_large()
    }

    /// Appends payload of the last entry.
    pub fn payload(&mut self, bytes: &[u8]) -> Result<(), ImageWriteError> {
        self.begin();
        if bytes.len() < FLUSH_BYTES {
            self.buffer.extend_from_slice(bytes);
            return self.flush_if_large();
        }
        self.flush()?;
        self.write(bytes)
    }

    /// Appends payload of exactly `len` bytes, as it comes out of `from`.
    pub fn payload_from(&mut self, from: impl Read, len: u64) -> Result<(), ImageWriteError> {
        self.begin();
        self.flush()?;
        let (set, name) = (self.set, &self.name);
        let file = self.file.as_mut().expect("flush made the file");
        let copied = std::io::copy(&mut from.take(len), file);
        let copied = copied.map_err(|source| set.file_error("copy payload into", name, source))?;
        if copied < len {
            let path = set.path_of(name);
            return Err(ImageWriteError::ShortPayload { path, len, copied });
        }
        Ok(())
    }

    /// Completes the file.
    ///
    /// Without any entry there is none.
    pub fn finish(mut self) -> Result<(), ImageWriteError> {
        self.finished = true;
        let written = if self.buffer.is_empty() {
            Ok(())
        } else {
            self.flush()
        };
        self.finished = written.is_ok();
        written
    }

    fn begin(&mut self) {
        if self.file.is_none() && self.buffer.is_empty() {
            self.buffer = header_bytes(self.kind.info());
        }
    }

    fn flush_if_large(&mut self) -> Result<(), ImageWriteError> {
        if self.buffer.len() < FLUSH_BYTES {
            Ok(())
        } else {
            self.flush()
        }
    }

    fn flush(&mut self) -> Result<(), ImageWriteError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.write(&buffer)?;
        buffer.clear();
        self.buffer = buffer;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ImageWriteError> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(self.set.create_file(&self.name)?),
        };
        let written = file.write_all(bytes);
        written.map_err(|source| self.set.file_error("write", &self.name, source))
    }
}

impl Drop for EntryWriter<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.set.abandon(&self.name);
        }
    }
}
