//! `firn ploop ping`: how long requests take.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use firn_ploop::ping::{PingOptions, ping, target_of};
use firn_ploop::server::Registry;
use serde_json::json;

use crate::output::{Failure, bytes};
use crate::ploop::report::answer;
use crate::ploop::words::cluster;

/// Options of ping.
#[derive(Debug, Args)]
pub struct PingArgs {
    /// Requests
    #[arg(short, long, value_name = "COUNT", default_value_t = 10)]
    pub count: u32,
    /// Pause between two, in milliseconds
    #[arg(short, long, value_name = "MS", default_value_t = 100)]
    pub interval: u64,
    /// Size of a request: sectors, or a number with K or M
    #[arg(short, long, value_name = "SIZE", value_parser = cluster, default_value = "4K")]
    pub size: u32,
    /// Write and sync instead of reading; changes the contents of a file or device
    #[arg(short = 'W', long)]
    pub write: bool,
    /// Through the page cache
    #[arg(short = 'C', long)]
    pub cached: bool,
    /// Print only the summary
    #[arg(short, long)]
    pub quiet: bool,
    /// A device, a file, a directory, or a mounted disk
    #[arg(value_name = "TARGET")]
    pub target: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Probes.
pub fn run(args: &PingArgs) -> Result<u8, Failure> {
    let failed = |error| Failure::io(format!("{} can't be probed", args.target.display()), &error);
    let registry = Registry::from_environment();
    let target = target_of(&args.target, &registry).map_err(failed)?;
    let options = PingOptions {
        request_bytes: args.size,
        write: args.write,
        cached: args.cached,
        count: args.count,
        interval: Duration::from_millis(args.interval),
    };
    let size = bytes(args.size.into());
    let mut each = |number: u32, took: Duration| {
        if !args.json && !args.quiet {
            let target = target.display();
            let line = format!("{size} {target}: request={number} time={took:.1?}\n");
            // A reader who has left does not want to know.
            let _ = std::io::stdout().write_all(line.as_bytes());
        }
    };
    let report = ping(&target, &options, &mut each).map_err(failed)?;
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let object = json!({
        "target": target,
        "requests": report.count,
        "bytes": report.bytes,
        "min_us": us(report.min),
        "mean_us": us(report.mean),
        "max_us": us(report.max),
        "deviation_us": us(report.deviation),
    });
    let text = format!(
        "{} requests, {}: min/avg/max/mdev = {:.1?} / {:.1?} / {:.1?} / {:.1?}\n",
        report.count,
        bytes(report.bytes),
        report.min,
        report.mean,
        report.max,
        report.deviation
    );
    answer(args.json, &object, &text)
}
