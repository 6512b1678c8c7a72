//! What a killed restore has left of TCP connections.
//!
//! When the last descriptor of a socket is closed, the kernel goes on for a while to tell the peer of the end. The
//! network lock drops that, but until the kernel gives up the addresses are taken.

use firn_sys::{Errno, Result, sock_diag};

use crate::files::sockets::lingering;
use crate::network_lock::Connection;

/// The connections of a restore whose addresses others may have.
#[derive(Debug)]
pub(super) struct Orphans {
    connections: Vec<Connection>,
}

impl Orphans {
    /// Of these connections, as they travel.
    pub(super) fn of(connections: impl Iterator<Item = Connection>) -> Orphans {
        Orphans {
            connections: connections.collect(),
        }
    }

    /// Does what needs an address; where that is taken, once more after all orphans have been ended. While whoever
    /// had a socket is about to go, it is no orphan yet.
    pub(super) fn end_for(&self, act: impl Fn() -> Result<()>) -> Result<()> {
        lingering::outlast(|| match act() {
            Err(Errno::EADDRINUSE | Errno::EADDRNOTAVAIL) => {
                let nr = self.end()?;
                tracing::debug!("ended {nr} connections that an earlier restore has left");
                act()
            }
            result => result,
        })
    }

    fn end(&self) -> Result<usize> {
        let mut nr = 0;
        for connection in &self.connections {
            nr += usize::from(sock_diag::destroy_orphan(
                connection.local,
                connection.remote,
            )?);
        }
        Ok(nr)
    }
}
