//! `firn ploop nbd`: a mounted disk for programs that speak NBD.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::{connect, must_be_served, refused};
use crate::output::Failure;
use crate::ploop::report::answer;

/// Options of nbd.
#[derive(Debug, Args)]
pub struct NbdArgs {
    /// Make this Unix socket
    #[arg(short, long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Take writes, too
    #[arg(short, long)]
    pub writable: bool,
    /// Descriptor, device or mount point of a mounted disk; mount it with --without-device for this
    #[arg(value_name = "DISK")]
    pub disk: PathBuf,
    /// Print one JSON object, when the socket is there
    #[arg(long)]
    pub json: bool,
}

/// Serves until it is ended by a signal or the disk is unmounted.
pub fn run(args: &NbdArgs) -> Result<u8, Failure> {
    let record = must_be_served(&args.disk)?;
    let mut client = connect(&record)?;
    let socket = std::path::absolute(&args.socket);
    let socket = socket.map_err(|error| Failure::io("the socket can't be named", &error))?;
    client
        .nbd(socket.clone(), args.writable)
        .map_err(|error| refused(&error, error.exit_code()))?;
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let object = json!({ "socket": socket, "url": url, "writable": args.writable });
    answer(args.json, &object, &format!("{url}\n"))?;
    // The socket lives as long as the connection.
    while client.stat().is_ok() {
        std::thread::sleep(Duration::from_secs(1));
    }
    Ok(0)
}
