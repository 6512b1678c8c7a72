//! Rings of packet sockets that are in use: the program and the kernel stand somewhere in them.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::packet::{
    IPV4, LO, RX_RING, SOL_PACKET, TX_RING, VERSION, address, packet_socket, send,
};
use crate::sys::Region;
use crate::{Need, Stage, Workload, sys};

pub static FRAMES: Workload = Workload::new(
    "sockets/packet-ring-frames",
    "rings of frames, unread and read, that have gone round or are full",
    frames,
)
.needs(&[Need::Root]);
pub static BLOCKS: Workload = Workload::new(
    "sockets/packet-ring-blocks",
    "rings of blocks: unread ones, one that is being filled, a full ring",
    blocks,
)
.needs(&[Need::Root]);
pub static UNSENT: Workload = Workload::new(
    "sockets/packet-ring-unsent",
    "rings for sending, with a frame that was not sent and without",
    unsent,
)
.needs(&[Need::Root, Need::File("/sys/kernel/btf/vmlinux")]);

const BLOCK: u32 = 4096;
const NR_BLOCKS: u32 = 4;
const FRAME: u32 = 1024;
const NR_FRAMES: u32 = BLOCK / FRAME * NR_BLOCKS;
/// Protocol of what is sent through rings.
const OURS: u16 = 0x88b6;
/// Ethernet, IPv4 and UDP.
const HEADERS: usize = 14 + 20 + 8;
const LONG_MS: u32 = 60_000;

/// A ring and its socket, as a program uses it.
struct Ring {
    fd: OwnedFd,
    memory: Region,
    version: i32,
    next: usize,
}

impl Ring {
    fn new(name: i32, version: i32, timeout_ms: u32, protocol: u16) -> Result<Ring> {
        let fd = packet_socket(libc::SOCK_RAW, 0)?;
        sys::set_sockopt_int(&fd, SOL_PACKET, VERSION, version)?;
        let words = [BLOCK, NR_BLOCKS, FRAME, NR_FRAMES, timeout_ms, 0, 0];
        let request: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        sys::set_sockopt(&fd, SOL_PACKET, name, &request).context("making a ring")?;
        if protocol != 0 {
            sys::bind(&fd, &address(LO, protocol))?;
        }
        let len = usize::try_from(BLOCK * NR_BLOCKS)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let memory = Region::file(std::os::fd::AsFd::as_fd(&fd), len, prot, libc::MAP_SHARED)?;
        Ok(Ring {
            fd,
            memory,
            version,
            next: 0,
        })
    }

    fn receiving(version: i32, timeout_ms: u32) -> Result<Ring> {
        Ring::new(RX_RING, version, timeout_ms, IPV4)
    }

    fn word(&self, at: usize) -> usize {
        let bytes = self.memory.get(at, 4);
        usize::try_from(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).unwrap_or(0)
    }

    fn half(&self, at: usize) -> usize {
        let bytes = self.memory.get(at, 2);
        usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]))
    }

    /// The text of a frame, if it is the program's.
    fn frame_at(&self, nth: usize) -> Option<String> {
        let at = nth * 1024;
        if self.word(at) & 1 == 0 {
            return None;
        }
        let (len, mac) = match self.version {
            0 => (self.word(at + 12), self.half(at + 16)),
            _ => (self.word(at + 8), self.half(at + 12)),
        };
        let text = self.memory.get(at + mac, len)[HEADERS..].to_vec();
        String::from_utf8(text).ok()
    }

    /// The texts of a block, if it is the program's.
    fn block_at(&self, nth: usize) -> Option<Vec<String>> {
        let begin = nth * 4096;
        if self.word(begin + 8) & 1 == 0 {
            return None;
        }
        let mut at = begin + self.word(begin + 16);
        let mut texts = Vec::new();
        for _ in 0..self.word(begin + 12) {
            let (len, mac) = (self.word(at + 12), self.half(at + 24));
            let text = self.memory.get(at + mac, len)[HEADERS..].to_vec();
            texts.extend(String::from_utf8(text));
            at += self.word(at);
        }
        Some(texts)
    }

    fn nr_slots(&self) -> usize {
        if self.version == 2 { 4 } else { 16 }
    }

    fn texts_at(&self, nth: usize) -> Option<Vec<String>> {
        match self.version {
            2 => self.block_at(nth),
            _ => self.frame_at(nth).map(|text| vec![text]),
        }
    }

    /// All that waits, which stays there.
    fn waiting(&self) -> Vec<String> {
        let slots = (0..self.nr_slots()).map(|nth| (self.next + nth) % self.nr_slots());
        slots
            .map_while(|nth| self.texts_at(nth))
            .flatten()
            .collect()
    }

    /// Takes what is in the next slot and gives it back.
    fn take(&mut self) -> Vec<String> {
        let Some(texts) = self.texts_at(self.next) else {
            return Vec::new();
        };
        let status = if self.version == 2 {
            self.next * 4096 + 8
        } else {
            self.next * 1024
        };
        self.memory.put(status, &[0; 4]);
        self.next = (self.next + 1) % self.nr_slots();
        texts
    }

    /// Expects these texts and no others.
    fn expect(&mut self, texts: &[String]) -> Result<()> {
        let (mut found, started) = (Vec::new(), Instant::now());
        while found.len() < texts.len() && started.elapsed() < Duration::from_secs(10) {
            found.extend(self.take());
            if found.len() < texts.len() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let begins = |texts: &[String]| -> Vec<String> {
            texts
                .iter()
                .map(|text| text.trim_end().to_owned())
                .collect()
        };
        ensure!(
            found == texts,
            "version {}: {:?} came, and not {:?}",
            self.version,
            begins(&found),
            begins(texts)
        );
        Ok(())
    }
}

/// Sends numbered datagrams of 600 bytes.
fn talk(numbers: std::ops::Range<u32>) -> Result<Vec<String>> {
    let say = |number| {
        let text = format!("{:600}", format!("datagram {number}"));
        send(text.as_bytes()).map(|()| text)
    };
    numbers.map(say).collect()
}

fn frames(stage: &Stage) -> Result<()> {
    for_each_version(stage, &[0, 1], |version| Ring::receiving(version, 0))
}

fn blocks(stage: &Stage) -> Result<()> {
    for_each_version(stage, &[2], |version| Ring::receiving(version, 20))
}

/// Five rings of each version: idle in the middle, with unread frames, gone round, full, and full after it had gone
/// round.
fn for_each_version(
    stage: &Stage,
    versions: &[i32],
    make: impl Fn(i32) -> Result<Ring>,
) -> Result<()> {
    // (read before, unread): a block takes five datagrams.
    let cases: [(u32, u32); 5] = [(3, 0), (5, 4), (14, 6), (0, 40), (7, 40)];
    let mut rings = Vec::new();
    for version in versions {
        for (read, unread) in cases {
            let mut ring = make(*version)?;
            for number in 0..read {
                let texts = talk(number..number + 1)?;
                ring.expect(&texts)?;
            }
            let sent = talk(100..100 + unread)?;
            // Blocks are handed over when their time is over.
            std::thread::sleep(Duration::from_millis(100));
            let waiting = ring.waiting();
            let is_full = unread > NR_FRAMES;
            ensure!(sent.starts_with(&waiting), "it begins with something else");
            ensure!(
                is_full != (waiting.len() == sent.len()),
                "{} wait",
                waiting.len()
            );
            // What comes for the next one is no matter of this one.
            close(&ring)?;
            rings.push((ring, waiting));
        }
    }
    let mut filling = filling(versions)?;
    stage.ready_and_wait()?;
    for (ring, texts) in &mut rings {
        open(ring)?;
        ring.expect(texts)?;
        for number in 200..240 {
            let text = talk(number..number + 1)?;
            ring.expect(&text)?;
        }
        close(ring)?;
    }
    if let Some((ring, texts)) = &mut filling {
        // A restore hands the open block over; where there was none it gets full now.
        open(ring)?;
        texts.extend(talk(303..313)?);
        let (mut found, started) = (Vec::new(), Instant::now());
        while found.len() < 5 && started.elapsed() < Duration::from_secs(10) {
            found.extend(ring.take());
        }
        ensure!(found.len() >= 5, "{} of the open block came", found.len());
        ensure!(texts.starts_with(&found), "the open block has changed");
    }
    Ok(())
}

/// Lets nothing more come into a ring.
fn close(ring: &Ring) -> Result<()> {
    Ok(sys::attach_filter(&ring.fd, &[(6, 0, 0, 0)])?)
}

fn open(ring: &Ring) -> Result<()> {
    Ok(sys::set_sockopt_int(
        &ring.fd,
        libc::SOL_SOCKET,
        libc::SO_DETACH_FILTER,
        0,
    )?)
}

/// A ring whose first block stays open, with some packets in it.
fn filling(versions: &[i32]) -> Result<Option<(Ring, Vec<String>)>> {
    if versions != [2] {
        return Ok(None);
    }
    let ring = Ring::receiving(2, LONG_MS)?;
    let texts = talk(300..303)?;
    close(&ring)?;
    ensure!(ring.word(8) & 1 == 0, "the block is closed already");
    Ok(Some((ring, texts)))
}

fn unsent(stage: &Stage) -> Result<()> {
    let mut rings = Vec::new();
    for version in [0, 1, 2] {
        for waits in [false, true] {
            let ring = Ring::new(TX_RING, version, 0, 0)?;
            rings.push((ring, waits));
        }
    }
    let listener = packet_socket(libc::SOCK_RAW, OURS)?;
    for (nth, (ring, waits)) in rings.iter_mut().enumerate() {
        for number in 0..5 {
            ring.put_frame(&format!("ring {nth} frame {number}"))?;
            ring.flush()?;
        }
        if *waits {
            ring.put_frame(&format!("ring {nth} waits"))?;
        }
        ensure!(heard(&listener)?.len() == 5, "ring {nth} does not send");
    }
    stage.ready_and_wait()?;
    for (nth, (ring, waits)) in rings.iter_mut().enumerate() {
        let (mut expected, mut came) = (Vec::new(), Vec::new());
        if *waits {
            expected.push(format!("ring {nth} waits"));
        }
        for number in 5..25 {
            let text = format!("ring {nth} frame {number}");
            ring.put_frame(&text)?;
            ring.flush()?;
            expected.push(text);
            // What waits at the listener is in the ring still, until it is overwritten.
            came.extend(heard(&listener)?);
        }
        ensure!(came == expected, "ring {nth} sends {came:?}");
    }
    Ok(())
}

impl Ring {
    /// Puts a frame into the next slot of a ring for sending.
    fn put_frame(&mut self, text: &str) -> Result<()> {
        let at = self.next * 1024;
        let (status, len, data) = match self.version {
            0 => (0, 8, 32),
            1 => (0, 4, 32),
            _ => (20, 16, 48),
        };
        let free = || self.word(at + status) & 7 == 0;
        let started = Instant::now();
        while !free() {
            if started.elapsed() > Duration::from_secs(5) {
                bail!("slot {} is not free", self.next);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut frame = [&[0; 12][..], &OURS.to_be_bytes(), text.as_bytes()].concat();
        frame.resize(100, 0);
        self.memory.put(at + data, &frame);
        self.memory
            .put(at + len, &u32::try_from(frame.len())?.to_ne_bytes());
        self.memory.put(at + status, &1u32.to_ne_bytes());
        self.next = (self.next + 1) % 16;
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        sys::send_message(&self.fd, b"", Some(&address(LO, OURS)), &[]).context("sending")?;
        Ok(())
    }
}

/// The texts of the frames that have come.
fn heard(listener: &OwnedFd) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    while let Ok(frame) = sys::receive_message(listener, 4096, libc::MSG_DONTWAIT) {
        let text = frame.bytes.get(14..).context("a short frame")?;
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        texts.push(String::from_utf8_lossy(text).into_owned());
    }
    Ok(texts)
}
