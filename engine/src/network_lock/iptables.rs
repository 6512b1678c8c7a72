//! The lock as rules of iptables-legacy, for kernels without nftables.

use std::net::SocketAddr;
use std::process::Command;

use super::{Connection, NetworkLockError, PASS_MARK};

/// Adds the rules; on an error none is left.
pub(super) fn lock(connections: &[Connection]) -> Result<(), NetworkLockError> {
    for connection in connections {
        if let Err(error) = change("-I", connection) {
            let _ = unlock(connections);
            return Err(error);
        }
    }
    Ok(())
}

/// Removes the rules.
pub(super) fn unlock(connections: &[Connection]) -> Result<(), NetworkLockError> {
    let mut result = Ok(());
    for connection in connections {
        result = result.and(change("-D", connection));
    }
    result
}

/// Whether the rules of the first connection are there.
pub(super) fn is_locked(connections: &[Connection]) -> bool {
    connections
        .first()
        .is_some_and(|connection| change("-C", connection).is_ok())
}

fn change(action: &str, connection: &Connection) -> Result<(), NetworkLockError> {
    let (local, remote) = (connection.local, connection.remote);
    run(action, "INPUT", remote, local)?;
    run(action, "OUTPUT", local, remote)
}

fn run(
    action: &str,
    chain: &str,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<(), NetworkLockError> {
    let program = if from.is_ipv4() {
        "iptables-legacy"
    } else {
        "ip6tables-legacy"
    };
    let mut command = Command::new(program);
    command
        .args(["-w", "-t", "filter", action, chain, "--protocol", "tcp"])
        .args(["-m", "mark", "!", "--mark", &PASS_MARK.to_string()])
        .args([
            "--source",
            &from.ip().to_string(),
            "--sport",
            &from.port().to_string(),
        ])
        .args([
            "--destination",
            &to.ip().to_string(),
            "--dport",
            &to.port().to_string(),
        ])
        .args(["-j", "DROP"]);
    let failed = |what: String| NetworkLockError::Iptables(format!("{program}: {what}"));
    let output = command
        .output()
        .map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        )),
    }
}
