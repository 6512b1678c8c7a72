//! What follows a message, as the `extra` of a JSON entry.

use std::io::{self, Read, Write};

use super::decode::{DecodeError, rendered};
use super::json::{JsonStyle, JsonWriter};
use super::render::{Render, Scalar};
use super::schema::{MessageShape, Schema};
use super::wire::{WireValue, records};
use crate::{ImageKind, ImageReadError, ImageReader, Payload};

/// What a message says about its payload.
#[derive(Debug)]
pub(crate) struct Sizes(Vec<(&'static str, u64)>);

impl Sizes {
    /// Collects the numbers of a message.
    pub(crate) fn of(shape: &'static MessageShape, message: &[u8]) -> Self {
        let numbers = records(message).flatten().filter_map(|record| {
            let WireValue::Varint(value) = record.value else {
                return None;
            };
            Some((&*shape.field(record.number)?.name, value))
        });
        Self(numbers.take(64).collect())
    }

    /// Gives a number, or 0 where it is absent.
    pub(crate) fn get(&self, field: &str) -> u64 {
        let found = self.0.iter().rev().find(|(name, _)| *name == field);
        found.map_or(0, |(_, value)| *value)
    }
}

/// Decodes what stands after a message.
pub(crate) fn payload<R: Read>(
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
