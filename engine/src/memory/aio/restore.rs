//! Making contexts again, at their old addresses.

use std::os::fd::AsRawFd;

use firn_sys::mm::{map, prot};
use firn_sys::{Errno, nr};

use super::{HEADER_LEN, Header};
use crate::memory::image::MemoryImage;
use crate::memory::piece::{self, Piece};
use crate::memory::plan::MemoryPlanError;
use crate::memory::range::AddressRange;
use crate::memory::vma::{Vma, status};
use crate::program::{Arg, Data, Program, Rule};

const MREMAP_MAYMOVE: u32 = 1;
const MREMAP_FIXED: u32 = 2;
/// Most requests of one io_submit.
const MAX_AT_ONCE: u32 = 256;
const IOCB_CMD_PWRITE: u64 = 1;
const EVENT_LEN: usize = 32;

/// How a context is made again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::memory) struct AioPlan {
    range: AddressRange,
    nr_req: u32,
    header: Header,
    /// The ring's pages in the images.
    pieces: Vec<Piece>,
}

/// Plans the contexts of a task.
///
/// # Errors
/// A ring whose head can't be read or makes no sense.
pub(in crate::memory) fn plan(image: &MemoryImage) -> Result<Vec<AioPlan>, MemoryPlanError> {
    let rings = image.vmas().iter().filter(|vma| vma.is(status::AIORING));
    rings.map(|vma| plan_one(image, vma)).collect()
}

fn plan_one(image: &MemoryImage, vma: &Vma) -> Result<AioPlan, MemoryPlanError> {
    let corrupt = || MemoryPlanError::AioRing {
        pid: image.pid(),
        range: vma.range,
    };
    let pieces = piece::pieces_in(image.pages(), vma.range);
    let first = pieces
        .first()
        .filter(|piece| piece.range.start == vma.range.start)
        .ok_or_else(corrupt)?;
    let file = &image.pages().files()[first.file];
    let mut bytes = [0u8; HEADER_LEN];
    file.read_exact_at(&mut bytes, first.offset)
        .map_err(|error| MemoryPlanError::Read {
            path: file.path().display().to_string(),
            source: Errno::from(error),
        })?;
    let entry = image
        .aios()
        .iter()
        .find(|entry| entry.id == vma.range.start);
    Ok(AioPlan {
        range: vma.range,
        nr_req: entry.ok_or_else(corrupt)?.nr_req,
        header: Header::parse(&bytes, vma.range.len()).ok_or_else(corrupt)?,
        pieces,
    })
}

impl AioPlan {
    /// Adds the records that make the context; `null` is a descriptor of /dev/null.
    ///
    /// The old address must still be free: it is taken first, so that the new ring never comes to lie there
    /// or across it, from where it could not be moved into place.
    pub(in crate::memory) fn emit(&self, p: &mut Program, image: &MemoryImage, null: i32) {
        let (start, len) = (Arg::from(self.range.start), Arg::from(self.range.len()));
        let address = Rule::Exact(self.range.start.cast_signed());
        let flags = map::PRIVATE | map::ANONYMOUS | map::NORESERVE | map::FIXED_NOREPLACE;
        p.call(
            nr::MMAP,
            &[start, len, 0.into(), flags.into(), (-1).into(), 0.into()],
            address,
            format!("keeping the place of the aio ring [{}]", self.range),
        );
        let context = p.space(8);
        p.call(
            nr::IO_SETUP,
            &[self.nr_req.into(), context.into()],
            Rule::Exact(0),
            format!("io_setup for {} requests", self.nr_req),
        );
        let flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        p.call(
            nr::MREMAP,
            &[Arg::Held(context), len, len, flags.into(), start],
            address,
            format!("moving the aio ring to [{}]", self.range),
        );
        self.move_tail(p, null);
        self.read_events(p, image);
    }

    /// Lets requests end until head and tail are where they were, those before the head taken.
    fn move_tail(&self, p: &mut Program, null: i32) {
        let at_once = (self.header.nr / 4).clamp(1, MAX_AT_ONCE);
        let mut requests = Requests::new(p, self.range.start, at_once, null);
        for nr in parts(self.header.head, at_once) {
            requests.submit(p, nr);
            requests.take(p, nr);
        }
        for nr in parts(self.header.waiting(), at_once) {
            requests.submit(p, nr);
        }
    }

    /// Reads the events; the head of the ring is right already, but for the id, which is new.
    fn read_events(&self, p: &mut Program, image: &MemoryImage) {
        for piece in &self.pieces {
            let skipped = match piece.range.start == self.range.start {
                true => u64::try_from(HEADER_LEN).expect("a small number"),
                false => 0,
            };
            let (start, len) = (piece.range.start + skipped, piece.len() - skipped);
            let file = &image.pages().files()[piece.file];
            let iovec = p.table(&[start.into(), len.into()]);
            let offset = piece.offset + skipped;
            let held = file
                .held()
                .expect("the files of a task with rings are held");
            let args = [
                held.as_raw_fd().into(),
                iovec.into(),
                1.into(),
                offset.into(),
            ];
            let why = format!("reading events of the aio ring [{}]", self.range);
            p.call_retrying(nr::PREADV, &args, Rule::Exact(len.cast_signed()), why);
        }
    }
}

/// Parts of at most `at_once` that add up to `all`.
fn parts(all: u32, at_once: u32) -> impl Iterator<Item = u32> {
    (0..all.div_ceil(at_once)).map(move |nth| (all - nth * at_once).min(at_once))
}

/// Requests that write a byte to nowhere, and the place where their events are put.
struct Requests {
    context: u64,
    table: Data,
    events: Data,
}

impl Requests {
    fn new(p: &mut Program, context: u64, at_once: u32, null: i32) -> Requests {
        let at_once = usize::try_from(at_once).expect("a small number");
        let byte = p.space(8);
        let fd = u64::from(null.cast_unsigned());
        // struct iocb: data, key and flags, opcode with priority and descriptor, buffer, length,
        // offset, reserved, flags and eventfd.
        let request = p.table(&[
            0.into(),
            0.into(),
            (IOCB_CMD_PWRITE | fd << 32).into(),
            byte.into(),
            1.into(),
            0.into(),
            0.into(),
            0.into(),
        ]);
        Requests {
            context,
            table: p.table(&vec![request.into(); at_once]),
            events: p.space(EVENT_LEN * at_once),
        }
    }

    fn submit(&mut self, p: &mut Program, nr: u32) {
        let args = [self.context.into(), nr.into(), self.table.into()];
        let why = format!("moving the tail of the aio ring {:#x}", self.context);
        p.call(nr::IO_SUBMIT, &args, Rule::Exact(nr.into()), why);
    }

    fn take(&mut self, p: &mut Program, nr: u32) {
        let events = self.events.into();
        let args = [self.context.into(), nr.into(), nr.into(), events, 0.into()];
        let why = format!("moving the head of the aio ring {:#x}", self.context);
        p.call(nr::IO_GETEVENTS, &args, Rule::Exact(nr.into()), why);
    }
}

/// Protection of a ring while it is filled, as io_setup gives it.
pub(in crate::memory) const PROT_AT_FIRST: u32 = prot::READ | prot::WRITE;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up() {
        assert_eq!(parts(0, 31).count(), 0);
        assert_eq!(parts(62, 31).collect::<Vec<_>>(), [31, 31]);
        assert_eq!(parts(70, 31).collect::<Vec<_>>(), [31, 31, 8]);
    }

    #[test]
    fn a_wrapped_ring_is_walked_up_to_its_head_and_beyond() {
        let range = AddressRange::new(0x10000, 0x11000);
        let plan = AioPlan {
            range,
            nr_req: 62,
            header: Header {
                nr: 127,
                head: 125,
                tail: 3,
            },
            pieces: Vec::new(),
        };
        let mut p = Program::new("task 1");
        plan.move_tail(&mut p, 9);
        let text = p.to_string();
        assert_eq!(text.matches("moving the head").count(), 5, "{text}");
        assert_eq!(text.matches("moving the tail").count(), 6, "{text}");
    }
}
