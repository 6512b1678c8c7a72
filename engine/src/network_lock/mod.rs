//! Holding packets of the tree's connections off while nobody is there to answer.
//!
//! A packet for a connection whose task is frozen or gone would be answered by the kernel: by a reset once
//! the socket is closed, by an acknowledgement of bytes that no image has before. So both directions of
//! exactly these connections are dropped, and never rejected, from before the first of them is read until
//! the last one is restored. So are the first packets of new connections to the tree's listening sockets,
//! whose clients try again, instead of being told that nobody is there.
//!
//! The lock is a table of nftables that belongs to nobody else, `CRIU-` and the run id of the dump, as
//! CRIU names it: a restore by either program lifts it. Where the kernel lacks nftables, rules of
//! iptables do the same. Packets with the mark of both programs pass.

mod iptables;
mod left;
mod nft;

pub use left::{UnlockError, left_runs, unlock_dump, unlock_run};

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use firn_sys::Errno;

use crate::files::NetworkLock;

/// Mark of packets that pass, which CRIU uses as well.
pub const PASS_MARK: u32 = 0xc114;
/// `network_lock_method` in images.
const METHOD_IPTABLES: u32 = 0;
const METHOD_NFTABLES: u32 = 1;
const METHOD_SKIP: u32 = 2;

/// A name that no other dump has, short enough for CRIU 4.2 to find the lock by it.
pub fn new_run_id() -> String {
    let id = firn_sys::procfs::read_to_string("/proc/sys/kernel/random/uuid");
    let mut id = id.unwrap_or_default().trim().to_owned();
    id.truncate(nft::RUN_ID_LEN);
    id
}

/// Both ends of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The end that is dumped.
    pub local: SocketAddr,
    /// The other one.
    pub remote: SocketAddr,
}

impl Connection {
    /// The same with IPv4 addresses that are written as IPv6 ones turned back: they travel as IPv4.
    #[must_use]
    pub fn on_the_wire(self) -> Connection {
        let plain = |address: SocketAddr| match address.ip() {
            IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
                Some(ip) => SocketAddr::new(ip.into(), address.port()),
                None => address,
            },
            IpAddr::V4(_) => address,
        };
        Connection {
            local: plain(self.local),
            remote: plain(self.remote),
        }
    }

    /// The same connection as the other end sees it.
    #[must_use]
    pub fn reversed(self) -> Connection {
        Connection {
            local: self.remote,
            remote: self.local,
        }
    }
}

/// Where new connections are held off: a port of one address, or of all of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port {
    /// The address; of all that are not specified the family counts.
    pub address: IpAddr,
    /// The port.
    pub number: u16,
}

impl Port {
    /// The ports that a listening socket has; an IPv6 one may have those of IPv4, too.
    pub fn of_listener(local: SocketAddr, v6only: bool) -> impl Iterator<Item = Port> {
        let (address, number) = (local.ip().to_canonical(), local.port());
        let is_dual = local.is_ipv6() && local.ip().is_unspecified() && !v6only;
        let other = is_dual.then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let addresses = [Some(address), other].into_iter().flatten();
        addresses.map(move |address| Port { address, number })
    }
}

/// What a lock holds off.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeldOff {
    /// Packets of these, both ways.
    pub connections: Vec<Connection>,
    /// Packets that would begin a connection to these.
    pub ports: Vec<Port>,
}

impl HeldOff {
    /// The same as it travels, and nothing twice.
    fn on_the_wire(&self) -> HeldOff {
        let connections = self.connections.iter().copied();
        let mut ports = self.ports.clone();
        ports.sort_unstable();
        ports.dedup();
        HeldOff {
            connections: connections.map(Connection::on_the_wire).collect(),
            ports,
        }
    }

    /// Whether there is nothing to hold off.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty() && self.ports.is_empty()
    }
}

/// Why the network could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum NetworkLockError {
    /// The kernel refused.
    #[error("cannot hold packets off by nftables; --network-lock names other ways")]
    Nftables(#[source] Errno),
    /// The program is missing or failed.
    #[error("cannot hold packets off by iptables: {0}")]
    Iptables(String),
}

/// Whether a dump's lock is there.
pub fn is_locked(run_id: &str, method: u32, held_off: &HeldOff) -> bool {
    match method {
        METHOD_SKIP => false,
        METHOD_IPTABLES => iptables::is_locked(&held_off.on_the_wire()),
        _ => nft::is_locked(run_id),
    }
}

/// A lock that holds. Dropping it lifts it; [`LockedNetwork::keep`] leaves it to a restore.
#[derive(Debug)]
pub struct LockedNetwork {
    run_id: String,
    method: u32,
    held_off: HeldOff,
    lifted_on_drop: bool,
    /// What has locked, while it lasts.
    transaction: Option<nft::Transaction>,
}

/// What is left of a lock that was lifted or left to a restore. To drop it takes up to 20 ms (see
/// `nft::Transaction`), so that comes when the tasks run.
#[derive(Debug)]
#[must_use = "to drop it takes time"]
pub struct Leftover {
    _transactions: [Option<nft::Transaction>; 2],
}

impl LockedNetwork {
    /// Locks, under the name of that run.
    ///
    /// # Errors
    /// The kernel has no means, or refuses.
    pub fn lock(
        run_id: &str,
        way: NetworkLock,
        held_off: &HeldOff,
    ) -> Result<LockedNetwork, NetworkLockError> {
        let held_off = held_off.on_the_wire();
        let by_nft = || nft::lock(run_id, &held_off).map_err(NetworkLockError::Nftables);
        let (method, transaction) = match way {
            NetworkLock::Skip => (METHOD_SKIP, None),
            NetworkLock::Nftables => (METHOD_NFTABLES, Some(by_nft()?)),
            NetworkLock::Iptables => {
                iptables::lock(&held_off)?;
                (METHOD_IPTABLES, None)
            }
            NetworkLock::Automatic => match by_nft() {
                Ok(transaction) => (METHOD_NFTABLES, Some(transaction)),
                Err(error) => {
                    tracing::info!("{error}: trying iptables");
                    iptables::lock(&held_off).map_err(|_| error)?;
                    (METHOD_IPTABLES, None)
                }
            },
        };
        Ok(LockedNetwork {
            run_id: run_id.to_owned(),
            method,
            held_off,
            lifted_on_drop: true,
            transaction,
        })
    }

    /// Takes the lock of a dump over, or locks where there is none, as on another machine. On an error
    /// before it is lifted, a lock of the dump stays, for another attempt.
    ///
    /// # Errors
    /// As of [`LockedNetwork::lock`].
    pub fn take_over(
        run_id: &str,
        method: u32,
        held_off: &HeldOff,
    ) -> Result<LockedNetwork, NetworkLockError> {
        let wire = held_off.on_the_wire();
        if !is_locked(run_id, method, &wire) {
            let way = match method {
                METHOD_SKIP => NetworkLock::Skip,
                _ => NetworkLock::Automatic,
            };
            return LockedNetwork::lock(run_id, way, held_off);
        }
        Ok(LockedNetwork {
            run_id: run_id.to_owned(),
            method,
            held_off: wire,
            lifted_on_drop: false,
            transaction: None,
        })
    }

    /// Its number in images.
    pub fn method(&self) -> u32 {
        self.method
    }

    /// Lets the lock stay when this is dropped, for another attempt, until [`LockedNetwork::lift`].
    pub fn stay(&mut self) {
        self.lifted_on_drop = false;
    }

    /// Leaves the lock for a restore.
    pub fn keep(mut self) -> Leftover {
        self.lifted_on_drop = false;
        Leftover {
            _transactions: [self.transaction.take(), None],
        }
    }

    /// Lifts the lock. Packets flow when it returns.
    pub fn lift(mut self) -> Leftover {
        self.lifted_on_drop = false;
        Leftover {
            _transactions: [self.transaction.take(), self.unlock()],
        }
    }

    fn unlock(&self) -> Option<nft::Transaction> {
        let result = match self.method {
            METHOD_NFTABLES => nft::unlock(&self.run_id).map_err(NetworkLockError::Nftables),
            METHOD_IPTABLES => iptables::unlock(&self.held_off).map(|_| None),
            _ => Ok(None),
        };
        result.unwrap_or_else(|error| {
            tracing::error!(
                "the network lock of run {} could not be lifted: {error}; until `firn unlock` takes it \
                 away the connections stay silent",
                self.run_id
            );
            None
        })
    }
}

impl Drop for LockedNetwork {
    fn drop(&mut self) {
        if self.lifted_on_drop {
            drop(self.unlock());
        }
    }
}
