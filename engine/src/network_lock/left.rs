//! Locks that a dump has left and that no restore will take over.
//!
//! After a dump that killed its tasks the lock stays for the restore, and after a restore that failed for
//! the next one. Who gives the tasks up, or starts their program anew, takes it away with this.

use std::path::Path;

use firn_images::{ImageDir, ImageReadError};

use super::{METHOD_IPTABLES, METHOD_SKIP, NetworkLockError, iptables, nft};
use crate::class::ErrorClass;
use crate::files::{self, FileRestoreError};

/// Why a lock could not be taken away.
#[derive(Debug, thiserror::Error)]
pub enum UnlockError {
    /// The images can't be read.
    #[error(transparent)]
    Images(#[from] ImageReadError),
    /// The images of open files can't be read.
    #[error(transparent)]
    Files(#[from] FileRestoreError),
    /// The kernel refused.
    #[error(transparent)]
    Lock(#[from] NetworkLockError),
}

impl UnlockError {
    /// Kind of the failure.
    pub fn class(&self) -> ErrorClass {
        match self {
            UnlockError::Images(_) | UnlockError::Files(_) => ErrorClass::Corrupt,
            UnlockError::Lock(_) => ErrorClass::Refused,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            UnlockError::Images(_) => "name the directory of the dump, or the run with --run",
            UnlockError::Files(_) => "name the run with --run; --list knows it",
            UnlockError::Lock(_) => "it takes root's rights in the network namespace of the dump",
        };
        Some(hint.to_owned())
    }
}

/// Runs whose tables of nftables are in this network namespace. Tables by CRIU have the same names.
///
/// # Errors
/// The kernel has no nftables.
pub fn left_runs() -> Result<Vec<String>, NetworkLockError> {
    nft::runs().map_err(NetworkLockError::Nftables)
}

/// Takes away the table of a run; false where there is none in this network namespace.
///
/// # Errors
/// The kernel refuses.
pub fn unlock_run(run_id: &str) -> Result<bool, NetworkLockError> {
    if !nft::is_locked(run_id) {
        return Ok(false);
    }
    let _done = nft::unlock(run_id).map_err(NetworkLockError::Nftables)?;
    Ok(true)
}

/// Takes away the lock that the dump in that directory has left, whatever it was made of; false where
/// there is none in this network namespace.
///
/// # Errors
/// Images that can't be read; the kernel, or iptables, refuses.
pub fn unlock_dump(images_dir: &Path) -> Result<bool, UnlockError> {
    let images = ImageDir::open(images_dir)?;
    let inventory = images.inventory()?;
    let run_id = inventory.dump_criu_run_id.as_deref().unwrap_or_default();
    match inventory.network_lock_method {
        None | Some(METHOD_SKIP) => Ok(false),
        Some(METHOD_IPTABLES) => {
            let held_off = files::held_off(&images)?;
            Ok(iptables::unlock(&held_off.on_the_wire())?)
        }
        Some(_) => Ok(unlock_run(run_id)?),
    }
}
