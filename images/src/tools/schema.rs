//! The schema in the form that the tools walk: messages with their fields by number.
//!
//! Built once from the checked-in descriptors.

use std::collections::HashMap;
use std::sync::OnceLock;

use prost_reflect::{DescriptorPool, FieldDescriptor, Kind, Value};

use super::words::{self, Words};

/// All messages.
#[derive(Debug)]
pub(crate) struct Schema {
    messages: Vec<MessageShape>,
    by_name: HashMap<String, usize>,
}

/// A message and its fields, by number.
#[derive(Debug)]
pub(crate) struct MessageShape {
    pub(crate) name: String,
    pub(crate) fields: Vec<FieldShape>,
}

/// A field.
#[derive(Debug)]
pub(crate) struct FieldShape {
    pub(crate) name: String,
    pub(crate) number: u32,
    pub(crate) repeated: bool,
    pub(crate) required: bool,
    pub(crate) kind: FieldKind,
    pub(crate) display: Display,
}

/// What the field holds.
#[derive(Debug)]
pub(crate) enum FieldKind {
    Uint32,
    Uint64,
    Int32,
    Int64,
    Sint32,
    Sint64,
    Bool,
    Fixed32,
    Fixed64,
    Enum(Vec<(String, i32)>),
    Text,
    Bytes,
    Message(usize),
}

/// How a field is shown to people.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Display {
    Plain,
    Hex,
    Address,
    /// Major and minor number in the kernel's own encoding.
    KernelDevice,
    /// Major and minor number in the encoding of `st_dev`.
    UserDevice,
    Flags(Words),
    Word(Words),
    /// Bytes of a socket name, quoted-printable in JSON of either form.
    SocketName,
}

impl Schema {
    /// Gives the schema.
    pub(crate) fn get() -> &'static Schema {
        static SCHEMA: OnceLock<Schema> = OnceLock::new();
        SCHEMA.get_or_init(Schema::build)
    }

    fn build() -> Schema {
        let pool = DescriptorPool::decode(firn_proto::DESCRIPTORS)
            .expect("the checked-in descriptors are valid");
        let wanted = |name: &str| !name.starts_with("google.");
        let messages: Vec<_> = pool
            .all_messages()
            .filter(|message| wanted(message.full_name()))
            .collect();
        let by_name: HashMap<_, _> = messages
            .iter()
            .enumerate()
            .map(|(index, message)| (message.full_name().to_owned(), index))
            .collect();
        let shapes = messages.iter().map(|message| {
            let mut fields: Vec<_> = message
                .fields()
                .map(|field| FieldShape::of(&pool, &field, &by_name))
                .collect();
            fields.sort_by_key(|field| field.number);
            MessageShape {
                name: message.full_name().to_owned(),
                fields,
            }
        });
        Schema {
            messages: shapes.collect(),
            by_name,
        }
    }

    /// Gives a message of the table of kinds.
    pub(crate) fn message(&'static self, name: &str) -> &'static MessageShape {
        self.at(self.by_name[name])
    }

    /// Gives the message of a field.
    pub(crate) fn at(&'static self, index: usize) -> &'static MessageShape {
        &self.messages[index]
    }
}

impl MessageShape {
    /// Finds a field by its number.
    pub(crate) fn field(&self, number: u32) -> Option<&FieldShape> {
        let found = self.fields.binary_search_by_key(&number, |f| f.number);
        found.ok().map(|index| &self.fields[index])
    }
}

impl FieldShape {
    fn of(
        pool: &DescriptorPool,
        field: &FieldDescriptor,
        messages: &HashMap<String, usize>,
    ) -> Self {
        let kind = match field.kind() {
            Kind::Uint32 => FieldKind::Uint32,
            Kind::Uint64 => FieldKind::Uint64,
            Kind::Int32 => FieldKind::Int32,
            Kind::Int64 => FieldKind::Int64,
            Kind::Sint32 => FieldKind::Sint32,
            Kind::Sint64 => FieldKind::Sint64,
            Kind::Bool => FieldKind::Bool,
            Kind::Fixed32 => FieldKind::Fixed32,
            Kind::Fixed64 => FieldKind::Fixed64,
            Kind::String => FieldKind::Text,
            Kind::Bytes => FieldKind::Bytes,
            Kind::Enum(values) => FieldKind::Enum(
                values
                    .values()
                    .map(|value| (value.name().to_owned(), value.number()))
                    .collect(),
            ),
            Kind::Message(message) => FieldKind::Message(messages[message.full_name()]),
            other => unreachable!("no message of the schema has a {other:?}"),
        };
        FieldShape {
            name: field.name().to_owned(),
            number: field.number(),
            repeated: field.is_list(),
            required: field.is_required(),
            kind,
            display: display_of(pool, field),
        }
    }
}

/// Reads the `criu` option of a field.
fn display_of(pool: &DescriptorPool, field: &FieldDescriptor) -> Display {
    let extension = pool
        .get_extension_by_name("criu")
        .expect("opts.proto declares it");
    let options = field.options();
    let Some(shown) = options
        .has_extension(&extension)
        .then(|| options.get_extension(&extension).into_owned())
    else {
        return Display::Plain;
    };
    let shown = shown.as_message().expect("the option is a message");
    let on = |name| {
        matches!(
            shown.get_field_by_name(name).as_deref(),
            Some(Value::Bool(true))
        )
    };
    let text = |name| match shown.get_field_by_name(name).as_deref() {
        Some(Value::String(text)) if !text.is_empty() => Some(text.clone()),
        _ => None,
    };
    if let Some(flags) = text("flags") {
        return words::flags(&flags).map_or(Display::Hex, Display::Flags);
    }
    if let Some(dict) = text("dict") {
        return words::dict(&dict, field.name()).map_or(Display::Plain, Display::Word);
    }
    match () {
        () if text("conv").is_some() => Display::SocketName,
        () if on("hex") => Display::Hex,
        () if on("ipadd") => Display::Address,
        () if on("dev") && on("odev") => Display::UserDevice,
        () if on("dev") => Display::KernelDevice,
        () => Display::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_ordered_and_options_read() {
        let vma = Schema::get().message("vma_entry");
        assert!(vma.fields.is_sorted_by_key(|field| field.number));
        assert!(matches!(vma.field(1).unwrap().display, Display::Hex));
        assert!(matches!(vma.field(5).unwrap().display, Display::Flags(_)));
        let socket = Schema::get().message("unix_sk_entry");
        assert!(matches!(
            socket.field(11).unwrap().display,
            Display::SocketName
        ));
        let ghost = Schema::get().message("ghost_file_entry");
        assert!(matches!(
            ghost.field(4).unwrap().display,
            Display::KernelDevice
        ));
        assert!(matches!(
            ghost.field(6).unwrap().display,
            Display::UserDevice
        ));
    }

    #[test]
    fn every_message_of_every_kind_is_there() {
        for kind in crate::ImageKind::all() {
            for name in kind.info().messages {
                assert_eq!(&Schema::get().message(name).name, name);
            }
        }
    }
}
