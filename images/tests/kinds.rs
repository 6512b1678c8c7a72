//! Holds the table of image kinds against the tables of facts.

use std::collections::{BTreeMap, BTreeSet};

use firn_images::{Entries, Header, ImageKind, KindInfo, Number, Payload, Presence};

type Row = BTreeMap<&'static str, &'static str>;

fn table(text: &'static str) -> Vec<Row> {
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().expect("heading").split('\t').collect();
    lines
        .map(|line| names.iter().copied().zip(line.split('\t')).collect())
        .collect()
}

/// File name of a kind in the notation of the tables.
fn template(info: &KindInfo) -> String {
    let number = match info.number {
        Number::Unnumbered => "",
        Number::Decimal => "%u",
        Number::Hexadecimal => "%x",
    };
    format!("{}{number}{}", info.prefix, info.suffix)
}

/// The tables keep C's conversions; all but %x are decimal.
fn plain(template: &str) -> String {
    template
        .replace("%lu", "%u")
        .replace("%ld", "%u")
        .replace("%d", "%u")
}

fn kinds_of(row: &Row, tag: &str) -> Vec<&'static KindInfo> {
    let name = plain(row["file_name"]);
    let all = ImageKind::all()
        .map(ImageKind::info)
        .filter(|i| i.tag == tag);
    match name.as_str() {
        // Two kinds here, since the name holds a word and not a number.
        "stats-%s" => all.filter(|i| template(i).starts_with("stats-")).collect(),
        name => all.filter(|i| template(i) == name).collect(),
    }
}

fn presence(info: &KindInfo) -> &'static str {
    match info.presence {
        Presence::Always => "written",
        Presence::WhenNeeded => "written-if-needed",
        Presence::LegacyRead => "legacy-read",
        Presence::Unused => "not-used",
    }
}

fn magics(info: &KindInfo) -> (String, String) {
    let first = match info.header {
        Header::Raw | Header::Bare => "none",
        Header::Common => "IMG_COMMON 0x54564319",
        Header::Service => "IMG_SERVICE 0x55105940",
    };
    let second = match info.header {
        Header::Raw => "none".to_owned(),
        _ => format!("{:#010x}", info.magic),
    };
    (first.to_owned(), second)
}

fn check_entries(info: &KindInfo, row: &Row) {
    let cardinality = row["cardinality"];
    let message = row["message"];
    match info.entries {
        Entries::Opaque => assert_eq!(message, "-"),
        Entries::One => assert!(cardinality.starts_with("one")),
        Entries::Many => assert!(cardinality.starts_with("sequence")),
        Entries::HeadThenMany => assert_eq!(cardinality, "head (exactly 1) + sequence"),
    }
    let expected = match info.messages {
        [] => "-".to_owned(),
        [one] => (*one).to_owned(),
        [head, rest] if info.entries == Entries::HeadThenMany => format!("{head} then {rest}"),
        [head, rest] => format!("{head} [+ {rest}...]"),
        more => panic!("{more:?}"),
    };
    assert_eq!(expected, message);
}

fn check_payload(info: &KindInfo, row: &Row) {
    let text = row["raw_payload"];
    match info.payload {
        Payload::Nothing => assert!(info.header == Header::Raw || text.starts_with(['n', '-'])),
        Payload::Lengths(fields) => fields.iter().for_each(|f| assert!(text.contains(f), "{f}")),
        Payload::IpcShm => assert!(text.contains("in_pagemaps=true") && text.contains("of 4")),
        Payload::IpcMsg => assert!(text.contains("qnum x") && text.contains("of 8")),
        Payload::IpcSem => assert!(text.contains("nsems x u16") && text.contains("of 8")),
        Payload::Ghost => assert!(text.contains("chunks=true")),
    }
}

#[test]
fn every_file_of_the_table_is_described() {
    let mut seen = BTreeSet::new();
    let rows = table(include_str!("image-files.tsv"));
    for row in rows.iter().filter(|r| !r["image_type"].starts_with('(')) {
        let found = kinds_of(row, row["image_type"]);
        assert!(!found.is_empty(), "{}", row["image_type"]);
        for info in found {
            assert_eq!(presence(info), row["status_in_4.2"], "{}", info.tag);
            assert_eq!(
                magics(info),
                (row["first_magic"].into(), row["type_magic"].into())
            );
            check_entries(info, row);
            check_payload(info, row);
            seen.insert(info.kind);
        }
    }
    assert_eq!(
        seen.len(),
        ImageKind::all().count(),
        "a kind is not in the table"
    );
}

#[test]
fn every_magic_of_the_table_is_described() {
    let rows = table(include_str!("magics.tsv"));
    for row in rows
        .iter()
        .filter(|r| r["category"].contains("image") && r["file_template"] != "-")
    {
        let infos: Vec<_> = ImageKind::all().map(ImageKind::info).collect();
        let found: Vec<_> = infos.iter().filter(|i| i.tag == row["name"]).collect();
        assert!(!found.is_empty(), "{}", row["name"]);
        for info in found {
            assert_eq!(
                format!("{:#010x}", info.magic),
                row["value_hex"],
                "{}",
                info.tag
            );
            assert_eq!(
                info.crit_name.unwrap_or("-"),
                row["json_name_in_crit"],
                "{}",
                info.tag
            );
            if row["file_template"] != "stats-%s" {
                assert_eq!(template(info), plain(row["file_template"]));
            }
        }
    }
}

#[test]
fn messages_exist_in_the_schema() {
    let pool = prost_reflect::DescriptorPool::decode(firn_proto::DESCRIPTORS).expect("decodes");
    for info in ImageKind::all().map(ImageKind::info) {
        for message in info.messages {
            let found = pool
                .get_message_by_name(message)
                .expect("message of the schema");
            if let Payload::Lengths(fields) = info.payload {
                fields
                    .iter()
                    .for_each(|f| assert!(found.get_field_by_name(f).is_some(), "{f}"));
            }
        }
    }
}
