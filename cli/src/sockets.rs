//! Options about sockets, of dump and restore.

use clap::{Args, ValueEnum};
use firn_engine::files::{NetworkLock, OutsidePeer, SocketDumpOptions, SocketRestoreOptions};

/// How packets are held off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Lock {
    /// By a table of nftables
    Nftables,
    /// By iptables
    Iptables,
    /// Not at all; somebody else sees to it
    Skip,
}

/// Options of dump.
#[derive(Debug, Clone, Args)]
pub struct SocketDumpArgs {
    /// Accept unix sockets whose peer is outside of the tree: all, or these peers' inode numbers
    #[arg(short = 'x', long, value_name = "INODES", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "", value_parser = inodes)]
    pub ext_unix_sk: Option<Inodes>,
    /// Keep TCP connections to peers outside of the tree
    #[arg(long)]
    pub tcp_established: bool,
    /// Give TCP connections up: they are closed after the restore
    #[arg(long)]
    pub tcp_close: bool,
    /// Leave out connections that nobody has accepted yet
    #[arg(long)]
    pub skip_in_flight: bool,
    /// How packets of the tree's connections are held off [default: nftables, else iptables]
    #[arg(long, value_name = "METHOD", value_enum)]
    pub network_lock: Option<Lock>,
}

/// Options of restore.
#[derive(Debug, Clone, Args)]
pub struct SocketRestoreArgs {
    /// Accept unix sockets whose peer was outside of the tree
    #[arg(short = 'x', long, value_name = "INODES", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "", value_parser = inodes)]
    pub ext_unix_sk: Option<Inodes>,
    /// What takes the place of unix peers outside, by their names
    #[arg(
        help = "What takes the place of a unix peer outside: PATH=reconnect, PATH=eof or PATH=fd[N]; @NAME \
                for abstract names, * for any text; may repeat, the first that fits counts"
    )]
    #[arg(long, value_name = "PATH=POLICY", value_parser = outside_peer)]
    pub outside_peer: Vec<(String, OutsidePeer)>,
    /// Keep TCP connections to peers outside of the tree
    #[arg(long)]
    pub tcp_established: bool,
    /// Close TCP connections
    #[arg(long)]
    pub tcp_close: bool,
}

/// Inode numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inodes(Vec<u32>);

fn inodes(text: &str) -> Result<Inodes, String> {
    let numbers = text.split(',').filter(|word| !word.is_empty());
    let parsed: Result<Vec<u32>, _> = numbers.map(str::parse).collect();
    parsed
        .map(Inodes)
        .map_err(|_| "expected inode numbers with commas between them".to_owned())
}

fn outside_peer(text: &str) -> Result<(String, OutsidePeer), String> {
    let (path, policy) = text.rsplit_once('=').ok_or("expected PATH=POLICY")?;
    let descriptor = policy
        .strip_prefix("fd[")
        .and_then(|rest| rest.strip_suffix(']'))
        .and_then(|number| number.parse().ok());
    let policy = match (policy, descriptor) {
        ("reconnect", _) => OutsidePeer::Reconnect,
        ("eof", _) => OutsidePeer::EndOfFile,
        (_, Some(number)) => OutsidePeer::Inherit(number),
        _ => return Err("the policy is reconnect, eof or fd[N]".to_owned()),
    };
    Ok((path.to_owned(), policy))
}

impl SocketDumpArgs {
    /// What the engine is told.
    pub fn options(&self) -> SocketDumpOptions {
        let inodes = self.ext_unix_sk.as_ref().map(|inodes| inodes.0.clone());
        SocketDumpOptions {
            ext_unix: inodes.as_ref().is_some_and(Vec::is_empty),
            ext_unix_inodes: inodes.unwrap_or_default(),
            tcp_established: self.tcp_established,
            tcp_close: self.tcp_close,
            skip_in_flight: self.skip_in_flight,
            network_lock: match self.network_lock {
                None => NetworkLock::Automatic,
                Some(Lock::Nftables) => NetworkLock::Nftables,
                Some(Lock::Iptables) => NetworkLock::Iptables,
                Some(Lock::Skip) => NetworkLock::Skip,
            },
        }
    }
}

impl SocketRestoreArgs {
    /// What the engine is told.
    pub fn options(&self) -> SocketRestoreOptions {
        SocketRestoreOptions {
            outside_peers: self.outside_peer.clone(),
            tcp_established: self.tcp_established,
            tcp_close: self.tcp_close,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_policies_are_read() {
        assert_eq!(inodes(""), Ok(Inodes(Vec::new())));
        assert_eq!(inodes("5,77"), Ok(Inodes(vec![5, 77])));
        assert!(inodes("x").is_err());
        let peer = |text| outside_peer(text).map(|(_, peer)| peer);
        assert_eq!(peer("/run/a=b.sock=eof"), Ok(OutsidePeer::EndOfFile));
        assert_eq!(peer("@bus=fd[5]"), Ok(OutsidePeer::Inherit(5)));
        assert_eq!(peer("*=reconnect"), Ok(OutsidePeer::Reconnect));
        assert!(peer("/run/a").is_err() && peer("/run/a=fd[x]").is_err());
    }
}
