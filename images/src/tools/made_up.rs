//! Messages made up for tests, of any shape.

use proptest::prelude::*;
use proptest::test_runner::TestRng;

use super::schema::{Display, FieldKind, FieldShape, MessageShape, Schema};
use super::wire::{put_bytes, put_tag, put_varint};

/// What is made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Required fields and some of the others.
    Some,
    /// Every field.
    Full,
    /// Every field, with values that crit can say: text of ASCII, enums with names.
    Plain,
}

/// Makes up messages.
#[derive(Debug)]
pub(crate) struct Maker {
    rng: TestRng,
    extent: Extent,
}

impl Maker {
    pub(crate) fn new(rng: TestRng, extent: Extent) -> Self {
        Self { rng, extent }
    }

    /// Makes up a message, nested up to `depth`.
    pub(crate) fn message(&mut self, shape: &MessageShape, depth: u32) -> Vec<u8> {
        let mut out = Vec::new();
        for field in &shape.fields {
            let too_deep = matches!(field.kind, FieldKind::Message(_)) && depth == 0;
            let left_out = self.extent == Extent::Some && self.rng.random_bool(0.5);
            if !field.required && (too_deep || left_out) {
                continue;
            }
            for _ in 0..self.count(field) {
                self.value(&mut out, field, depth);
            }
        }
        out
    }

    fn count(&mut self, field: &FieldShape) -> u32 {
        match (field.repeated, field.display) {
            (false, _) => 1,
            (true, Display::Address) if self.extent == Extent::Plain => 4,
            (true, _) => self.rng.random_range(1..4),
        }
    }

    fn value(&mut self, out: &mut Vec<u8>, field: &FieldShape, depth: u32) {
        let wide = self.rng.random::<u64>() >> self.rng.random_range(0..64);
        let narrow = wide & u64::from(u32::MAX);
        match &field.kind {
            FieldKind::Message(index) => {
                let inner = self.message(Schema::get().at(*index), depth.saturating_sub(1));
                put_bytes(out, field.number, &inner);
            }
            FieldKind::Text | FieldKind::Bytes => {
                let bytes = self.bytes(matches!(field.kind, FieldKind::Text));
                put_bytes(out, field.number, &bytes);
            }
            FieldKind::Fixed64 => {
                put_tag(out, field.number, 1);
                out.extend_from_slice(&wide.to_le_bytes());
            }
            FieldKind::Fixed32 => {
                put_tag(out, field.number, 5);
                out.extend_from_slice(&narrow.to_le_bytes()[..4]);
            }
            kind => {
                put_tag(out, field.number, 0);
                put_varint(out, self.number(kind, wide));
            }
        }
    }

    fn number(&mut self, kind: &FieldKind, wide: u64) -> u64 {
        let signed = |number: i32| i64::from(number).cast_unsigned();
        match kind {
            FieldKind::Uint64 | FieldKind::Int64 | FieldKind::Sint64 => wide,
            FieldKind::Int32 => signed(self.rng.random()),
            FieldKind::Bool => wide & 1,
            FieldKind::Enum(values)
                if self.extent == Extent::Plain || self.rng.random_bool(0.8) =>
            {
                signed(values[self.rng.random_range(0..values.len())].1)
            }
            FieldKind::Enum(_) => signed(self.rng.random()),
            _ => wide & u64::from(u32::MAX),
        }
    }

    fn bytes(&mut self, text: bool) -> Vec<u8> {
        let len = self.rng.random_range(0..200);
        let mut bytes: Vec<u8> = (0..len).map(|_| self.rng.random()).collect();
        if (text && self.extent == Extent::Plain) || self.rng.random_bool(0.3) {
            bytes.iter_mut().for_each(|byte| *byte = b' ' + *byte % 95);
        }
        if self.extent == Extent::Plain {
            // crit loses carriage returns of socket names.
            bytes.retain(|byte| *byte != b'\r');
        }
        bytes
    }
}
