//! TCP connections whose dump was killed.
//!
//! In repair mode a connection neither sends nor answers, and the network lock holds its peer off. Both outlast the
//! process that has begun them.

use firn_sys::socket::tcp::{self, Repair};
use firn_sys::socket::{self, SO_REUSEADDR, SOL_SOCKET};
use firn_sys::{Result, pidfd};

use crate::inject::HeldConnection;
use crate::network_lock;

/// Ends repair mode of these connections, as far as they are in it, and the lock of that run; returns how many go on.
pub(crate) fn let_connections_go_on(run_id: &str, connections: &[HeldConnection]) -> usize {
    // Their tasks run already.
    let woken = connections
        .iter()
        .filter(|connection| match wake(connection) {
            Ok(()) => true,
            Err(errno) => {
                let HeldConnection { pid, fd, .. } = connection;
                tracing::error!("descriptor {fd} of task {pid} stays in repair mode: {errno}");
                false
            }
        });
    let nr_woken = woken.count();
    if let Err(error) = network_lock::unlock_run(run_id) {
        tracing::error!("packets are held off until `firn unlock --run {run_id}`: {error}");
    }
    for connection in connections {
        // Probes the peer once more, who has not heard of the first time.
        let _ = wake(connection);
    }
    nr_woken
}

fn wake(connection: &HeldConnection) -> Result<()> {
    let socket = pidfd::getfd(pidfd::open(connection.pid)?, connection.fd)?;
    tcp::set_repair(&socket, Repair::Off)?;
    let reuse = i32::from(connection.reuses_address);
    socket::set_number(&socket, SOL_SOCKET, SO_REUSEADDR, reuse)
}
