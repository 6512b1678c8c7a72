//! The receiver: a stream becomes a file.

use std::io::{self, Read, Write};

use super::legacy::{self, LEGACY_MAGIC};
use super::wire::{self, DecodeError, Decoder, Encoder, Hello, Kind, MAX_PAYLOAD};
use super::{CopyError, FileTarget, Sink};

/// How a stream is received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceiveOptions {
    /// Largest disk that is taken, in bytes.
    pub max_size: u64,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        ReceiveOptions {
            max_size: wire::MAX_SIZE,
        }
    }
}

/// How far a stream is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiveProgress {
    /// Bytes of data so far.
    pub data_bytes: u64,
    /// End of the farthest block so far; the first pass comes in the disk's order.
    pub reached_bytes: u64,
    /// Size of the disk; 0 where the stream does not tell.
    pub size_bytes: u64,
}

/// What came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiveReport {
    /// Bytes of data.
    pub data_bytes: u64,
    /// Bytes of zeroes that were told.
    pub zero_bytes: u64,
    /// Barriers.
    pub barriers: u64,
    /// The stream was the original's.
    pub is_legacy: bool,
}

/// Receives a disk. The file gets its name after the end mark; before, it is kept as `NAME.partial`.
///
/// # Errors
/// The stream breaks its rules or breaks off, or the file can't be written. The sender is told where
/// there is `feedback`.
pub fn receive(
    mut from: &mut (dyn Read + Send),
    mut feedback: Option<&mut (dyn Write + Send)>,
    target: FileTarget,
    options: &ReceiveOptions,
    progress: &mut dyn FnMut(ReceiveProgress),
) -> Result<ReceiveReport, CopyError> {
    let mut start = [0; 4];
    let mut have = 0;
    while have < start.len() {
        match from.read(&mut start[have..]) {
            Ok(0) => return Err(cut_off(&target)),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(broken(STREAM, &target)(source)),
        }
    }
    if u32::from_le_bytes(start) == LEGACY_MAGIC {
        let file = target.path().to_owned();
        drop(target);
        return legacy::receive(&mut from, feedback, &file, options, progress);
    }
    let mut receiver = Receiver {
        decoder: Decoder::new(from, MAX_PAYLOAD),
        answers: Encoder::new(None),
        report: ReceiveReport::default(),
        at: ReceiveProgress::default(),
        target,
    };
    let outcome = receiver.run(&start, &mut feedback, progress);
    if let (Err(error), Some(feedback)) = (&outcome, feedback) {
        // The sender may be what is gone.
        let message = chain(error);
        if let Ok((packet, _)) = receiver.answers.encode(Kind::Failed, 0, message.as_bytes()) {
            let _ = feedback.write_all(&packet).and_then(|()| feedback.flush());
        }
    }
    outcome.map(|()| receiver.report)
}

fn chain(error: &CopyError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

fn cut_off(target: &FileTarget) -> CopyError {
    CopyError::CutOff {
        partial: target.partial().display().to_string(),
    }
}

fn broken(what: &'static str, target: &FileTarget) -> impl Fn(io::Error) -> CopyError + use<> {
    let partial = target.partial().display().to_string();
    move |source| CopyError::Line {
        what,
        partial: partial.clone(),
        source,
    }
}

const STREAM: &str = "the stream";
const FEEDBACK: &str = "the feedback";

struct Receiver<R> {
    decoder: Decoder<R>,
    answers: Encoder,
    report: ReceiveReport,
    at: ReceiveProgress,
    target: FileTarget,
}

type Feedback<'a, 'b> = &'a mut Option<&'b mut (dyn Write + Send)>;

impl<R: Read> Receiver<R> {
    fn run(
        &mut self,
        start: &[u8],
        feedback: Feedback<'_, '_>,
        progress: &mut dyn FnMut(ReceiveProgress),
    ) -> Result<(), CopyError> {
        let mut start = start;
        loop {
            let packet = match self.decoder.next(start) {
                Ok(Some(packet)) => packet,
                Ok(None) => return Err(cut_off(&self.target)),
                Err(DecodeError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(cut_off(&self.target));
                }
                Err(DecodeError::Io(error)) => return Err(broken(STREAM, &self.target)(error)),
                Err(DecodeError::Rule(what)) => return Err(CopyError::Stream { what }),
            };
            start = &[];
            match packet.kind {
                Kind::Hello => self.begin(&packet.payload, feedback)?,
                Kind::Data => {
                    let len = packet.payload.len() as u64;
                    self.report.data_bytes += len;
                    self.at.reached_bytes =
                        self.at.reached_bytes.max(packet.offset.saturating_add(len));
                    self.target.data(packet.offset, packet.payload)?;
                }
                Kind::Zero => self.zero(packet.offset, &packet.payload)?,
                Kind::Barrier => {
                    self.target.barrier()?;
                    self.report.barriers += 1;
                    self.answer(feedback, Kind::Ack, packet.sequence, &[])?;
                }
                Kind::End => {
                    self.target.end()?;
                    return self.answer(feedback, Kind::Ack, packet.sequence, &[]);
                }
                Kind::Have | Kind::Ack | Kind::Failed => {
                    let what = "the sender sent an answer".to_owned();
                    return Err(CopyError::Stream { what });
                }
            }
            self.at.data_bytes = self.report.data_bytes;
            progress(self.at);
        }
    }

    fn begin(&mut self, payload: &[u8], feedback: Feedback<'_, '_>) -> Result<(), CopyError> {
        if self.report != ReceiveReport::default() || self.target.has_begun() {
            let what = "a second hello".to_owned();
            return Err(CopyError::Stream { what });
        }
        let mut hello: Hello = serde_json::from_slice(payload).map_err(|_| CopyError::Stream {
            what: "a hello that can't be read".to_owned(),
        })?;
        hello.hears &= feedback.is_some();
        let have = self.target.begin(&hello)?;
        self.at.size_bytes = hello.size_bytes;
        self.decoder.set_max_payload(hello.unit_bytes);
        let rows = have.iter();
        let payload: Vec<u8> = rows
            .flat_map(|(block, hash)| [block.to_le_bytes(), hash.to_le_bytes()].concat())
            .collect();
        self.answer(feedback, Kind::Have, 0, &payload)
    }

    fn zero(&mut self, offset: u64, payload: &[u8]) -> Result<(), CopyError> {
        let len: [u8; 8] = payload.try_into().map_err(|_| CopyError::Stream {
            what: "zeroes without a length".to_owned(),
        })?;
        let len = u64::from_le_bytes(len);
        self.target.zero(offset, len)?;
        self.report.zero_bytes += len;
        Ok(())
    }

    fn answer(
        &mut self,
        feedback: Feedback<'_, '_>,
        kind: Kind,
        number: u64,
        payload: &[u8],
    ) -> Result<(), CopyError> {
        let Some(feedback) = feedback else {
            return Ok(());
        };
        let packet = self.answers.encode(kind, number, payload);
        let sent = packet.and_then(|(packet, _)| {
            feedback.write_all(&packet)?;
            feedback.flush()
        });
        sent.map_err(broken(FEEDBACK, &self.target))
    }
}
