//! The control socket of a served disk: what is said on it.
//!
//! Both sides send a length of four bytes (little endian) and that much JSON. The answer to
//! [`Request::Read`] is followed by the bytes themselves. One request at a time per connection; any
//! number of connections.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::tracker::{Begin, ListenerSpec};

/// Longest message that is accepted.
pub const MAX_MESSAGE: u32 = 64 << 20;
/// Most bytes that one read returns.
pub const MAX_READ: u32 = 4 << 20;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum Request {
    /// State and counters.
    Stat,
    /// Makes everything answered so far safe.
    Flush,
    /// Adds a listener to the write tracker.
    TrackerStart {
        /// Its name and unit.
        spec: ListenerSpec,
        /// What it begins with.
        begin: Begin,
    },
    /// Takes changed ranges out of a listener's bitmap.
    TrackerTake {
        /// Its name.
        name: String,
        /// Where to begin.
        from: u64,
        /// About how many bytes of the disk at most.
        max_bytes: u64,
    },
    /// Marks a range for one listener.
    TrackerPutBack {
        /// Its name.
        name: String,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len_bytes: u64,
    },
    /// Bytes marked.
    TrackerPending {
        /// The listener's name.
        name: String,
    },
    /// Ends a listener; the answer is the bytes that were still marked.
    TrackerStop {
        /// Its name.
        name: String,
    },
    /// What a range consists of.
    Map {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len_bytes: u64,
    },
    /// Reads, as the device would.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes, at most [`MAX_READ`].
        len_bytes: u32,
    },
    /// Has a file system write out what it caches.
    WriteOut {
        /// A directory of it, as the server sees it; None is where the server mounted it.
        dir: Option<PathBuf>,
    },
    /// Freezes a file system until [`Request::Thaw`] or the end of this connection.
    Freeze {
        /// A directory of it, as the server sees it; None is where the server mounted it.
        dir: Option<PathBuf>,
    },
    /// Lets it go on.
    Thaw,
    /// Enlarges the disk and fits its partition table; the answer is the partition's new length, or 0.
    Grow {
        /// New size in bytes.
        size_bytes: u64,
    },
    /// Makes a snapshot: the top delta becomes read-only and a new one is put on it.
    Snapshot {
        /// Its id; None makes one up.
        id: Option<String>,
        /// Freeze the file system meanwhile, so that it needs no recovery.
        freeze: bool,
    },
    /// Takes a snapshot off the chain of the running disk.
    SnapshotDelete {
        /// Its id.
        id: String,
    },
    /// Merges a delta of the running disk into its parent.
    Merge {
        /// The snapshot; None is the top.
        id: Option<String>,
    },
    /// Sends a backup of the disk as it is at one moment: its bytes in [`Reply::Data`], then
    /// [`Reply::Backup`].
    Backup {
        /// Only what changed since the last backup.
        incremental: bool,
    },
    /// Serves the disk by NBD on a Unix socket until the connection ends.
    Nbd {
        /// Where to make the socket.
        socket: PathBuf,
        /// Take writes.
        writable: bool,
    },
    /// Ends a server that has no device.
    Stop,
}

/// State and counters of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Bytes of a cluster.
    pub cluster_bytes: u32,
    /// No writes.
    pub read_only: bool,
    /// Files of the chain, base first.
    pub layers: Vec<String>,
    /// What was done since the worker's start.
    pub counters: Vec<(String, u64)>,
    /// Listeners of the write tracker and the bytes marked for each.
    pub listeners: Vec<(ListenerSpec, u64)>,
    /// The worker's process.
    pub worker: u32,
    /// The worker's memory, in bytes: resident.
    pub resident_bytes: u64,
    /// Whether this worker replaced one that died.
    pub restarted: bool,
    /// Whether the device has lost its last user and the image is being closed.
    #[serde(default)]
    pub is_closing: bool,
}

/// A run of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapRun {
    /// Number of bytes.
    pub len_bytes: u64,
    /// Reads as zeroes.
    pub is_zero: bool,
}

/// What the server answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// It is done.
    Done,
    /// State and counters.
    Stat(Box<Stat>),
    /// Ranges of the disk: first byte and the one after the last.
    Ranges {
        /// In the order found.
        ranges: Vec<(u64, u64)>,
    },
    /// A number of bytes.
    Bytes {
        /// That number.
        bytes: u64,
    },
    /// The runs of a range, without gaps.
    Map {
        /// In order.
        runs: Vec<MapRun>,
    },
    /// So many bytes follow.
    Data {
        /// Their number.
        len_bytes: u32,
    },
    /// It goes on; the answer is still to come.
    Progress {
        /// Parts done.
        done: u64,
        /// Parts to do.
        all: u64,
    },
    /// All bytes of a backup were sent.
    Backup {
        /// Clusters in it.
        clusters: u64,
        /// Bytes of it.
        bytes: u64,
        /// Name of the bitmap that the next incremental one will use.
        next: String,
        /// Name of the bitmap that this one used.
        since: Option<String>,
    },
    /// A snapshot was made.
    Snapshot {
        /// Its id.
        id: String,
        /// How long requests waited, in microseconds.
        held_us: u64,
    },
    /// It did not work.
    Failed {
        /// Why: the chain of causes.
        message: String,
        /// Exit status that goes with it.
        code: u8,
    },
}

/// Sends a message.
///
/// # Errors
/// The peer has gone.
pub fn send(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message).map_err(io::Error::other)?;
    let len = u32::try_from(text.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut whole = len.to_le_bytes().to_vec();
    whole.extend(text);
    to.write_all(&whole)
}

/// Receives a message, or None where the peer has ended the connection between two.
///
/// # Errors
/// The message is too long or no message, or the peer went in the middle of it.
pub fn receive<M: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<M>> {
    let mut head = [0; 4];
    let mut have = 0;
    while have < head.len() {
        match from.read(&mut head[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let len = u32::from_le_bytes(head);
    if len > MAX_MESSAGE {
        let message = format!("a message of {len} bytes is too long");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut text = Vec::new();
    from.take(len.into()).read_to_end(&mut text)?;
    if text.len() != len as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(serde_json::from_slice(&text)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_and_lengths_are_capped() {
        let request = Request::Read {
            offset: 1 << 40,
            len_bytes: 5,
        };
        let mut wire = Vec::new();
        send(&mut wire, &request).unwrap();
        send(&mut wire, &Request::Stat).unwrap();
        let mut from = &wire[..];
        assert_eq!(receive(&mut from).unwrap(), Some(request));
        assert_eq!(receive(&mut from).unwrap(), Some(Request::Stat));
        assert_eq!(receive::<Request>(&mut from).unwrap(), None);
        let long = receive::<Request>(&mut &[0xff; 8][..]).unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::InvalidData);
        let torn = receive::<Request>(&mut &wire[..7]).unwrap_err();
        assert_eq!(torn.kind(), io::ErrorKind::UnexpectedEof);
    }
}
