//! Requests that take their time. The answer comes after word of how far they are, and of what they
//! give; a client that hangs up calls them off.

use std::io::{self, BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::client::{Client, ControlError};
use super::control::{self, Reply, Request};
use super::open::{self, Refusal};
use super::worker::Worker;
use crate::folder::{Backup, BackupReport, OnProgress};

/// Pause between two words of how far it is.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes that are sent at once.
const FRAME: usize = 1 << 20;

/// Whether a request is one of these.
pub(super) fn is_long(request: &Request) -> bool {
    matches!(
        request,
        Request::SnapshotDelete { .. } | Request::Merge { .. } | Request::Backup { .. }
    )
}

/// Does it.
pub(super) fn answer(
    worker: &Worker,
    stream: &UnixStream,
    request: &Request,
) -> Result<Reply, Refusal> {
    let (serve, options) = (&worker.config.serve, &worker.options);
    let disk = &**worker.export.disk();
    let mut told = Instant::now();
    let mut tell = |done, all| {
        if told.elapsed() < PAUSE {
            return true;
        }
        told = Instant::now();
        control::send(&mut &*stream, &Reply::Progress { done, all }).is_ok()
    };
    match request {
        Request::SnapshotDelete { id } => {
            open::delete(serve, disk, options, id, &mut tell)?;
            Ok(Reply::Done)
        }
        Request::Merge { id } => {
            open::merge(serve, disk, options, id.as_deref(), &mut tell)?;
            Ok(Reply::Done)
        }
        Request::Backup { incremental } => {
            let kind = match incremental {
                true => Backup::Incremental,
                false => Backup::Full,
            };
            let mut out = BufWriter::with_capacity(FRAME, Frames { stream });
            let report = open::backup(serve, disk, options, kind, &mut out, &mut tell)?;
            Ok(Reply::Backup {
                clusters: report.clusters,
                bytes: report.bytes,
                next: report.next.to_string(),
                since: report.since.map(|guid| guid.to_string()),
            })
        }
        _ => Err(("it is no request that takes long".to_owned(), 13)),
    }
}

/// Sends what is written in pieces that say how long they are.
struct Frames<'a> {
    stream: &'a UnixStream,
}

impl Write for Frames<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(control::MAX_READ as usize)];
        let len_bytes = u32::try_from(piece.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut stream = self.stream;
        control::send(&mut stream, &Reply::Data { len_bytes })?;
        stream.write_all(piece)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Client {
    /// Takes a snapshot off the chain of the running disk. A `progress` that answers false calls it off;
    /// it can be begun again.
    ///
    /// # Errors
    /// There is none of this name, the host refused, it was called off, or the server left.
    pub fn snapshot_delete(
        &mut self,
        id: String,
        progress: OnProgress<'_>,
    ) -> Result<(), ControlError> {
        self.finish(&Request::SnapshotDelete { id }, progress)
    }

    /// Merges a delta of the running disk into its parent; None is the top.
    ///
    /// # Errors
    /// As [`snapshot_delete`](Client::snapshot_delete).
    pub fn merge(
        &mut self,
        id: Option<String>,
        progress: OnProgress<'_>,
    ) -> Result<(), ControlError> {
        self.finish(&Request::Merge { id }, progress)
    }

    fn finish(&mut self, request: &Request, progress: OnProgress<'_>) -> Result<(), ControlError> {
        match self.ask_long(request, &mut io::sink(), progress)? {
            Reply::Done => Ok(()),
            _ => Err(ControlError::Confused { what: "merge" }),
        }
    }

    /// Writes a backup of the running disk, as it is at one moment, into `out`.
    ///
    /// # Errors
    /// There is nothing to be incremental by, the host or `out` refused, it was called off, or the
    /// server left.
    pub fn backup(
        &mut self,
        kind: Backup,
        out: &mut dyn Write,
        progress: OnProgress<'_>,
    ) -> Result<BackupReport, ControlError> {
        let confused = |_| ControlError::Confused { what: "backup" };
        let incremental = kind == Backup::Incremental;
        match self.ask_long(&Request::Backup { incremental }, out, progress)? {
            Reply::Backup {
                clusters,
                bytes,
                next,
                since,
            } => Ok(BackupReport {
                clusters,
                bytes,
                next: next.parse().map_err(confused)?,
                since: since.map(|id| id.parse()).transpose().map_err(confused)?,
            }),
            _ => Err(ControlError::Confused { what: "backup" }),
        }
    }

    fn ask_long(
        &mut self,
        request: &Request,
        out: &mut dyn Write,
        progress: OnProgress<'_>,
    ) -> Result<Reply, ControlError> {
        const WHAT: &str = "a merge or backup";
        let broken = |source| ControlError::Broken { what: WHAT, source };
        let mut reply = self.ask(request, WHAT)?;
        let mut piece = Vec::new();
        loop {
            match reply {
                Reply::Progress { done, all } if progress(done, all) => {}
                Reply::Progress { .. } => {
                    // The server sees it at its next word.
                    let _ = self.stream.shutdown(std::net::Shutdown::Both);
                    return Err(broken(io::ErrorKind::Interrupted.into()));
                }
                Reply::Data { len_bytes } if len_bytes <= control::MAX_READ => {
                    piece.resize(len_bytes as usize, 0);
                    self.stream.read_exact(&mut piece).map_err(broken)?;
                    out.write_all(&piece).map_err(ControlError::Output)?;
                }
                last => {
                    out.flush().map_err(ControlError::Output)?;
                    return Ok(last);
                }
            }
            reply = self.reply(WHAT)?;
        }
    }
}
