//! Reading the entries of one image.
//!
//! Nothing that a file says is believed before it is compared with the file's size, so a reader
//! allocates at most what the file holds. Every error names file, entry and byte.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use firn_proto::{Message, Name};

use crate::error::{EntryPlace, ImageReadError};
use crate::framing::{IMG_COMMON, IMG_SERVICE, MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES};
use crate::kind::{Header, ImageKind};

/// Reads the entries of one image, first to last.
///
/// Between two entries the caller takes their payload, if the kind has any.
#[derive(Debug)]
pub struct ImageReader<R = BufReader<File>> {
    input: R,
    path: PathBuf,
    kind: ImageKind,
    size: u64,
    offset: u64,
    entry: u64,
    message: Vec<u8>,
}

impl ImageReader {
    /// Opens an image of a known kind and checks its header.
    pub fn open(path: &Path, kind: ImageKind) -> Result<Self, ImageReadError> {
        let (file, size) = open_sized(path)?;
        Self::new(BufReader::new(file), size, path, kind)
    }

    /// Opens an image whose kind is to be found out, by its name or else by its magic.
    pub fn open_unknown(path: &Path) -> Result<Self, ImageReadError> {
        let (file, size) = open_sized(path)?;
        Self::new_unknown(BufReader::new(file), size, path)
    }
}

fn open_sized(path: &Path) -> Result<(File, u64), ImageReadError> {
    let opened = File::open(path).and_then(|file| {
        let metadata = file.metadata()?;
        match metadata.is_file() {
            true => Ok((file, metadata.len())),
            false => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            )),
        }
    });
    opened.map_err(|source| ImageReadError::Open {
        path: path.into(),
        source,
    })
}

impl<R: Read> ImageReader<R> {
    /// Reads an image of `size` bytes from `input`; `path` is for messages.
    pub fn new(input: R, size: u64, path: &Path, kind: ImageKind) -> Result<Self, ImageReadError> {
        let mut reader = Self::bare(input, size, path, kind);
        let (header, found) = reader.read_magics()?;
        reader.check_magics(header, found)?;
        Ok(reader)
    }

    /// Reads an image whose kind is to be found out; raw files are of no known kind.
    pub fn new_unknown(input: R, size: u64, path: &Path) -> Result<Self, ImageReadError> {
        let mut reader = Self::bare(input, size, path, ImageKind::Inventory);
        let (header, found) = reader.read_magics()?;
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let named = ImageKind::of_file_name(name).map(|(kind, _)| kind);
        let by_name = named.filter(|k| k.info().header != Header::Raw && k.info().magic == found);
        let kind = by_name.or_else(|| ImageKind::of_magic(found));
        reader.kind = kind.ok_or_else(|| ImageReadError::UnknownKind { path: path.into() })?;
        reader.check_magics(header, found)?;
        Ok(reader)
    }

    fn bare(input: R, size: u64, path: &Path, kind: ImageKind) -> Self {
        let path = path.to_owned();
        Self {
            input,
            path,
            kind,
            size,
            offset: 0,
            entry: 0,
            message: Vec::new(),
        }
    }

    /// Reads up to the type magic, and tells what stands before it.
    fn read_magics(&mut self) -> Result<(Header, u32), ImageReadError> {
        match self.read_u32_of_header()? {
            IMG_COMMON => Ok((Header::Common, self.read_u32_of_header()?)),
            IMG_SERVICE => Ok((Header::Service, self.read_u32_of_header()?)),
            magic => Ok((Header::Bare, magic)),
        }
    }

    fn read_u32_of_header(&mut self) -> Result<u32, ImageReadError> {
        if self.remaining() < 4 {
            return Err(ImageReadError::NoHeader {
                path: self.path.clone(),
                size: self.size,
            });
        }
        self.read_u32()
    }

    /// Compares the header with that of the kind. In sets of version 1 no file has a first magic.
    fn check_magics(&self, header: Header, found: u32) -> Result<(), ImageReadError> {
        let info = self.kind.info();
        if info.header != Header::Raw && found == info.magic && header == Header::Bare {
            return Ok(());
        }
        let (expected, tag) = (info.magic, info.tag);
        let path = || self.path.clone();
        match header == info.header {
            true if found == expected => Ok(()),
            false if found == expected => Err(ImageReadError::WrongHeader { path: path(), tag }),
            _ => Err(ImageReadError::WrongMagic {
                path: path(),
                found,
                expected,
                tag,
            }),
        }
    }

    /// Tells the kind of the image.
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    /// Tells the path of the image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells how many bytes are left in the file.
    pub fn remaining(&self) -> u64 {
        self.size - self.offset
    }

    /// Tells where the entry to come begins.
    pub fn place(&self) -> EntryPlace {
        EntryPlace {
            path: self.path.clone(),
            entry: self.entry,
            offset: self.offset,
        }
    }

    /// Tells where the payload of the last entry goes on.
    pub fn payload_place(&self) -> EntryPlace {
        EntryPlace {
            entry: self.entry.saturating_sub(1),
            ..self.place()
        }
    }

    /// Reads the encoded message of the next entry; `None` at the end of the file.
    pub fn next_bytes(&mut self) -> Result<Option<&[u8]>, ImageReadError> {
        match self.remaining() {
            0 => return Ok(None),
            count @ 1..4 => {
                return Err(ImageReadError::StrayBytes {
                    place: self.place(),
                    count,
                });
            }
            _ => {}
        }
        let len = u64::from(self.read_u32()?);
        check_len(len, self.remaining(), u64::from(MAX_MESSAGE_BYTES), || {
            self.place()
        })?;
        let mut message = std::mem::take(&mut self.message);
        message.clear();
        self.append(len, &mut message)?;
        self.message = message;
        self.entry += 1;
        Ok(Some(&self.message))
    }

    /// Reads the next entry; `None` at the end of the file.
    pub fn next_entry<M: Message + Name + Default>(&mut self) -> Result<Option<M>, ImageReadError> {
        self.assert_message::<M>();
        let mut place = self.place();
        match self.next_bytes()? {
            None => Ok(None),
            Some(bytes) => M::decode(bytes).map(Some).map_err(|source| {
                place.offset += 4;
                ImageReadError::Decode {
                    place,
                    message: M::NAME,
                    source,
                }
            }),
        }
    }

    /// Reads an entry that has to be there.
    pub fn expect_entry<M: Message + Name + Default>(&mut self) -> Result<M, ImageReadError> {
        let place = self.place();
        self.next_entry()?.ok_or(ImageReadError::NoEntry {
            place,
            message: M::NAME,
        })
    }

    /// Reads the one entry of an image that has one and no payload.
    pub fn one<M: Message + Name + Default>(mut self) -> Result<M, ImageReadError> {
        let message = self.expect_entry()?;
        self.finish()?;
        Ok(message)
    }

    /// Reads all entries that are left, in an image without payload.
    pub fn rest<M: Message + Name + Default>(mut self) -> Result<Vec<M>, ImageReadError> {
        let mut entries = Vec::new();
        while let Some(entry) = self.next_entry()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// Gives the entries that are left one by one, up to the first error.
    pub fn entries<M: Message + Name + Default>(
        &mut self,
    ) -> impl Iterator<Item = Result<M, ImageReadError>> {
        let mut failed = false;
        std::iter::from_fn(move || {
            let next = if failed {
                None
            } else {
                self.next_entry().transpose()
            };
            failed = matches!(next, Some(Err(_)));
            next
        })
    }

    /// Checks that nothing is left.
    pub fn finish(self) -> Result<(), ImageReadError> {
        match self.remaining() {
            0 => Ok(()),
            count => {
                let tag = self.kind.info().tag;
                Err(ImageReadError::Trailing {
                    place: self.place(),
                    count,
                    tag,
                })
            }
        }
    }

    /// Reads payload of the last entry into memory.
    pub fn payload(&mut self, len: u64) -> Result<Vec<u8>, ImageReadError> {
        check_len(len, self.remaining(), MAX_PAYLOAD_BYTES, || {
            self.payload_place()
        })?;
        let mut payload = Vec::new();
        self.append(len, &mut payload)?;
        Ok(payload)
    }

    /// Copies payload of the last entry elsewhere; an error of `to` is the inner one.
    pub fn copy_payload(
        &mut self,
        len: u64,
        to: &mut impl Write,
    ) -> Result<io::Result<()>, ImageReadError> {
        check_len(len, self.remaining(), u64::MAX, || self.payload_place())?;
        let mut chunk = vec![0; usize::try_from(len.min(1 << 20)).expect("at most 1 MiB")];
        let mut left = len;
        while left > 0 {
            let size = usize::try_from(left.min(1 << 20)).expect("at most 1 MiB");
            self.read_exact(&mut chunk[..size])?;
            if let Err(error) = to.write_all(&chunk[..size]) {
                return Ok(Err(error));
            }
            left -= u64::try_from(size).expect("at most 1 MiB");
        }
        Ok(Ok(()))
    }

    /// Skips payload of the last entry.
    pub fn skip_payload(&mut self, len: u64) -> Result<(), ImageReadError> {
        self.copy_payload(len, &mut io::sink())?
            .expect("a sink takes everything");
        Ok(())
    }

    fn assert_message<M: Name>(&self) {
        let info = self.kind.info();
        assert!(
            info.has_message(M::NAME),
            "{} is no entry of {} images",
            M::NAME,
            info.tag
        );
    }

    /// Appends bytes whose number has been checked.
    fn append(&mut self, len: u64, to: &mut Vec<u8>) -> Result<(), ImageReadError> {
        to.reserve_exact(usize::try_from(len).expect("checked length"));
        let place = self.place();
        let read = (&mut self.input).take(len).read_to_end(to);
        let read = read.and_then(|n| match u64::try_from(n).is_ok_and(|n| n == len) {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        });
        self.offset += len;
        read.map_err(|source| ImageReadError::Read { place, source })
    }

    fn read_u32(&mut self) -> Result<u32, ImageReadError> {
        let mut word = [0; 4];
        self.read_exact(&mut word)?;
        Ok(u32::from_le_bytes(word))
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), ImageReadError> {
        if let Err(source) = self.input.read_exact(bytes) {
            return Err(ImageReadError::Read {
                place: self.place(),
                source,
            });
        }
        self.offset += u64::try_from(bytes.len()).expect("usize fits");
        Ok(())
    }
}

fn check_len(
    len: u64,
    left: u64,
    limit: u64,
    place: impl Fn() -> EntryPlace,
) -> Result<(), ImageReadError> {
    if len > left {
        return Err(ImageReadError::Truncated {
            place: place(),
            len,
            left,
        });
    }
    if len > limit {
        return Err(ImageReadError::TooLong {
            place: place(),
            len,
            limit,
        });
    }
    Ok(())
}
