//! `firn ploop stat`: what a mounted disk has done.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value, json};

use super::{connect, must_be_served, refused};
use crate::output::{Failure, bytes};
use crate::ploop::report::answer;

/// Options of stat.
#[derive(Debug, Args)]
pub struct StatArgs {
    /// Descriptor, image, device or mount point
    #[arg(value_name = "DISK")]
    pub disk: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Prints the counters.
pub fn run(args: &StatArgs) -> Result<u8, Failure> {
    let record = must_be_served(&args.disk)?;
    let stat = connect(&record)?
        .stat()
        .map_err(|error| refused(&error, error.exit_code()))?;
    let counters = stat.counters.iter();
    let counters: Map<String, Value> = counters
        .map(|(name, value)| (name.clone(), json!(value)))
        .collect();
    let listeners = stat.listeners.iter().map(|(spec, pending)| {
        json!({ "name": spec.name, "unit_bytes": spec.unit_bytes, "pending_bytes": pending })
    });
    let object = json!({
        "device": record.device,
        "mountpoint": record.mountpoint,
        "size_bytes": stat.size_bytes,
        "cluster_bytes": stat.cluster_bytes,
        "read_only": stat.read_only,
        "layers": stat.layers,
        "counters": counters,
        "listeners": listeners.collect::<Vec<Value>>(),
        "supervisor": record.supervisor,
        "worker": stat.worker,
        "worker_restarted": stat.restarted,
        "resident_bytes": stat.resident_bytes,
    });
    let mut text = format!(
        "size: {}\ncluster: {}\n",
        bytes(stat.size_bytes),
        bytes(stat.cluster_bytes.into())
    );
    let _ = writeln!(
        text,
        "worker: {} ({} resident)",
        stat.worker,
        bytes(stat.resident_bytes)
    );
    for layer in &stat.layers {
        let _ = writeln!(text, "layer: {layer}");
    }
    for (name, value) in &stat.counters {
        let value = match name.ends_with("_bytes") {
            true => bytes(*value),
            false => value.to_string(),
        };
        let _ = writeln!(text, "{name}: {value}");
    }
    for (spec, pending) in &stat.listeners {
        let _ = writeln!(text, "listener {}: {} to send", spec.name, bytes(*pending));
    }
    answer(args.json, &object, &text)
}
