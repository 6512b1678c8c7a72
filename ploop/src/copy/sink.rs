//! Where a copy goes: a stream to somebody else, or a file here.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::wire::{self, DecodeError, Decoder, Encoder, Hello, Kind, Packet};
use super::{CopyError, Rate};

/// Packets on their way at most.
const IN_FLIGHT: usize = 4;
/// So long a receiver that hung up is given to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What came back: a packet, the end, or neither.
type Answer = Result<Option<Packet>, DecodeError>;

/// A destination.
pub trait Sink {
    /// Whether [`begin`](Sink::begin) can say what is there already.
    fn hears(&self) -> bool {
        true
    }
    /// Begins; gives the hashes of blocks that are there from an earlier try.
    ///
    /// # Errors
    /// The other side refused or left.
    fn begin(&mut self, hello: &Hello) -> Result<HashMap<u64, u64>, CopyError>;
    /// Takes bytes.
    ///
    /// # Errors
    /// The other side left, or the file can't be written.
    fn data(&mut self, offset: u64, bytes: Vec<u8>) -> Result<(), CopyError>;
    /// Takes zeroes.
    ///
    /// # Errors
    /// The other side left, or the file can't be written.
    fn zero(&mut self, offset: u64, len_bytes: u64) -> Result<(), CopyError>;
    /// Returns when everything before is durable, where the other side can say so.
    ///
    /// # Errors
    /// The other side left or failed.
    fn barrier(&mut self) -> Result<(), CopyError>;
    /// Sets the end mark and returns when the target has its name.
    ///
    /// # Errors
    /// The other side left or failed.
    fn end(&mut self) -> Result<(), CopyError>;
    /// Bytes that went over the wire so far.
    fn sent_bytes(&self) -> u64;
}

/// A stream, with a thread that writes while the next block is read.
pub struct StreamSink {
    session: String,
    encoder: Encoder,
    rate: Rate,
    queue: Option<SyncSender<Vec<u8>>>,
    writer: Option<JoinHandle<io::Result<()>>>,
    feedback: Option<Receiver<Answer>>,
    sent: u64,
}

impl StreamSink {
    /// A stream that begins. Without `feedback` nobody says what has arrived.
    pub fn new(
        mut to: Box<dyn Write + Send>,
        feedback: Option<Box<dyn Read + Send>>,
        session: &str,
        zstd_level: Option<i32>,
        rate: Rate,
    ) -> StreamSink {
        let (queue, packets) = sync_channel::<Vec<u8>>(IN_FLIGHT);
        let writer = std::thread::spawn(move || {
            for packet in packets {
                wire::write(&mut *to, &packet)?;
            }
            Ok(())
        });
        StreamSink {
            session: session.to_owned(),
            encoder: Encoder::new(zstd_level),
            rate,
            queue: Some(queue),
            writer: Some(writer),
            feedback: feedback.map(listen),
            sent: 0,
        }
    }

    fn broken(&self, what: &'static str, source: io::Error) -> CopyError {
        CopyError::Pipe {
            what,
            session: self.session.clone(),
            source,
        }
    }

    fn send(&mut self, kind: Kind, offset: u64, payload: &[u8]) -> Result<u64, CopyError> {
        let encoded = self.encoder.encode(kind, offset, payload);
        let (packet, sequence) = encoded.map_err(|error| self.broken("the stream", error))?;
        let len = packet.len() as u64;
        self.rate.pass(len);
        let queued = self.queue.as_ref().map(|queue| queue.send(packet));
        if !matches!(queued, Some(Ok(()))) {
            return Err(self.hang_up());
        }
        self.sent += len;
        Ok(sequence)
    }

    /// The writer has ended early: why? The receiver may have said it.
    fn hang_up(&mut self) -> CopyError {
        drop(self.queue.take());
        let written = self.writer.take().map(JoinHandle::join);
        let error = match written {
            Some(Ok(Err(error))) => error,
            _ => io::ErrorKind::BrokenPipe.into(),
        };
        let last = self
            .feedback
            .as_ref()
            .map(|from| from.recv_timeout(LAST_WORDS));
        match last {
            Some(Ok(Ok(Some(packet)))) if packet.kind == Kind::Failed => as_failure(&packet),
            _ => self.broken("the stream", error),
        }
    }

    fn answer(&mut self) -> Result<Option<Packet>, CopyError> {
        let Some(feedback) = &self.feedback else {
            return Ok(None);
        };
        match feedback.recv().unwrap_or(Ok(None)) {
            Ok(Some(packet)) if packet.kind == Kind::Failed => Err(as_failure(&packet)),
            Ok(Some(packet)) => Ok(Some(packet)),
            Ok(None) => {
                let error = io::ErrorKind::UnexpectedEof.into();
                Err(self.broken("the feedback", error))
            }
            Err(DecodeError::Io(error)) => Err(self.broken("the feedback", error)),
            Err(DecodeError::Rule(what)) => Err(CopyError::Stream { what }),
        }
    }

    fn await_ack(&mut self, sequence: u64) -> Result<(), CopyError> {
        match self.answer()? {
            Some(packet) if packet.kind != Kind::Ack || packet.offset != sequence => {
                let what = "the receiver answered something else than was asked".to_owned();
                Err(CopyError::Stream { what })
            }
            _ => Ok(()),
        }
    }
}

/// Reads answers in a thread of its own: one that never comes holds up nobody who does not need it.
fn listen(from: Box<dyn Read + Send>) -> Receiver<Answer> {
    let (sender, answers) = channel();
    std::thread::spawn(move || {
        let mut decoder = Decoder::new(from, wire::MAX_HAVE);
        loop {
            let answer = decoder.next(&[]);
            let goes_on = matches!(answer, Ok(Some(_)));
            if sender.send(answer).is_err() || !goes_on {
                return;
            }
        }
    });
    answers
}

fn as_failure(packet: &Packet) -> CopyError {
    CopyError::Receiver {
        message: String::from_utf8_lossy(&packet.payload).into_owned(),
    }
}

/// Reads the blocks that a receiver has.
fn parse_have(packet: &Packet) -> Result<HashMap<u64, u64>, CopyError> {
    let (rows, rest) = packet.payload.as_chunks::<16>();
    if packet.kind != Kind::Have || !rest.is_empty() {
        let what = "the receiver does not say what it has".to_owned();
        return Err(CopyError::Stream { what });
    }
    let number = |bytes: &[u8]| {
        let bytes: [u8; 8] = bytes.try_into().unwrap_or_default();
        u64::from_le_bytes(bytes)
    };
    Ok(rows
        .iter()
        .map(|row| (number(&row[..8]), number(&row[8..])))
        .collect())
}

impl Sink for StreamSink {
    fn hears(&self) -> bool {
        self.feedback.is_some()
    }

    fn begin(&mut self, hello: &Hello) -> Result<HashMap<u64, u64>, CopyError> {
        let text = serde_json::to_vec(hello).unwrap_or_default();
        self.send(Kind::Hello, 0, &text)?;
        match self.answer()? {
            Some(packet) => parse_have(&packet),
            None => Ok(HashMap::new()),
        }
    }

    fn data(&mut self, offset: u64, bytes: Vec<u8>) -> Result<(), CopyError> {
        self.send(Kind::Data, offset, &bytes).map(drop)
    }

    fn zero(&mut self, offset: u64, len_bytes: u64) -> Result<(), CopyError> {
        let payload = len_bytes.to_le_bytes();
        self.send(Kind::Zero, offset, &payload).map(drop)
    }

    fn barrier(&mut self) -> Result<(), CopyError> {
        let sequence = self.send(Kind::Barrier, 0, &[])?;
        self.await_ack(sequence)
    }

    fn end(&mut self) -> Result<(), CopyError> {
        let sequence = self.send(Kind::End, 0, &[])?;
        drop(self.queue.take());
        let written = self.writer.take().map(JoinHandle::join);
        if let Some(Ok(Err(error))) = written {
            return Err(self.broken("the stream", error));
        }
        self.await_ack(sequence)
    }

    fn sent_bytes(&self) -> u64 {
        self.sent
    }
}
