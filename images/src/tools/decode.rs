//! An image as JSON, in the shape that `crit decode` prints.
//!
//! ```text
//! {"magic": NAME, "entries": [ {FIELD: VALUE, ..., "extra": PAYLOAD}, ... ]}
//! ```
//!
//! Only fields that are present appear, in order of their numbers. Enums are names, bytes are
//! base64 in lines of 76 characters, 64-bit numbers are JSON numbers. Two additions keep what
//! crit would lose: `"firn.unknown"` holds fields that the schema does not know, as they stand,
//! and `{"firn.bytes": BASE64}` takes the place of a string that is not UTF-8.

use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use super::json::{JsonStyle, JsonWriter};
use super::render::{Render, Scalar, render_fields};
use super::schema::{MessageShape, Schema};
use super::wire::{WireFault, WireValue, records};
use crate::{EntryPlace, Header, ImageKind, ImageReadError, ImageReader, Payload};

/// Why an image could not be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The image cannot be read.
    #[error(transparent)]
    Read(#[from] ImageReadError),
    /// An entry is not an encoded message.
    #[error("{place}: not a valid {message}")]
    Message {
        /// Where the fault is.
        place: EntryPlace,
        /// Name of the message.
        message: String,
        /// What is wrong.
        source: WireFault,
    },
    /// The file has no entries.
    #[error("{} is a raw file ({tag}) without entries to decode", path.display())]
    Raw {
        /// The file.
        path: PathBuf,
        /// CRIU's name of the kind.
        tag: &'static str,
    },
    /// The text could not be written.
    #[error("cannot write the decoded image")]
    Write(#[source] io::Error),
}

/// Decodes the image at `path` to `out`.
pub fn decode_file(path: &Path, style: JsonStyle, out: impl Write) -> Result<(), DecodeError> {
    decode(open(path)?, style, out)
}

/// Opens a file, which has to have entries.
pub(crate) fn open(path: &Path) -> Result<ImageReader, DecodeError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let kind = name.and_then(ImageKind::of_file_name);
    if let Some(info) = kind.map(|(kind, _)| kind.info())
        && info.header == Header::Raw
    {
        let path = path.to_owned();
        return Err(DecodeError::Raw {
            path,
            tag: info.tag,
        });
    }
    Ok(ImageReader::open_unknown(path)?)
}

/// Decodes an image to `out`.
///
/// # Errors
/// Where the image is damaged, what stands before the damage has been written.
pub fn decode<R: Read>(
    mut image: ImageReader<R>,
    style: JsonStyle,
    out: impl Write,
) -> Result<(), DecodeError> {
    let mut json = JsonWriter::new(BufWriter::with_capacity(1 << 16, out), style);
    let info = image.kind().info();
    json.begin_message();
    json.key("magic");
    json.text(info.crit_name.unwrap_or(info.tag));
    json.key("entries");
    json.begin_list();
    let mut index = 0;
    while !json.has_failed() && entry(&mut image, index, &mut json)? {
        index += 1;
    }
    json.end_list();
    json.end_message();
    json.finish().map_err(DecodeError::Write)
}

/// Gives the message of the entry with this index.
pub(crate) fn shape_of(kind: ImageKind, index: u64) -> &'static MessageShape {
    let messages = kind.info().messages;
    let name = messages[usize::from(index > 0).min(messages.len() - 1)];
    Schema::get().message(name)
}

/// Decodes the next entry; says whether there was one.
fn entry<R: Read>(
    image: &mut ImageReader<R>,
    index: u64,
    json: &mut JsonWriter<impl Write>,
) -> Result<bool, DecodeError> {
    let shape = shape_of(image.kind(), index);
    let place = image.place();
    let Some(message) = image.next_bytes()? else {
        return Ok(false);
    };
    json.begin_message();
    rendered(json, shape, message, place)?;
    let sizes = Sizes::of(shape, message);
    payload(image, index, &sizes, json)?;
    json.end_message();
    Ok(true)
}

/// Renders a message, and gives faults their place in the file.
pub(crate) fn rendered(
    to: &mut impl Render,
    shape: &MessageShape,
    message: &[u8],
    place: EntryPlace,
) -> Result<(), DecodeError> {
    render_fields(to, shape, message).map_err(|(at, source)| {
        let at = u64::try_from(at).expect("usize fits");
        let offset = place.offset + 4 + at;
        DecodeError::Message {
            place: EntryPlace { offset, ..place },
            message: shape.name.clone(),
            source,
        }
    })
}

/// What a message says about its payload.
#[derive(Debug)]
pub(crate) struct Sizes(Vec<(String, u64)>);

impl Sizes {
    /// Collects the numbers of a message.
    pub(crate) fn of(shape: &MessageShape, message: &[u8]) -> Self {
        let numbers = records(message).flatten().filter_map(|record| {
            let WireValue::Varint(value) = record.value else {
                return None;
            };
            Some((shape.field(record.number)?.name.clone(), value))
        });
        Self(numbers.take(64).collect())
    }

    /// Gives a number, or 0 where it is absent.
    pub(crate) fn get(&self, field: &str) -> u64 {
        let found = self.0.iter().rev().find(|(name, _)| name == field);
        found.map_or(0, |(_, value)| *value)
    }
}

/// Decodes what stands after a message.
fn payload<R: Read>(
    image: &mut ImageReader<R>,
    index: u64,
    sizes: &Sizes,
    json: &mut JsonWriter<impl Write>,
) -> Result<(), DecodeError> {
    match image.kind().info().payload {
        Payload::Nothing => Ok(()),
        Payload::Lengths(_) if image.kind() == ImageKind::TcpStream => {
            json.key("extra");
            json.begin_message();
            for (key, field) in [("inq", "inq_len"), ("outq", "outq_len")] {
                json.key(key);
                copied(image, sizes.get(field), json)?;
            }
            json.end_message();
            Ok(())
        }
        Payload::Lengths(fields) => {
            let len = fields.iter().map(|field| sizes.get(field));
            json.key("extra");
            copied(image, len.fold(0, u64::saturating_add), json)
        }
        Payload::Ghost if index > 0 => {
            json.key("extra");
            copied(image, sizes.get("len"), json)
        }
        Payload::Ghost if sizes.get("chunks") == 0 => {
            json.key("extra");
            copied(image, image.remaining(), json)
        }
        Payload::Ghost => Ok(()),
        Payload::IpcShm => {
            json.key("extra");
            let size = match sizes.get("in_pagemaps") {
                0 => sizes.get("size"),
                _ => 0,
            };
            padded(image, size, 4, json)
        }
        Payload::IpcMsg => messages(image, sizes.get("qnum"), json),
        Payload::IpcSem => semaphores(image, sizes.get("nsems"), json),
    }
}

/// Passes over what stands after a message, and checks what can be checked of it.
pub(crate) fn skip_payload<R: Read>(
    image: &mut ImageReader<R>,
    index: u64,
    sizes: &Sizes,
) -> Result<(), DecodeError> {
    let mut nowhere = JsonWriter::new(io::sink(), JsonStyle::Compact);
    payload(image, index, sizes, &mut nowhere)
}

/// Writes payload as it comes, however long.
fn copied<R: Read>(
    image: &mut ImageReader<R>,
    len: u64,
    json: &mut JsonWriter<impl Write>,
) -> Result<(), DecodeError> {
    json.base64(|mut lines| image.copy_payload(len, &mut lines))?
        .map_err(DecodeError::Write)
}

/// Rounds up, or stays at the most that there can be.
pub(crate) fn round_up(len: u64, unit: u64) -> u64 {
    len.checked_next_multiple_of(unit).unwrap_or(u64::MAX)
}

/// Writes payload that is filled up to a multiple of `unit`; the filling appears where it is not
/// zero.
fn padded<R: Read>(
    image: &mut ImageReader<R>,
    len: u64,
    unit: u64,
    json: &mut JsonWriter<impl Write>,
) -> Result<(), DecodeError> {
    let bytes = image.payload(round_up(len, unit))?;
    let len = usize::try_from(len).expect("no longer than what was read");
    let shown = if bytes[len..].iter().all(|byte| *byte == 0) {
        &bytes[..len]
    } else {
        &bytes[..]
    };
    json.scalar(Scalar::Bytes(shown));
    Ok(())
}

/// Writes messages of a queue, each followed by its text.
fn messages<R: Read>(
    image: &mut ImageReader<R>,
    count: u64,
    json: &mut JsonWriter<impl Write>,
) -> Result<(), DecodeError> {
    let shape = Schema::get().message("ipc_msg");
    json.key("extra");
    json.begin_list();
    for _ in 0..count {
        let place = image.place();
        let missing = || ImageReadError::NoEntry {
            place: place.clone(),
            message: "ipc_msg",
        };
        let message = image.next_bytes()?.ok_or_else(missing)?;
        json.begin_message();
        rendered(json, shape, message, place)?;
        json.end_message();
        let len = Sizes::of(shape, message).get("msize");
        padded(image, len, 8, json)?;
    }
    json.end_list();
    Ok(())
}

/// Writes values of semaphores.
fn semaphores<R: Read>(
    image: &mut ImageReader<R>,
    count: u64,
    json: &mut JsonWriter<impl Write>,
) -> Result<(), DecodeError> {
    let bytes = image.payload(round_up(count.saturating_mul(2), 8))?;
    let values: Vec<u16> = bytes
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
        .collect();
    let count = usize::try_from(count).expect("no more than what was read");
    let filled = values[count..].iter().any(|value| *value != 0);
    let shown = if filled {
        &values[..]
    } else {
        &values[..count]
    };
    json.key("extra");
    json.begin_list();
    for value in shown {
        json.scalar(Scalar::Unsigned(u64::from(*value)));
    }
    json.end_list();
    Ok(())
}
