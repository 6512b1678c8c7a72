//! Holds the schema against the tables of facts, row by row in both directions.

use std::collections::BTreeSet;

use firn_proto::{DESCRIPTORS, Message};
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};

/// Numbers from here on are extensions and not in the tables.
const FIRST_EXTENSION: i32 = 20000;

fn files() -> Vec<prost_types::FileDescriptorProto> {
    let set = FileDescriptorSet::decode(DESCRIPTORS).expect("checked-in descriptors decode");
    set.file
        .into_iter()
        .filter(|f| !f.name().starts_with("google/"))
        .collect()
}

fn table(text: &str, columns: usize) -> BTreeSet<String> {
    let rows: Vec<&str> = text.lines().skip(1).collect();
    let set: BTreeSet<String> = rows
        .iter()
        .map(|row| row.split('\t').take(columns).collect::<Vec<_>>().join("\t"))
        .collect();
    assert_eq!(rows.len(), set.len(), "a row stands twice in the table");
    set
}

fn label(field: &FieldDescriptorProto) -> &'static str {
    match field.label() {
        Label::Optional => "optional",
        Label::Required => "required",
        Label::Repeated => "repeated",
    }
}

fn type_name(field: &FieldDescriptorProto) -> String {
    let referred = field.type_name().trim_start_matches('.');
    match field.r#type() {
        Type::Message => format!("message:{referred}"),
        Type::Enum => format!("enum:{referred}"),
        scalar => scalar
            .as_str_name()
            .trim_start_matches("TYPE_")
            .to_lowercase(),
    }
}

fn is_firn(name: &str) -> bool {
    name.starts_with("firn_")
}

/// CRIU counts kinds of files from 0 up and from 65535 down.
fn is_extension(value: i32) -> bool {
    (FIRST_EXTENSION..FIRST_EXTENSION + 1000).contains(&value)
}

fn field_rows(file: &str, message: &DescriptorProto) -> Vec<String> {
    assert!(
        message.nested_type.is_empty(),
        "the tables know no nested messages"
    );
    let known = message
        .field
        .iter()
        .filter(|f| f.number() < FIRST_EXTENSION);
    known
        .map(|f| {
            let default = f.default_value.as_deref().unwrap_or("-");
            let (name, number) = (f.name(), f.number());
            let (label, ty) = (label(f), type_name(f));
            format!(
                "{file}\t{}\t{name}\t{number}\t{label}\t{ty}\t{default}",
                message.name()
            )
        })
        .collect()
}

fn enum_rows(file: &str, scope: &str, e: &EnumDescriptorProto) -> Vec<String> {
    let row = |v: &prost_types::EnumValueDescriptorProto| {
        format!("{file}\t{scope}{}\t{}\t{}", e.name(), v.name(), v.number())
    };
    let known = e.value.iter().filter(|v| !is_extension(v.number()));
    known.map(row).collect()
}

fn assert_same(tables: &BTreeSet<String>, ours: &BTreeSet<String>) {
    let missing: Vec<_> = tables.difference(ours).collect();
    let extra: Vec<_> = ours.difference(tables).collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "missing: {missing:#?}\nextra: {extra:#?}"
    );
}

#[test]
fn fields_are_those_of_the_table() {
    let mut ours = BTreeSet::new();
    for file in files() {
        for message in file.message_type.iter().filter(|m| !is_firn(m.name())) {
            ours.extend(field_rows(file.name(), message));
        }
    }
    assert_same(&table(include_str!("fields.tsv"), 7), &ours);
}

#[test]
fn enums_are_those_of_the_table() {
    let mut ours = BTreeSet::new();
    for file in files() {
        for e in &file.enum_type {
            ours.extend(enum_rows(file.name(), "", e));
        }
        for message in &file.message_type {
            for e in &message.enum_type {
                ours.extend(enum_rows(file.name(), &format!("{}.", message.name()), e));
            }
        }
    }
    assert_same(&table(include_str!("enums.tsv"), 4), &ours);
}

#[test]
fn no_extension_is_required() {
    let mut extensions = Vec::new();
    for file in files() {
        for message in &file.message_type {
            for field in message
                .field
                .iter()
                .filter(|f| f.number() >= FIRST_EXTENSION)
            {
                // Required or mandatory-to-understand extensions would lock other readers out.
                assert_ne!(field.label(), Label::Required, "{}", field.name());
                assert!(
                    is_firn(field.type_name().trim_start_matches('.')),
                    "{}",
                    field.name()
                );
                extensions.push(format!(
                    "{}.{}={}",
                    message.name(),
                    field.name(),
                    field.number()
                ));
            }
        }
    }
    extensions.sort();
    let expected = [
        "bpfmap_file_entry.firn=20000",
        "eventfd_file_entry.firn=20000",
        "eventpoll_file_entry.firn=20000",
        "eventpoll_tfd_entry.firn=20000",
        "ext_file_entry.firn=20000",
        "fanotify_mark_entry.firn=20000",
        "file_entry.firn_uring=20000",
        "inet_sk_entry.firn=20000",
        "inventory_entry.firn=20000",
        "mm_entry.firn=20000",
        "netlink_sk_entry.firn=20000",
        "packet_sock_entry.firn=20000",
        "pipe_data_entry.firn=20000",
        "pipe_entry.firn=20000",
        "reg_file_entry.firn=20000",
        "sk_opts_entry.firn=20000",
        "sk_packet_entry.firn=20000",
        "task_core_entry.firn=20000",
        "thread_core_entry.firn=20001",
        "thread_core_entry.firn_restart=20000",
        "timerfd_entry.firn=20000",
        "tty_info_entry.firn=20000",
        "unix_sk_entry.firn=20000",
        "user_x86_xsave_entry.firn=20000",
        "vma_entry.firn=20000",
    ];
    assert_eq!(extensions, expected);
}
