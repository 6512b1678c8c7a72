//! Walks an encoded message and hands its fields to a renderer, in order of their numbers.

use super::schema::{Display, FieldKind, FieldShape, MessageShape, Schema};
use super::wire::{
    MAX_DEPTH, Record, WireFault, WireValue, put_varint, read_varint, records, unzigzag,
};
use super::words;

/// Where the fields of messages go.
pub(crate) trait Render {
    /// Says whether numbers are to be replaced by what they mean.
    fn for_people(&self) -> bool;
    /// Begins a message.
    fn begin_message(&mut self);
    /// Ends the message begun last.
    fn end_message(&mut self);
    /// Begins the values of a repeated field.
    fn begin_list(&mut self);
    /// Ends the list begun last.
    fn end_list(&mut self);
    /// Names the value to come.
    fn key(&mut self, name: &str);
    /// Takes a value.
    fn scalar(&mut self, value: Scalar<'_>);
    /// Takes the fields of the message begun last that the schema does not know, as they stand.
    fn unknown(&mut self, bytes: &[u8]);
}

/// A value of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar<'a> {
    Unsigned(u64),
    Signed(i64),
    Hex(u64),
    Bool(bool),
    Word(&'a str),
    Text(&'a [u8]),
    SocketName(&'a [u8]),
    Bytes(&'a [u8]),
}

/// A fault and its offset in the outermost message.
pub(crate) type Fault = (usize, WireFault);

/// Hands the fields of a message to a renderer, between `begin_message` and `end_message`.
pub(crate) fn render_fields(
    to: &mut impl Render,
    shape: &MessageShape,
    message: &[u8],
) -> Result<(), Fault> {
    let outermost = Place {
        base: 0,
        depth: MAX_DEPTH,
        hex: false,
    };
    fields(to, shape, message, outermost)
}

/// Where a message stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Its offset in the outermost message.
    base: usize,
    /// How much deeper messages may be nested.
    depth: u32,
    /// Whether the field that holds it is shown in hexadecimal, and so are all fields within.
    hex: bool,
}

fn fields(
    to: &mut impl Render,
    shape: &MessageShape,
    message: &[u8],
    place: Place,
) -> Result<(), Fault> {
    let base = place.base;
    if place.depth == 0 {
        return Err((base, WireFault::Depth));
    }
    let (known, unknown) = split(shape, message).map_err(|(at, fault)| (base + at, fault))?;
    for group in known.chunk_by(|a, b| a.number == b.number) {
        let field = shape.field(group[0].number).expect("known field");
        to.key(&field.name);
        if let (Display::Address, true) = (field.display, to.for_people())
            && let Some(address) = address(group)
        {
            to.begin_list();
            to.scalar(Scalar::Word(&address));
            to.end_list();
            continue;
        }
        if field.repeated {
            to.begin_list();
        }
        for record in group {
            value(to, field, record, place)?;
        }
        if field.repeated {
            to.end_list();
        }
    }
    if !unknown.is_empty() {
        to.unknown(&unknown);
    }
    Ok(())
}

fn address(group: &[Record<'_>]) -> Option<String> {
    let word = |record: &Record<'_>| match record.value {
        WireValue::Varint(word) => Some(word),
        _ => None,
    };
    words::address(&group.iter().map(word).collect::<Option<Vec<_>>>()?)
}

/// Sorts records by number, and sets aside those that the schema cannot say: their bytes are kept.
fn split<'a>(shape: &MessageShape, message: &'a [u8]) -> Result<(Vec<Record<'a>>, Vec<u8>), Fault> {
    let mut known: Vec<Record<'a>> = Vec::new();
    let mut unknown = Vec::new();
    for record in records(message) {
        let record = record?;
        let field = shape.field(record.number);
        match field {
            Some(field) if fits(field, &record) => known.push(record),
            Some(field) if field.repeated => match unpacked(field, &record) {
                Some(elements) => known.extend(elements),
                None => unknown.extend_from_slice(record.raw),
            },
            _ => unknown.extend_from_slice(record.raw),
        }
    }
    if !known.is_sorted_by_key(|record| record.number) {
        known.sort_by_key(|record| record.number);
    }
    // Of a field given twice the last one counts; the others are kept beside it.
    let twice = |pair: &[Record<'_>]| {
        pair[0].number == pair[1].number && !shape.field(pair[0].number).is_some_and(|f| f.repeated)
    };
    if known.windows(2).any(twice) {
        let superseded: Vec<bool> = known.windows(2).map(twice).chain([false]).collect();
        let mut superseded = superseded.iter();
        known.retain(|record| {
            let drop = *superseded.next().expect("one for each");
            if drop {
                unknown.extend_from_slice(record.raw);
            }
            !drop
        });
    }
    Ok((known, unknown))
}

/// Says whether a record is what a writer of this schema would write for some value.
fn fits(field: &FieldShape, record: &Record<'_>) -> bool {
    match (&field.kind, record.value) {
        (FieldKind::Fixed64, WireValue::Fixed64(_))
        | (FieldKind::Fixed32, WireValue::Fixed32(_)) => true,
        (FieldKind::Text | FieldKind::Bytes | FieldKind::Message(_), WireValue::Bytes(_)) => true,
        (_, WireValue::Varint(value)) => in_range(&field.kind, value) && is_shortest(record, value),
        _ => false,
    }
}

fn is_shortest(record: &Record<'_>, value: u64) -> bool {
    let mut shortest = Vec::with_capacity(15);
    put_varint(&mut shortest, u64::from(record.number) << 3);
    put_varint(&mut shortest, value);
    shortest == record.raw
}

fn in_range(kind: &FieldKind, value: u64) -> bool {
    match kind {
        FieldKind::Uint32 | FieldKind::Sint32 => u32::try_from(value).is_ok(),
        FieldKind::Int32 | FieldKind::Enum(_) => i32::try_from(value.cast_signed()).is_ok(),
        FieldKind::Bool => value <= 1,
        FieldKind::Uint64 | FieldKind::Int64 | FieldKind::Sint64 => true,
        _ => false,
    }
}

/// Takes the elements out of a packed record, as if each had come by itself.
fn unpacked<'a>(field: &FieldShape, record: &Record<'a>) -> Option<Vec<Record<'a>>> {
    let WireValue::Bytes(mut rest) = record.value else {
        return None;
    };
    let mut elements = Vec::new();
    while !rest.is_empty() {
        let (value, len) = match field.kind {
            FieldKind::Fixed64 => {
                let word = rest.first_chunk::<8>()?;
                (WireValue::Fixed64(u64::from_le_bytes(*word)), 8)
            }
            FieldKind::Fixed32 => {
                let word = rest.first_chunk::<4>()?;
                (WireValue::Fixed32(u32::from_le_bytes(*word)), 4)
            }
            _ => {
                let (value, len) = read_varint(rest).ok()?;
                if !in_range(&field.kind, value) {
                    return None;
                }
                (WireValue::Varint(value), len)
            }
        };
        elements.push(Record { value, ..*record });
        rest = &rest[len..];
    }
    (!elements.is_empty()).then_some(elements)
}

fn value(
    to: &mut impl Render,
    field: &FieldShape,
    record: &Record<'_>,
    place: Place,
) -> Result<(), Fault> {
    let display = match field.display {
        Display::Plain if place.hex => Display::Hex,
        display => display,
    };
    match (&field.kind, record.value) {
        (FieldKind::Message(index), WireValue::Bytes(bytes)) => {
            let inner = Place {
                base: place.base + record.offset + record.raw.len() - bytes.len(),
                depth: place.depth - 1,
                hex: matches!(display, Display::Hex),
            };
            to.begin_message();
            fields(to, Schema::get().at(*index), bytes, inner)?;
            to.end_message();
        }
        (FieldKind::Text, WireValue::Bytes(bytes)) => to.scalar(Scalar::Text(bytes)),
        (FieldKind::Bytes, WireValue::Bytes(bytes)) => match field.display {
            Display::SocketName => to.scalar(Scalar::SocketName(bytes)),
            _ => to.scalar(Scalar::Bytes(bytes)),
        },
        (kind, WireValue::Varint(value)) => integer(to, kind, display, value),
        (_, WireValue::Fixed64(value)) => unsigned(to, display, value),
        (_, WireValue::Fixed32(value)) => unsigned(to, display, u64::from(value)),
        _ => unreachable!("records that do not fit their field have been set aside"),
    }
    Ok(())
}

fn integer(to: &mut impl Render, kind: &FieldKind, display: Display, value: u64) {
    match kind {
        FieldKind::Bool => to.scalar(Scalar::Bool(value != 0)),
        FieldKind::Int32 | FieldKind::Int64 => to.scalar(Scalar::Signed(value.cast_signed())),
        FieldKind::Sint32 | FieldKind::Sint64 => to.scalar(Scalar::Signed(unzigzag(value))),
        FieldKind::Enum(values) => {
            let number = value.cast_signed();
            let named = values.iter().find(|(_, n)| i64::from(*n) == number);
            to.scalar(named.map_or(Scalar::Signed(number), |(name, _)| Scalar::Word(name)));
        }
        _ => unsigned(to, display, value),
    }
}

fn unsigned(to: &mut impl Render, display: Display, value: u64) {
    if !to.for_people() {
        return to.scalar(Scalar::Unsigned(value));
    }
    match display {
        Display::Hex => to.scalar(Scalar::Hex(value)),
        Display::KernelDevice => to.scalar(Scalar::Word(&words::device(value, false))),
        Display::UserDevice => to.scalar(Scalar::Word(&words::device(value, true))),
        Display::Flags(words) => to.scalar(Scalar::Word(&words::join_flags(words, value))),
        Display::Word(words) => {
            to.scalar(words::name_of(words, value).map_or(Scalar::Unsigned(value), Scalar::Word))
        }
        Display::Plain | Display::Address | Display::SocketName => {
            to.scalar(Scalar::Unsigned(value));
        }
    }
}
