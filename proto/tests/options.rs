//! Display options in the schema are those of the table.

use std::collections::BTreeMap;

use firn_proto::DESCRIPTORS;
use prost_reflect::{DescriptorPool, DynamicMessage, ReflectMessage, Value};

/// Writes an option message the way the table does: `criu.hex=true`, joined by commas.
fn shown(options: &DynamicMessage) -> String {
    let criu = options.descriptor();
    let mut parts = Vec::new();
    for field in criu.fields() {
        match options.get_field(&field).as_ref() {
            _ if !options.has_field(&field) => {}
            Value::Bool(true) => parts.push(format!("criu.{}=true", field.name())),
            Value::String(text) => parts.push(format!("criu.{}={text}", field.name())),
            other => panic!("unexpected option {other:?}"),
        }
    }
    parts.join(",")
}

#[test]
fn options_are_those_of_the_table() {
    let pool = DescriptorPool::decode(DESCRIPTORS).expect("checked-in descriptors decode");
    let criu = pool
        .get_extension_by_name("criu")
        .expect("opts.proto declares it");
    let mut ours = BTreeMap::new();
    let foreign = |name: &str| name.starts_with("google.") || name.starts_with("firn_");
    for message in pool.all_messages().filter(|m| !foreign(m.full_name())) {
        for field in message.fields().filter(|f| f.number() < 20000) {
            let key = (message.name().to_owned(), field.name().to_owned());
            let options = field.options();
            let value = options.get_extension(&criu);
            let text = value.as_message().map(shown).unwrap_or_default();
            ours.insert(
                key,
                if text.is_empty() {
                    "-".to_owned()
                } else {
                    text
                },
            );
        }
    }
    for row in include_str!("fields.tsv").lines().skip(1) {
        let cells: Vec<&str> = row.split('\t').collect();
        let key = (cells[1].to_owned(), cells[2].to_owned());
        assert_eq!(ours.remove(&key).as_deref(), Some(cells[7]), "{key:?}");
    }
    assert!(ours.is_empty(), "not in the table: {ours:?}");
}
