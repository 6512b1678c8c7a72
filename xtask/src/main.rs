//! Development tasks. `cargo run -p xtask -- gen` writes the generated code of firn-proto.

use std::path::Path;

fn main() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    match std::env::args().nth(1).as_deref() {
        Some("gen") => xtask::proto::write(&root.join("proto")),
        _ => anyhow::bail!("usage: cargo run -p xtask -- gen"),
    }
}
