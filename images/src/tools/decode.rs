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

use super::extra::{Sizes, payload};
use super::json::{JsonStyle, JsonWriter};
use super::render::{Render, render_fields};
use super::schema::{MessageShape, Schema};
use super::wire::WireFault;
use crate::{EntryPlace, Header, ImageKind, ImageReadError, ImageReader};

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
