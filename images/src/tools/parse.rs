//! JSON objects back to encoded messages.

use serde_json::{Map, Value};

use super::json::{RAW_TEXT, UNKNOWN};
use super::json_fault::{JsonFault, JsonFaultKind};
use super::schema::{Display, FieldKind, FieldShape, MessageShape, Schema};
use super::text::{from_base64, from_quoted};
use super::wire::{MAX_DEPTH, WireFault, put_bytes, put_tag, put_varint, records, zigzag};
use super::words;

/// Encodes an object as a message; keys in `others` are none of its fields and are passed over.
pub(crate) fn message(
    shape: &MessageShape,
    object: &Map<String, Value>,
    others: &[&str],
) -> Result<Vec<u8>, JsonFault> {
    let mut out = Vec::new();
    fields(&mut out, shape, object, others, MAX_DEPTH)?;
    Ok(out)
}

fn fields(
    out: &mut Vec<u8>,
    shape: &MessageShape,
    object: &Map<String, Value>,
    others: &[&str],
    depth: u32,
) -> Result<(), JsonFault> {
    let too_deep = || JsonFault::here(JsonFaultKind::Depth(WireFault::Depth));
    let depth = depth.checked_sub(1).ok_or_else(too_deep)?;
    let name = || shape.name.clone();
    let kept = object.get(UNKNOWN).map(unknown).transpose()?;
    let mut kept = kept.unwrap_or_default().into_iter().peekable();
    let mut found = usize::from(object.contains_key(UNKNOWN));
    for field in &shape.fields {
        let mut given = false;
        while let Some((number, raw)) = kept.next_if(|(number, _)| *number <= field.number) {
            out.extend_from_slice(&raw);
            given |= number == field.number;
        }
        let Some(value) = object.get(&field.name) else {
            if field.required && !given {
                let what = JsonFaultKind::Required { message: name() };
                return Err(JsonFault::here(what).within(&field.name));
            }
            continue;
        };
        found += 1;
        values(out, field, value, depth).map_err(|fault| fault.within(&field.name))?;
    }
    kept.for_each(|(_, raw)| out.extend_from_slice(&raw));
    found += others
        .iter()
        .filter(|key| object.contains_key(**key))
        .count();
    if found < object.len() {
        let known = |key: &String| {
            key == UNKNOWN
                || others.contains(&&**key)
                || shape.fields.iter().any(|f| f.name == *key)
        };
        let key = object.keys().find(|key| !known(key)).cloned();
        let what = JsonFaultKind::NoField { message: name() };
        return Err(JsonFault::here(what).within(&key.unwrap_or_default()));
    }
    Ok(())
}

/// Reads fields that the schema does not know, by number.
fn unknown(value: &Value) -> Result<Vec<(u32, Vec<u8>)>, JsonFault> {
    let invalid = |encoding| JsonFault::here(JsonFaultKind::Encoding { encoding }).within(UNKNOWN);
    let text = value.as_str().ok_or_else(|| invalid("base64"))?;
    let bytes = from_base64(text).ok_or_else(|| invalid("base64"))?;
    let mut kept = Vec::new();
    for record in records(&bytes) {
        let record = record.map_err(|_| invalid("message"))?;
        kept.push((record.number, record.raw.to_vec()));
    }
    kept.sort_by_key(|(number, _)| *number);
    Ok(kept)
}

fn values(
    out: &mut Vec<u8>,
    field: &FieldShape,
    given: &Value,
    depth: u32,
) -> Result<(), JsonFault> {
    if !field.repeated {
        return value(out, field, given, depth);
    }
    let Value::Array(list) = given else {
        return Err(JsonFault::of_type(given, "a list"));
    };
    for (index, item) in list.iter().enumerate() {
        let in_item = |fault: JsonFault| fault.within(&index.to_string());
        match (field.display, item) {
            (Display::Address, Value::String(text)) => {
                let address = words::parse_address(text);
                let wrong = || in_item(JsonFault::of_type(item, "a network address"));
                for word in address.ok_or_else(wrong)? {
                    put_tag(out, field.number, 0);
                    put_varint(out, word);
                }
            }
            _ => value(out, field, item, depth).map_err(in_item)?,
        }
    }
    Ok(())
}

fn value(
    out: &mut Vec<u8>,
    field: &FieldShape,
    given: &Value,
    depth: u32,
) -> Result<(), JsonFault> {
    let wrong = |expected| JsonFault::of_type(given, expected);
    match &field.kind {
        FieldKind::Message(index) => {
            let object = given.as_object().ok_or_else(|| wrong("an object"))?;
            let mut inner = Vec::new();
            fields(&mut inner, Schema::get().at(*index), object, &[], depth)?;
            put_bytes(out, field.number, &inner);
        }
        FieldKind::Text => put_bytes(out, field.number, &text(given)?),
        FieldKind::Bytes => put_bytes(out, field.number, &bytes(field, given)?),
        FieldKind::Fixed64 => {
            let number = unsigned(field, given).ok_or_else(|| wrong("a number"))?;
            put_tag(out, field.number, 1);
            out.extend_from_slice(&number.to_le_bytes());
        }
        FieldKind::Fixed32 => {
            let number = unsigned(field, given).and_then(|n| u32::try_from(n).ok());
            put_tag(out, field.number, 5);
            out.extend_from_slice(
                &number
                    .ok_or_else(|| wrong("a 32-bit number"))?
                    .to_le_bytes(),
            );
        }
        kind => {
            let number = integer(field, kind, given)?;
            put_tag(out, field.number, 0);
            put_varint(out, number);
        }
    }
    Ok(())
}

fn text(given: &Value) -> Result<Vec<u8>, JsonFault> {
    let raw = given.as_object().filter(|object| object.len() == 1);
    if let Some(Value::String(encoded)) = raw.and_then(|object| object.get(RAW_TEXT)) {
        let encoding = "base64";
        let invalid = || JsonFault::here(JsonFaultKind::Encoding { encoding });
        return from_base64(encoded).ok_or_else(invalid);
    }
    let text = given.as_str();
    let text = text.ok_or_else(|| JsonFault::of_type(given, "a string"))?;
    Ok(text.as_bytes().to_vec())
}

fn bytes(field: &FieldShape, given: &Value) -> Result<Vec<u8>, JsonFault> {
    let text = given.as_str();
    let text = text.ok_or_else(|| JsonFault::of_type(given, "a string"))?;
    let (decoded, encoding) = match field.display {
        Display::SocketName => (from_quoted(text), "quoted-printable text"),
        _ => (from_base64(text), "base64"),
    };
    decoded.ok_or_else(|| JsonFault::here(JsonFaultKind::Encoding { encoding }))
}

/// Gives the varint of a number.
fn integer(field: &FieldShape, kind: &FieldKind, given: &Value) -> Result<u64, JsonFault> {
    let (number, expected) = match kind {
        FieldKind::Bool => (given.as_bool().map(u64::from), "true or false"),
        FieldKind::Uint32 => {
            let number = unsigned(field, given).filter(|n| u32::try_from(*n).is_ok());
            (number, "a 32-bit number or the words for one")
        }
        FieldKind::Uint64 => (
            unsigned(field, given),
            "a 64-bit number or the words for one",
        ),
        FieldKind::Int32 => (
            signed32(given).map(i64::cast_unsigned),
            "a signed 32-bit number",
        ),
        FieldKind::Sint32 => (signed32(given).map(zigzag), "a signed 32-bit number"),
        FieldKind::Int64 => (
            given.as_i64().map(i64::cast_unsigned),
            "a signed 64-bit number",
        ),
        FieldKind::Sint64 => (given.as_i64().map(zigzag), "a signed 64-bit number"),
        FieldKind::Enum(values) => {
            let named = |text: &str| values.iter().find(|(name, _)| name == text);
            let number = match given {
                Value::String(text) => named(text).map(|(_, number)| i64::from(*number)),
                _ => signed32(given),
            };
            (
                number.map(i64::cast_unsigned),
                "a name or number of this enum",
            )
        }
        _ => unreachable!("only numbers come here"),
    };
    number.ok_or_else(|| JsonFault::of_type(given, expected))
}

fn signed32(given: &Value) -> Option<i64> {
    given.as_i64().filter(|n| i32::try_from(*n).is_ok())
}

/// Reads a number, or the words that stand for it where it is shown to people.
fn unsigned(field: &FieldShape, given: &Value) -> Option<u64> {
    let Value::String(text) = given else {
        return given.as_u64();
    };
    match field.display {
        Display::Flags(words) => words::split_flags(words, text),
        Display::Word(words) => words::value_of(words, text),
        Display::KernelDevice => words::parse_device(text, false),
        Display::UserDevice => words::parse_device(text, true),
        Display::Hex | Display::Plain | Display::Address | Display::SocketName => {
            words::number(text)
        }
    }
}
