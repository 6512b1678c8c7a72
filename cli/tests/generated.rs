//! Man pages and completions come from the definitions, and the checked-in pages are fresh.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::run;

fn pages(dir: &Path) -> BTreeMap<String, String> {
    let entries = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    entries
        .map(|path| (name(&path), std::fs::read_to_string(&path).unwrap()))
        .collect()
}

#[test]
fn the_checked_in_pages_are_fresh() {
    let made = tempfile::tempdir().unwrap();
    run(&["man", made.path().to_str().unwrap()]).good();
    let made = pages(made.path());
    let kept = pages(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/man"));
    assert!(made.contains_key("firn.1") && made.contains_key("firn-restore.1"));
    let names = |pages: &BTreeMap<String, String>| pages.keys().cloned().collect::<Vec<_>>();
    assert_eq!(
        names(&made),
        names(&kept),
        "write them with: cargo run -- man docs/man"
    );
    for (name, text) in &made {
        assert!(
            kept[name] == *text,
            "docs/man/{name} is stale: cargo run -- man docs/man"
        );
    }
}

#[test]
fn every_shell_gets_the_commands() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let said = run(&["completions", shell]).good();
        for word in ["dump", "restore", "leave-running", "skip-file-rwx-check"] {
            assert!(said.out.contains(word), "{shell} lacks {word}");
        }
    }
}
