//! `firn unlock`: takes away the network lock that a dump has left.

use std::path::PathBuf;

use clap::Args;
use firn_engine::network_lock::{self, NetworkLockError, UnlockError};
use serde_json::json;

use crate::output::{EngineError, Failure};

/// What to unlock.
#[derive(Debug, Clone, Args)]
pub struct UnlockArgs {
    /// Directory of the dump
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
    /// Name the run instead of the directory, as --list prints it
    #[arg(long, value_name = "ID", conflicts_with_all = ["images_dir", "list"])]
    run: Option<String>,
    /// Only print the runs whose locks are in this network namespace
    #[arg(long, conflicts_with = "images_dir")]
    list: bool,
    /// Print one JSON object to stdout
    #[arg(long)]
    json: bool,
}

/// Lists or lifts; status 1 where there was nothing to lift.
pub fn run(args: &UnlockArgs) -> Result<u8, Failure> {
    if args.list {
        return list(args.json);
    }
    let (lifted, name) = match &args.run {
        Some(run) => {
            let lifted = network_lock::unlock_run(run).map_err(UnlockError::from);
            (lifted, format!("run {run}"))
        }
        None => {
            let lifted = network_lock::unlock_dump(&args.images_dir);
            (lifted, args.images_dir.display().to_string())
        }
    };
    let lifted = lifted.map_err(|error| Failure::of(&error))?;
    if !lifted {
        let text = format!("no network lock of {name} is in this network namespace");
        return Err(Failure::new("gone", text).hint("firn unlock --list prints those that are"));
    }
    let text = match args.json {
        true => json!({"command": "unlock", "ok": true}).to_string(),
        false => format!("packets for the connections of {name} flow again"),
    };
    crate::print(format!("{text}\n").as_bytes())
}

fn list(as_json: bool) -> Result<u8, Failure> {
    let runs = network_lock::left_runs()
        .map_err(|error: NetworkLockError| Failure::of(&UnlockError::from(error)))?;
    let text = match as_json {
        true => json!({"command": "unlock", "ok": true, "runs": runs}).to_string() + "\n",
        false => runs.iter().map(|run| format!("{run}\n")).collect(),
    };
    crate::print(text.as_bytes())
}

impl EngineError for UnlockError {
    fn class(&self) -> firn_engine::ErrorClass {
        UnlockError::class(self)
    }

    fn hint(&self) -> Option<String> {
        UnlockError::hint(self)
    }
}
