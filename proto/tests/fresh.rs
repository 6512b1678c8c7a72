//! The checked-in generated files are what the generator makes of the schema.

use std::path::Path;

#[test]
fn generated_files_are_fresh() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = xtask::proto::generate(dir).expect("schema compiles");
    let messages = std::fs::read_to_string(dir.join("src/gen/messages.rs")).expect("checked in");
    let same = messages == made.messages && firn_proto::DESCRIPTORS == made.descriptors;
    assert!(same, "run `cargo run -p xtask -- gen`");
}
