//! JSON back to an image.
//!
//! Takes what [`decode`](super::decode) and `crit decode` print, of either layout, and gives the
//! image back byte for byte. Entries are encoded one by one as they are read.

use std::io::{self, BufWriter, Read, Write};

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::decode::shape_of;
use super::json_fault::JsonFault;
use super::parse;
use super::payload::payload;
use crate::framing::header_bytes;
use crate::{ImageKind, MAX_MESSAGE_BYTES, Payload};

/// Why JSON could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The text is not JSON, or not of the shape of an image.
    #[error("not the JSON of an image")]
    Json(#[source] serde_json::Error),
    /// `magic` names no kind of image.
    #[error("magic {0:?} names no kind of image")]
    Magic(String),
    /// An entry cannot be encoded.
    #[error("entry {entry}")]
    Entry {
        /// Index of the entry, from 0.
        entry: u64,
        /// What is wrong.
        source: JsonFault,
    },
    /// An entry is longer than any reader accepts.
    #[error("entry {entry} has {len} bytes, more than an image entry may have")]
    TooLong {
        /// Index of the entry, from 0.
        entry: u64,
        /// Its length in bytes.
        len: usize,
    },
    /// The image could not be written.
    #[error("cannot write the image")]
    Write(#[source] io::Error),
}

/// Encodes JSON to an image.
///
/// # Errors
/// Where an entry cannot be encoded, those before it have been written.
pub fn encode(json: impl Read, out: impl Write) -> Result<(), EncodeError> {
    let mut encoder = Encoder {
        out: BufWriter::with_capacity(1 << 16, out),
        kind: None,
        entry: 0,
        failed: None,
    };
    let mut input = serde_json::Deserializer::from_reader(io::BufReader::new(json));
    let read = Image(&mut encoder).deserialize(&mut input);
    let read = read.and_then(|()| input.end());
    if let Some(error) = encoder.failed {
        return Err(error);
    }
    read.map_err(EncodeError::Json)?;
    encoder.out.flush().map_err(EncodeError::Write)
}

/// Encodes what has been read so far.
#[derive(Debug)]
struct Encoder<W: Write> {
    out: BufWriter<W>,
    kind: Option<ImageKind>,
    entry: u64,
    /// The error, where it is none of the JSON itself.
    failed: Option<EncodeError>,
}

impl<W: Write> Encoder<W> {
    fn magic(&mut self, name: &str) -> Result<(), EncodeError> {
        let kind = ImageKind::of_crit_name(name).or_else(|| {
            ImageKind::all().find(|kind| kind.info().tag == name && kind.info().magic != 0)
        });
        let kind = kind.filter(|kind| !kind.info().messages.is_empty());
        let kind = kind.ok_or_else(|| EncodeError::Magic(name.to_owned()))?;
        self.kind = Some(kind);
        let header = header_bytes(kind.info());
        self.out.write_all(&header).map_err(EncodeError::Write)
    }

    fn entry(&mut self, kind: ImageKind, object: &Map<String, Value>) -> Result<(), EncodeError> {
        let entry = self.entry;
        let shape = shape_of(kind, entry);
        let others: &[&str] = match kind.info().payload {
            Payload::Nothing => &[],
            _ => &["extra"],
        };
        let faulty = |source| EncodeError::Entry { entry, source };
        let message = parse::message(shape, object, others).map_err(faulty)?;
        let after = payload(kind, entry, shape, &message, object.get("extra"));
        let after = after.map_err(|fault| faulty(fault.within("extra")))?;
        let len = u32::try_from(message.len()).ok();
        let len = len.filter(|len| *len <= MAX_MESSAGE_BYTES);
        let len = len.ok_or(EncodeError::TooLong {
            entry,
            len: message.len(),
        })?;
        self.entry += 1;
        let pieces: [&[u8]; 3] = [&len.to_le_bytes(), &message, &after];
        let written = pieces
            .iter()
            .try_for_each(|piece| self.out.write_all(piece));
        written.map_err(EncodeError::Write)
    }

    /// Keeps an error of ours, and ends the reading with one of JSON's.
    fn keep<E: serde::de::Error>(&mut self, result: Result<(), EncodeError>) -> Result<(), E> {
        result.map_err(|error| {
            self.failed = Some(error);
            E::custom("stopped")
        })
    }
}

/// The object of an image.
struct Image<'a, W: Write>(&'a mut Encoder<W>);

impl<'de, W: Write> DeserializeSeed<'de> for Image<'_, W> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de, W: Write> Visitor<'de> for Image<'_, W> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object with magic and entries")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let encoder = self.0;
        // Entries that come before the magic wait for it.
        let mut early: Option<Vec<Map<String, Value>>> = None;
        let mut done = false;
        while let Some(key) = map.next_key::<String>()? {
            match (&*key, encoder.kind) {
                ("magic", None) => {
                    let name: String = map.next_value()?;
                    let read = encoder.magic(&name);
                    encoder.keep(read)?;
                }
                ("entries", Some(kind)) if !done => {
                    map.next_value_seed(EntryList(encoder, kind))?;
                    done = true;
                }
                ("entries", None) if early.is_none() => early = Some(map.next_value()?),
                _ => {
                    return Err(A::Error::custom(format!(
                        "unexpected or repeated key {key:?}"
                    )));
                }
            }
        }
        let kind = encoder
            .kind
            .ok_or_else(|| A::Error::missing_field("magic"))?;
        for object in early.iter().flatten() {
            let read = encoder.entry(kind, object);
            encoder.keep(read)?;
        }
        if !done && early.is_none() {
            return Err(A::Error::missing_field("entries"));
        }
        Ok(())
    }
}

/// The list of entries.
struct EntryList<'a, W: Write>(&'a mut Encoder<W>, ImageKind);

impl<'de, W: Write> DeserializeSeed<'de> for EntryList<'_, W> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_seq(self)
    }
}

impl<'de, W: Write> Visitor<'de> for EntryList<'_, W> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(object) = list.next_element()? {
            let read = self.0.entry(self.1, &object);
            self.0.keep(read)?;
        }
        Ok(())
    }
}
