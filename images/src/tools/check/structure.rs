//! Each file by itself: magic, lengths, messages, payload, number of entries.

use std::path::Path;

use super::fault::Fault;
use super::report::Problem;
use crate::tools::decode::{DecodeError, open, shape_of};
use crate::tools::extra::{Sizes, skip_payload};
use crate::tools::schema::{FieldKind, MessageShape, Schema};
use crate::tools::wire::{MAX_DEPTH, WireFault, WireValue, records};
use crate::{Entries, EntryPlace, ImageFile, ImageReadError};

/// Reads a whole file and lists what is wrong with it, up to where reading stops making sense.
pub(super) fn check_file(dir: &Path, file: &ImageFile) -> Vec<Problem> {
    let mut problems = Vec::new();
    if let Err(error) = walk(dir, file, &mut problems) {
        let place = place_of(&error);
        problems.push(Problem {
            file: file.name.clone(),
            entry: place.map(|place| place.entry),
            offset: place.map(|place| place.offset),
            fault: Fault::Decode(error),
        });
    }
    problems
}

fn walk(dir: &Path, file: &ImageFile, problems: &mut Vec<Problem>) -> Result<(), DecodeError> {
    let mut image = open(&dir.join(&file.name))?;
    let mut index = 0;
    loop {
        let place = image.place();
        let shape = shape_of(file.kind, index);
        let Some(message) = image.next_bytes()? else {
            break;
        };
        let mut missing = Vec::new();
        required(shape, message, MAX_DEPTH, &mut missing).map_err(|(at, source)| {
            let at = u64::try_from(at).expect("usize fits");
            let offset = place.offset + 4 + at;
            DecodeError::Message {
                place: EntryPlace {
                    offset,
                    ..place.clone()
                },
                message: shape.name.clone(),
                source,
            }
        })?;
        problems.extend(missing.into_iter().map(|fault| Problem {
            file: file.name.clone(),
            entry: Some(place.entry),
            offset: Some(place.offset),
            fault,
        }));
        let sizes = Sizes::of(shape, message);
        skip_payload(&mut image, index, &sizes)?;
        index += 1;
    }
    let expected = match file.kind.info().entries {
        Entries::One if index == 0 => Some("one"),
        Entries::One if index > 1 && file.kind.info().messages.len() == 1 => Some("one"),
        Entries::HeadThenMany if index == 0 => Some("at least one"),
        _ => None,
    };
    problems.extend(expected.map(|expected| Problem {
        file: file.name.clone(),
        entry: None,
        offset: None,
        fault: Fault::Entries {
            found: index,
            expected,
        },
    }));
    Ok(())
}

/// Finds required fields that are absent.
fn required(
    shape: &MessageShape,
    message: &[u8],
    depth: u32,
    missing: &mut Vec<Fault>,
) -> Result<(), crate::tools::render::Fault> {
    let depth = depth.checked_sub(1).ok_or((0, WireFault::Depth))?;
    let mut seen = Vec::new();
    for record in records(message) {
        let record = record?;
        let Some(field) = shape.field(record.number) else {
            continue;
        };
        if field.required {
            seen.push(record.number);
        }
        if let (FieldKind::Message(inner), WireValue::Bytes(bytes)) = (&field.kind, record.value) {
            let base = record.offset + record.raw.len() - bytes.len();
            required(Schema::get().at(*inner), bytes, depth, missing)
                .map_err(|(at, fault)| (base + at, fault))?;
        }
    }
    let absent = shape
        .fields
        .iter()
        .filter(|f| f.required && !seen.contains(&f.number));
    missing.extend(absent.map(|field| Fault::Required {
        message: shape.name.clone(),
        field: field.name.clone(),
    }));
    Ok(())
}

/// Tells where in the file an error is, if it says so.
pub(super) fn place_of(error: &DecodeError) -> Option<&EntryPlace> {
    match error {
        DecodeError::Message { place, .. } => Some(place),
        DecodeError::Read(
            ImageReadError::Read { place, .. }
            | ImageReadError::StrayBytes { place, .. }
            | ImageReadError::Truncated { place, .. }
            | ImageReadError::TooLong { place, .. }
            | ImageReadError::Decode { place, .. }
            | ImageReadError::NoEntry { place, .. }
            | ImageReadError::Trailing { place, .. },
        ) => Some(place),
        _ => None,
    }
}
