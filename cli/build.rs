//! Links the binary to a fixed address.
//!
//! It is started for every dump and restore, and most of what a start took was to write addresses into tables
//! (55 pages of them), and to copy these pages once more for each process that is forked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo::rustc-link-arg-bins=-no-pie");
    }
}
