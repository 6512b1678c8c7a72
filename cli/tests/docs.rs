//! The documentation names what there is.

mod common;

use std::path::{Path, PathBuf};

use common::run;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn page(name: &str) -> String {
    std::fs::read_to_string(root().join("docs").join(name)).unwrap()
}

#[test]
fn every_extension_field_is_in_the_format_page() {
    let text = page("format.md");
    let mut seen = 0;
    for entry in std::fs::read_dir(root().join("proto/proto")).unwrap() {
        let schema = std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
        let mut message = "";
        for line in schema.lines() {
            // A value of an enumeration is an extension like a field of a message.
            let begins = |word| line.strip_prefix(word);
            if let Some(rest) = begins("message ").or_else(|| begins("enum ")) {
                message = rest.split_whitespace().next().unwrap();
            }
            let Some((field, number)) = line.trim_end_matches(';').rsplit_once(" = ") else {
                continue;
            };
            if !number
                .parse()
                .is_ok_and(|number: u32| (20000..50000).contains(&number))
            {
                continue;
            }
            seen += 1;
            let row = format!(
                "| `{message}` | `{}` | {number} |",
                field.rsplit(' ').next().unwrap()
            );
            assert!(text.contains(&row), "docs/format.md lacks the row {row}");
        }
    }
    assert!(seen >= 5, "only {seen} extension fields found");
}

#[test]
fn every_feature_is_in_the_page_of_kernel_needs() {
    let text = page("kernel-needs.md");
    let json = run(&["check", "--all", "--json"]).json();
    for feature in json["features"].as_array().unwrap() {
        let name = format!("`{}`", feature["name"].as_str().unwrap());
        assert!(text.contains(&name), "docs/kernel-needs.md lacks {name}");
    }
}

#[test]
fn the_readme_names_commands_that_exist() {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    assert!(text.contains("cargo run --release -- demo") && text.contains("./test"));
    let help = run(&["--help"]).good().out;
    for command in ["dump", "restore", "image", "check", "demo", "completions"] {
        assert!(
            help.contains(command) && text.contains(&format!("firn {command}")),
            "{command}"
        );
    }
}
