//! What a user lacks for a command that the system refused, and how to get it.

use firn_ploop::server::{Denied, RUN_DIR_VARIABLE};

use crate::output::Failure;

/// Adds what can be done about missing rights, where nobody has said it yet.
pub fn explained(failure: Failure) -> Failure {
    match (failure.denied, &failure.hint) {
        (true, None) => failure.hint(of(Denied::Disk)),
        _ => failure,
    }
}

/// What can be done about rights of a kind.
pub fn of(denied: Denied) -> String {
    let user = firn_sys::task::effective_uid();
    match denied {
        Denied::Registry => format!(
            "mounting is for root: use sudo; as user {user}, set {RUN_DIR_VARIABLE} to a directory \
             of your own and mount with --without-device, which is enough for copy, nbd and backup"
        ),
        Denied::Device => format!(
            "a block device and its mount take CAP_SYS_ADMIN, /dev/fuse and /dev/loop-control, which \
             user {user} has not here: use sudo, in a container give it them; or mount with \
             --without-device, which is enough for copy, nbd and backup"
        ),
        Denied::Disk => {
            format!("user {user} may not do that: use sudo, or become the files' owner")
        }
    }
}
