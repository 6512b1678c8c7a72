//! What a dump and a restore are to do with sockets.

use std::os::fd::RawFd;

use crate::files::pattern::fits;

/// How packets of the tree's connections are held off while nobody is there to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkLock {
    /// By nftables where the kernel has it, else by iptables.
    #[default]
    Automatic,
    /// By a table of nftables.
    Nftables,
    /// By iptables.
    Iptables,
    /// Not at all: somebody else sees to it.
    Skip,
}

/// What a dump is to do with sockets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SocketDumpOptions {
    /// Any unix socket may have a peer outside of the tree.
    pub ext_unix: bool,
    /// Unix sockets outside of the tree that those of the tree may be connected to, by inode number.
    pub ext_unix_inodes: Vec<u32>,
    /// TCP connections are kept, also those to peers outside.
    pub tcp_established: bool,
    /// TCP connections are closed by the restore.
    pub tcp_close: bool,
    /// Connections that nobody has accepted yet are left out.
    pub skip_in_flight: bool,
    /// How packets are held off.
    pub network_lock: NetworkLock,
}

/// What takes the place of a peer outside of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutsidePeer {
    /// A new connection to the same name.
    Reconnect,
    /// The connection has ended.
    EndOfFile,
    /// A descriptor of the restoring process.
    Inherit(RawFd),
}

/// What a restore is to do with sockets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SocketRestoreOptions {
    /// What takes the place of unix peers outside, by the path or name of the peer (`@` for abstract
    /// names, `*` for any text); the first that fits counts.
    pub outside_peers: Vec<(String, OutsidePeer)>,
    /// TCP connections are kept.
    pub tcp_established: bool,
    /// TCP connections are closed.
    pub tcp_close: bool,
}

impl SocketRestoreOptions {
    /// What takes the place of a peer with that name (as sun_path has it). Without a word from the user,
    /// messages go to the old name and connections have ended.
    pub(in crate::files) fn outside_peer(&self, name: &[u8], is_stream: bool) -> OutsidePeer {
        let text = match name.split_first() {
            Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest)),
            _ => {
                let name = name.strip_suffix(b"\0").unwrap_or(name);
                String::from_utf8_lossy(name).into_owned()
            }
        };
        let mut fitting = self
            .outside_peers
            .iter()
            .filter(|(pattern, _)| fits(pattern, &text));
        match fitting.next() {
            Some((_, peer)) => *peer,
            None if is_stream || text.is_empty() => OutsidePeer::EndOfFile,
            None => OutsidePeer::Reconnect,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pattern_that_fits_counts() {
        let options = SocketRestoreOptions {
            outside_peers: vec![
                ("/run/app/*.sock".to_owned(), OutsidePeer::Reconnect),
                ("@bus*".to_owned(), OutsidePeer::Inherit(7)),
            ],
            ..SocketRestoreOptions::default()
        };
        let ask = |name: &[u8]| options.outside_peer(name, true);
        assert_eq!(ask(b"/run/app/a.sock\0"), OutsidePeer::Reconnect);
        assert_eq!(ask(b"/run/app/a.socket\0"), OutsidePeer::EndOfFile);
        assert_eq!(ask(b"\0bus-1"), OutsidePeer::Inherit(7));
        assert_eq!(
            options.outside_peer(b"/dev/log\0", false),
            OutsidePeer::Reconnect
        );
        assert_eq!(options.outside_peer(b"", false), OutsidePeer::EndOfFile);
    }
}
