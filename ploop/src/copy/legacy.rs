//! The original's own stream, which is read only.
//!
//! Packets of a header of 16 bytes (little endian) and a payload, which is written as it is into a file
//! that becomes a delta:
//!
//! | bytes | field |
//! |---:|---|
//! | 0..4 | magic `0x4CC0AC3D` |
//! | 4..8 | length of the payload |
//! | 8..16 | place in the file |
//!
//! A length of 0 ends the stream. A length of 4 at place 0 asks that everything be durable; the answer
//! is eight bytes of text. A receiver never undoes its work: it keeps the file as `NAME.partial`.

use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{CopyError, ReceiveOptions, ReceiveProgress, ReceiveReport, partial};

/// First word of each packet.
pub(super) const LEGACY_MAGIC: u32 = 0x4CC0_AC3D;
/// Longest payload: the largest cluster.
const MAX_PAYLOAD: u32 = 64 << 20;

/// Receives a file; the stream's first four bytes have been read and were the magic.
pub(super) fn receive(
    from: &mut dyn Read,
    mut feedback: Option<&mut (dyn Write + Send)>,
    path: &Path,
    options: &ReceiveOptions,
    progress: &mut dyn FnMut(ReceiveProgress),
) -> Result<ReceiveReport, CopyError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    let partial = PathBuf::from(name);
    let failed = |action: &'static str| {
        let file = partial.display().to_string();
        move |source| CopyError::Target {
            file: file.clone(),
            action,
            source,
        }
    };
    if path.exists() {
        return Err(failed("creating")(io::ErrorKind::AlreadyExists.into()));
    }
    let held = partial::create(&partial).map_err(failed("creating"))?;
    let file = held.file();
    // A map of another copy is of the file that was there before.
    let mut map = partial.clone().into_os_string();
    map.push(".map");
    match std::fs::remove_file(map) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("removing the map of")(error));
        }
        _ => {}
    }
    let mut report = ReceiveReport {
        is_legacy: true,
        ..ReceiveReport::default()
    };
    let mut is_first = true;
    loop {
        let packet = next(from, std::mem::take(&mut is_first), options, &partial)?;
        if packet.payload.is_empty() {
            file.sync_all().map_err(failed("syncing"))?;
            super::target::rename_new(&partial, path).map_err(failed("renaming"))?;
            return Ok(report);
        }
        if packet.payload.len() == 4 && packet.place == 0 {
            let synced = file.sync_all();
            let answer: &[u8; 8] = match synced {
                Ok(()) => b"SUCCESS\n",
                Err(_) => b"FAILURE\n",
            };
            if let Some(feedback) = &mut feedback {
                let sent = feedback.write_all(answer).and_then(|()| feedback.flush());
                sent.map_err(failed("answering for"))?;
            }
            synced.map_err(failed("syncing"))?;
            report.barriers += 1;
            continue;
        }
        file.write_all_at(&packet.payload, packet.place)
            .map_err(failed("writing"))?;
        report.data_bytes += packet.payload.len() as u64;
        progress(ReceiveProgress {
            data_bytes: report.data_bytes,
            ..ReceiveProgress::default()
        });
    }
}

struct Packet {
    place: u64,
    payload: Vec<u8>,
}

fn next(
    from: &mut dyn Read,
    is_first: bool,
    options: &ReceiveOptions,
    partial: &Path,
) -> Result<Packet, CopyError> {
    let cut_off = |_| CopyError::CutOff {
        partial: partial.display().to_string(),
    };
    let rule = |what: String| CopyError::Stream { what };
    let mut head = [0; 16];
    head[..4].copy_from_slice(&LEGACY_MAGIC.to_le_bytes());
    let known = if is_first { 4 } else { 0 };
    from.read_exact(&mut head[known..]).map_err(cut_off)?;
    let u32_at = |at| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if u32_at(0) != LEGACY_MAGIC {
        return Err(rule("a packet does not begin with its mark".to_owned()));
    }
    let len = u32_at(4);
    let place = u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32;
    if len > MAX_PAYLOAD {
        return Err(rule(format!("a packet of {len} bytes is too long")));
    }
    let end = place.checked_add(len.into());
    if end.is_none_or(|end| end > options.max_size) {
        return Err(rule(format!(
            "{len} bytes at {place} make too large a file"
        )));
    }
    let mut payload = Vec::new();
    let read = from.take(len.into()).read_to_end(&mut payload);
    if read.map_err(cut_off)? != len as usize {
        return Err(cut_off(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(Packet { place, payload })
}
