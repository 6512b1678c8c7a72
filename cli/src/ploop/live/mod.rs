//! `firn ploop` commands on disks that are served: mounted ones, and those about to be.

mod bare;
pub mod compact;
pub mod copy;
pub mod format;
pub mod mount;
pub mod nbd;
pub mod ping;
pub mod resize;
pub mod serve;
pub mod stat;

use std::io;
use std::path::Path;

use firn_ploop::server::{Client, RUN_DIR_VARIABLE, Record, Registry};

use crate::output::Failure;

/// An error of the library, with the original's exit status.
pub fn refused(error: &dyn std::error::Error, code: u8) -> Failure {
    let mut failure = Failure::new("refused", error.to_string()).caused_by(error);
    failure.code = code;
    failure
}

/// The served disk that a path names, or None. A user who may not see the servers sees none; the disks that
/// they hold are locked against him anyway.
pub fn served(path: &Path) -> Result<Option<Record>, Failure> {
    let registry = Registry::from_environment();
    match registry.find_by(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
        other => other.map_err(|error| unreadable(&registry, &error)),
    }
}

/// The served disk that a path names.
pub fn must_be_served(path: &Path) -> Result<Record, Failure> {
    let registry = Registry::from_environment();
    let found = registry.find_by(path);
    found
        .map_err(|error| unreadable(&registry, &error))?
        .ok_or_else(|| {
            let mut failure = Failure::new("refused", format!("{} is not mounted", path.display()));
            failure.code = 40;
            failure.hint("mount it with 'firn ploop mount'")
        })
}

fn unreadable(registry: &Registry, error: &io::Error) -> Failure {
    let failure = Failure::io(format!("{} can't be read", registry.dir().display()), error);
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let own = format!("or name your own directory of them in {RUN_DIR_VARIABLE}");
            failure.hint(format!(
                "only root sees the disks that are mounted: use sudo, {own}"
            ))
        }
        _ => failure,
    }
}

/// A conversation with a disk's server.
pub fn connect(record: &Record) -> Result<Client, Failure> {
    Client::connect(&record.control).map_err(|error| refused(&error, error.exit_code()))
}
