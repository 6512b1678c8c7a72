//! What the engine is built on: it forks, traces and enters namespaces, so nothing in its tree may run
//! threads or an event loop of its own.

use std::collections::BTreeSet;
use std::process::Command;

/// Async runtimes, their executors and reactors, and pools of threads.
const FORBIDDEN: [&str; 21] = [
    "actix-rt",
    "async-executor",
    "async-global-executor",
    "async-io",
    "async-std",
    "blocking",
    "compio",
    "executors",
    "futures-executor",
    "glommio",
    "mio",
    "monoio",
    "polling",
    "rayon",
    "rayon-core",
    "rusty_pool",
    "smol",
    "threadpool",
    "tokio",
    "tokio-uring",
    "uvth",
];

/// Names of all crates that a crate of the workspace links, itself included.
fn tree_of(package: &str, depth: Option<&str>) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["tree", "--offline", "--locked", "--edges", "normal,build"])
        .args(["--prefix", "none", "--format", "{p}", "--package", package])
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    if let Some(depth) = depth {
        command.args(["--depth", depth]);
    }
    let output = command.output().expect("cargo runs its tests");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).expect("names are text");
    let names = text.lines().filter_map(|line| line.split(' ').next());
    names.map(str::to_owned).collect()
}

#[test]
fn the_engine_has_no_async_runtime_and_no_thread_pool() {
    let tree = tree_of("firn-engine", None);
    assert!(
        tree.contains("firn-sys") && tree.contains("prost"),
        "{tree:?}"
    );
    let found: Vec<_> = FORBIDDEN
        .iter()
        .filter(|name| tree.contains(**name))
        .collect();
    assert!(found.is_empty(), "the engine depends on {found:?}");
}

#[test]
fn arrows_run_one_way_and_only_firn_sys_knows_the_kernel() {
    let engine = tree_of("firn-engine", None);
    let upwards = ["firn", "firn-container", "firn-migrate", "firn-ploop"];
    let found: Vec<_> = upwards
        .iter()
        .filter(|name| engine.contains(**name))
        .collect();
    assert!(found.is_empty(), "the engine depends on {found:?}");
    let own = tree_of("firn-engine", Some("1"));
    let kernel = ["libc", "linux-raw-sys", "nix", "rustix"];
    let found: Vec<_> = kernel.iter().filter(|name| own.contains(**name)).collect();
    assert!(found.is_empty(), "the engine itself names {found:?}");
    let images = tree_of("firn-images", None);
    let above = ["firn-engine", "firn-sys"];
    let found: Vec<_> = above
        .iter()
        .filter(|name| images.contains(**name))
        .collect();
    assert!(found.is_empty(), "images depend on {found:?}");
}
