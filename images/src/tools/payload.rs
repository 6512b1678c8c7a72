//! The `extra` of a JSON entry back to the bytes that follow its message.

use serde_json::Value;

use super::extra::{Sizes, round_up};
use super::json_fault::{JsonFault, JsonFaultKind};
use super::parse;
use super::schema::{MessageShape, Schema};
use super::text::from_base64;
use crate::{ImageKind, Payload};

/// Encodes the payload of the entry with this index; `message` says how long it has to be.
pub(crate) fn payload(
    kind: ImageKind,
    index: u64,
    shape: &'static MessageShape,
    message: &[u8],
    extra: Option<&Value>,
) -> Result<Vec<u8>, JsonFault> {
    let sizes = Sizes::of(shape, message);
    match kind.info().payload {
        Payload::Nothing => Ok(Vec::new()),
        Payload::Lengths(_) if kind == ImageKind::TcpStream => queues(&sizes, extra),
        Payload::Lengths(fields) => {
            let len = fields.iter().map(|field| sizes.get(field));
            exact(extra, len.fold(0, u64::saturating_add))
        }
        Payload::Ghost if index > 0 => exact(extra, sizes.get("len")),
        Payload::Ghost if sizes.get("chunks") == 0 => base64(extra),
        Payload::Ghost => exact(extra, 0),
        Payload::IpcShm => match sizes.get("in_pagemaps") {
            0 => padded(extra, sizes.get("size"), 4),
            _ => exact(extra, 0),
        },
        Payload::IpcMsg => messages(&sizes, extra),
        Payload::IpcSem => semaphores(&sizes, extra),
    }
}

/// Reads base64; a missing value has no bytes.
fn base64(value: Option<&Value>) -> Result<Vec<u8>, JsonFault> {
    let Some(value) = value else {
        return Ok(Vec::new());
    };
    let text = value.as_str();
    let text = text.ok_or_else(|| JsonFault::of_type(value, "a string of base64"))?;
    let encoding = "base64";
    from_base64(text).ok_or_else(|| JsonFault::here(JsonFaultKind::Encoding { encoding }))
}

fn count(len: usize) -> u64 {
    u64::try_from(len).expect("usize fits")
}

fn check_len(found: usize, expected: u64) -> Result<(), JsonFault> {
    let found = count(found);
    match found == expected {
        true => Ok(()),
        false => Err(JsonFault::here(JsonFaultKind::Length { found, expected })),
    }
}

fn exact(value: Option<&Value>, len: u64) -> Result<Vec<u8>, JsonFault> {
    let bytes = base64(value)?;
    check_len(bytes.len(), len)?;
    Ok(bytes)
}

/// Reads bytes and fills them up with zeros, unless the filling is given.
fn padded(value: Option<&Value>, len: u64, unit: u64) -> Result<Vec<u8>, JsonFault> {
    let mut bytes = base64(value)?;
    if count(bytes.len()) != round_up(len, unit) {
        check_len(bytes.len(), len)?;
        let unit = usize::try_from(unit).expect("a few bytes");
        bytes.resize(bytes.len().next_multiple_of(unit), 0);
    }
    Ok(bytes)
}

fn queues(sizes: &Sizes, extra: Option<&Value>) -> Result<Vec<u8>, JsonFault> {
    let mut bytes = Vec::new();
    for (key, field) in [("inq", "inq_len"), ("outq", "outq_len")] {
        let queue = extra.and_then(|extra| extra.get(key));
        let queue = exact(queue, sizes.get(field)).map_err(|fault| fault.within(key))?;
        bytes.extend_from_slice(&queue);
    }
    Ok(bytes)
}

fn list(value: Option<&Value>) -> Result<&[Value], JsonFault> {
    match value {
        None => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(JsonFault::of_type(other, "a list")),
    }
}

fn messages(sizes: &Sizes, extra: Option<&Value>) -> Result<Vec<u8>, JsonFault> {
    let shape = Schema::get().message("ipc_msg");
    let items = list(extra)?;
    check_len(items.len(), sizes.get("qnum").saturating_mul(2))?;
    let mut bytes = Vec::new();
    for (index, pair) in items.chunks_exact(2).enumerate() {
        let within = |fault: JsonFault| fault.within(&index.to_string());
        let object = pair[0].as_object();
        let object = object.ok_or_else(|| within(JsonFault::of_type(&pair[0], "an object")))?;
        let message = parse::message(shape, object, &[]).map_err(within)?;
        let len = Sizes::of(shape, &message).get("msize");
        let text = padded(Some(&pair[1]), len, 8).map_err(within)?;
        let message_len = u32::try_from(message.len()).expect("two numbers and kept fields");
        bytes.extend_from_slice(&message_len.to_le_bytes());
        bytes.extend_from_slice(&message);
        bytes.extend_from_slice(&text);
    }
    Ok(bytes)
}

fn semaphores(sizes: &Sizes, extra: Option<&Value>) -> Result<Vec<u8>, JsonFault> {
    let nsems = sizes.get("nsems");
    let items = list(extra)?;
    let rounded = round_up(nsems.saturating_mul(2), 8);
    if count(items.len()).saturating_mul(2) != rounded {
        check_len(items.len(), nsems)?;
    }
    let mut bytes = Vec::new();
    for item in items {
        let value = item.as_u64().and_then(|value| u16::try_from(value).ok());
        let value = value.ok_or_else(|| JsonFault::of_type(item, "a 16-bit number"))?;
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    Ok(bytes)
}
