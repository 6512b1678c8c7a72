//! A client of a served disk's control socket.

use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::control::{self, MAX_READ, MapRun, Reply, Request, Stat};
use crate::tracker::{Begin, ListenerSpec};

/// How long a new connection is tried while the server is being started again.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a served disk did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no server, or it is just being started again.
    #[error("the server of {socket} can't be reached")]
    Unreachable {
        /// Its socket.
        socket: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The server ended, or was started again, in the middle of the conversation.
    #[error("the server left in the middle of {what}")]
    Broken {
        /// What was asked for.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It refused.
    #[error("{message}")]
    Refused {
        /// Why.
        message: String,
        /// Exit status that goes with it.
        code: u8,
    },
    /// What it gave could not be written.
    #[error("what the server gives can't be written")]
    Output(#[source] io::Error),
    /// It said something else than what was asked for.
    #[error("the server's answer to {what} makes no sense; it may be of another version")]
    Confused {
        /// What was asked for.
        what: &'static str,
    },
}

impl ControlError {
    /// The exit status that the original command line gives for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            ControlError::Unreachable { .. } => 40,
            ControlError::Broken { .. } => 12,
            ControlError::Refused { code, .. } => *code,
            ControlError::Output(_) => 7,
            ControlError::Confused { .. } => 13,
        }
    }
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    pub(super) stream: UnixStream,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// There is no server.
    pub fn connect(socket: &Path) -> Result<Client, ControlError> {
        let begun = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(Client { stream }),
                // The queue of a server that is being started again may be full for a moment.
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && begun.elapsed() < PATIENCE =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(source) => {
                    let socket = socket.display().to_string();
                    return Err(ControlError::Unreachable { socket, source });
                }
            }
        }
    }

    /// Asks, and gives back what is not a refusal.
    ///
    /// # Errors
    /// The server refused or left.
    pub fn ask(&mut self, request: &Request, what: &'static str) -> Result<Reply, ControlError> {
        let broken = |source| ControlError::Broken { what, source };
        control::send(&mut self.stream, request).map_err(broken)?;
        self.reply(what)
    }

    /// The next word of the server that is not a refusal.
    pub(super) fn reply(&mut self, what: &'static str) -> Result<Reply, ControlError> {
        let broken = |source| ControlError::Broken { what, source };
        match control::receive(&mut self.stream).map_err(broken)? {
            Some(Reply::Failed { message, code }) => Err(ControlError::Refused { message, code }),
            Some(reply) => Ok(reply),
            None => Err(broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    fn done(&mut self, request: &Request, what: &'static str) -> Result<(), ControlError> {
        match self.ask(request, what)? {
            Reply::Done => Ok(()),
            _ => Err(ControlError::Confused { what }),
        }
    }

    fn bytes(&mut self, request: &Request, what: &'static str) -> Result<u64, ControlError> {
        match self.ask(request, what)? {
            Reply::Bytes { bytes } => Ok(bytes),
            _ => Err(ControlError::Confused { what }),
        }
    }

    /// State and counters.
    ///
    /// # Errors
    /// The server refused or left.
    pub fn stat(&mut self) -> Result<Stat, ControlError> {
        match self.ask(&Request::Stat, "stat")? {
            Reply::Stat(stat) => Ok(*stat),
            _ => Err(ControlError::Confused { what: "stat" }),
        }
    }

    /// Makes everything answered so far safe.
    ///
    /// # Errors
    /// The host refused, or the server left.
    pub fn flush(&mut self) -> Result<(), ControlError> {
        self.done(&Request::Flush, "flush")
    }

    /// Adds a listener to the write tracker.
    ///
    /// # Errors
    /// The name is taken, or the server left.
    pub fn tracker_start(&mut self, spec: &ListenerSpec, begin: Begin) -> Result<(), ControlError> {
        let spec = spec.clone();
        self.done(&Request::TrackerStart { spec, begin }, "tracker start")
    }

    /// Takes changed ranges out of a listener's bitmap; none left gives an empty list.
    ///
    /// # Errors
    /// There is no such listener, or the server left.
    pub fn tracker_take(
        &mut self,
        name: &str,
        from: u64,
        max_bytes: u64,
    ) -> Result<Vec<Range<u64>>, ControlError> {
        let request = Request::TrackerTake {
            name: name.to_owned(),
            from,
            max_bytes,
        };
        match self.ask(&request, "tracker take")? {
            Reply::Ranges { ranges } => Ok(ranges.into_iter().map(|(a, b)| a..b).collect()),
            _ => Err(ControlError::Confused {
                what: "tracker take",
            }),
        }
    }

    /// Bytes marked for a listener.
    ///
    /// # Errors
    /// There is no such listener, or the server left.
    pub fn tracker_pending(&mut self, name: &str) -> Result<u64, ControlError> {
        let name = name.to_owned();
        self.bytes(&Request::TrackerPending { name }, "tracker pending")
    }

    /// Ends a listener; gives the bytes that were still marked.
    ///
    /// # Errors
    /// There is no such listener, or the server left.
    pub fn tracker_stop(&mut self, name: &str) -> Result<u64, ControlError> {
        let name = name.to_owned();
        self.bytes(&Request::TrackerStop { name }, "tracker stop")
    }

    /// What a range consists of.
    ///
    /// # Errors
    /// The range is outside of the disk, or the server left.
    pub fn map(&mut self, offset: u64, len_bytes: u64) -> Result<Vec<MapRun>, ControlError> {
        match self.ask(&Request::Map { offset, len_bytes }, "map")? {
            Reply::Map { runs } => Ok(runs),
            _ => Err(ControlError::Confused { what: "map" }),
        }
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// The range is outside of the disk, the image can't be read, or the server left.
    pub fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<(), ControlError> {
        let mut at = offset;
        for part in buf.chunks_mut(MAX_READ as usize) {
            let len_bytes = u32::try_from(part.len()).unwrap_or(MAX_READ);
            let request = Request::Read {
                offset: at,
                len_bytes,
            };
            let reply = self.ask(&request, "read")?;
            if reply != (Reply::Data { len_bytes }) {
                return Err(ControlError::Confused { what: "read" });
            }
            let broken = |source| ControlError::Broken {
                what: "read",
                source,
            };
            self.stream.read_exact(part).map_err(broken)?;
            at += u64::from(len_bytes);
        }
        Ok(())
    }

    /// Has the file system on the disk write out what it caches.
    ///
    /// # Errors
    /// The host refused, or the server left.
    pub fn write_out(&mut self, dir: Option<PathBuf>) -> Result<(), ControlError> {
        self.done(&Request::WriteOut { dir }, "writing out")
    }

    /// Freezes the file system on the disk until [`thaw`](Client::thaw), or until this connection ends.
    ///
    /// # Errors
    /// It can't be frozen, or the server left.
    pub fn freeze(&mut self, dir: Option<PathBuf>) -> Result<(), ControlError> {
        self.done(&Request::Freeze { dir }, "freeze")
    }

    /// Lets the file system go on.
    ///
    /// # Errors
    /// The server left, in which case a new one thaws it.
    pub fn thaw(&mut self) -> Result<(), ControlError> {
        self.done(&Request::Thaw, "thaw")
    }

    /// Enlarges the disk and fits its partition table; gives the partition's new length, or None where
    /// the disk has none. The device has to be told ([`refresh_size`](crate::device::loopdev::refresh_size)).
    ///
    /// # Errors
    /// The format or the host refused, or the server left.
    pub fn grow(&mut self, size_bytes: u64) -> Result<Option<u64>, ControlError> {
        let len = self.bytes(&Request::Grow { size_bytes }, "resize")?;
        Ok((len > 0).then_some(len))
    }

    /// Makes a snapshot of the running disk; gives its id and how long requests waited.
    ///
    /// # Errors
    /// The descriptor or the host refused, or the server left.
    pub fn snapshot(
        &mut self,
        id: Option<String>,
        freeze: bool,
    ) -> Result<(String, Duration), ControlError> {
        match self.ask(&Request::Snapshot { id, freeze }, "snapshot")? {
            Reply::Snapshot { id, held_us } => Ok((id, Duration::from_micros(held_us))),
            _ => Err(ControlError::Confused { what: "snapshot" }),
        }
    }

    /// Serves the disk by NBD on a Unix socket as long as this connection lives.
    ///
    /// # Errors
    /// The socket can't be made, or the server left.
    pub fn nbd(&mut self, socket: PathBuf, writable: bool) -> Result<(), ControlError> {
        self.done(&Request::Nbd { socket, writable }, "nbd")
    }

    /// Ends a server that has no device.
    ///
    /// # Errors
    /// It has one, or has left.
    pub fn stop(&mut self) -> Result<(), ControlError> {
        self.done(&Request::Stop, "stop")
    }
}
