//! Links the binary to a fixed address, and statically where the C library allows it.
//!
//! It is started for every dump and restore. Most of what a start took was to find and map shared libraries, and to
//! write addresses into tables (55 pages of them), which a fork copies once more. Nothing here needs what a static C
//! library lacks: no names of hosts or users are looked up, and no plugins are loaded.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// What the standard library links to.
const LIBRARIES: [&str; 7] = ["c", "m", "dl", "rt", "util", "pthread", "gcc_s"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let is = |name: &str, value: &str| env::var(name).as_deref() == Ok(value);
    if !is("CARGO_CFG_TARGET_OS", "linux") {
        return;
    }
    println!("cargo::rustc-link-arg-bins=-no-pie");
    if is("CARGO_CFG_TARGET_ENV", "gnu") && env::var("HOST") == env::var("TARGET") {
        link_statically();
    }
}

/// The compiler asks for shared libraries by name. A directory that is searched first gives it static ones by these
/// names: linker scripts that name the files.
fn link_statically() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for name in LIBRARIES {
        let file = if name == "gcc_s" { "gcc_eh" } else { name };
        let Some(archive) = find(&format!("lib{file}.a")) else {
            return;
        };
        let script = format!("GROUP ( {} )\n", archive.display());
        fs::write(out.join(format!("lib{name}.a")), script).expect("OUT_DIR is writable");
    }
    // Not by rustc-link-search, which would be for tests as well.
    println!("cargo::rustc-link-arg-bins=-L{}", out.display());
    println!("cargo::rustc-link-arg-bins=-static");
}

/// A library of the C compiler's, as an absolute path; None where it is not installed.
fn find(name: &str) -> Option<PathBuf> {
    let asked = Command::new("cc")
        .arg(format!("-print-file-name={name}"))
        .output();
    let answer = String::from_utf8(asked.ok()?.stdout).ok()?;
    let path = Path::new(answer.trim());
    path.is_absolute().then(|| path.to_owned())
}
