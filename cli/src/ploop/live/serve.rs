//! `firn ploop serve`: what the processes of a disk's server run. Not to be called by hand.

use clap::Args;

use crate::output::Failure;

/// Words of serve.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// `supervise`, or `worker` and its orders
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// Runs until the disk is released.
pub fn run(args: &ServeArgs) -> Result<u8, Failure> {
    let prefix = ["ploop", "serve"].map(str::to_owned);
    let words: Vec<String> = prefix.into_iter().chain(args.words.clone()).collect();
    Ok(firn_ploop::server::run(&words))
}
