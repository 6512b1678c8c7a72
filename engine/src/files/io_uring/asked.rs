//! What was asked for by a request in flight, by its operation.

use firn_proto::{FirnUringBuffer, FirnUringRequest};
use firn_sys::io_uring::request;
use firn_sys::process_vm::{self, RemoteRange};
use firn_sys::{Pid, clock, epoll, pidfd};

use super::operations::{self, Refusal, States};
use crate::kernel::Object;

/// More parts of memory than a request has (UIO_MAXIOV).
const MAX_PARTS: u64 = 1024;
/// Bits of `struct io_poll`, events.
const ONE_SHOT: u32 = 1 << 30;
const EXCLUSIVE: u32 = 1 << 28;
const EVENTS: u32 = 0xffff;
/// A flag of msg_flags for 32-bit code that the kernel adds itself.
const COMPAT: u32 = 1 << 31;
/// Clocks.
const CLOCK_REALTIME: u64 = 0;
const CLOCK_MONOTONIC: u64 = 1;
const CLOCK_BOOTTIME: u64 = 7;
const SECOND: u64 = 1_000_000_000;
/// Flags of timeouts that are known; the last but one says that it is no failure to be over.
const TIMEOUT_FLAGS: u32 = request::TIMEOUT_MOMENT
    | request::TIMEOUT_BOOTTIME
    | request::TIMEOUT_REALTIME
    | 1 << 5
    | request::TIMEOUT_MULTISHOT;

/// A request on its way into the image.
pub(super) struct Asked<'a> {
    pub(super) object: Object<'a>,
    /// States that it is in.
    pub(super) flags: u64,
    /// It goes on when its thread does.
    pub(super) is_woken: bool,
    /// A timeout that is over, which its thread has not been told yet.
    pub(super) is_over: bool,
    /// How many completions the ring has had that were not timeouts.
    pub(super) nr_completed: u32,
    pub(super) states: &'a States,
    /// What all requests have.
    pub(super) whole: FirnUringRequest,
}

pub(super) type Described = Result<FirnUringRequest, Refusal>;

impl Asked<'_> {
    /// What asks for it again.
    pub(super) fn describe(self) -> Described {
        match u8::try_from(self.whole.opcode) {
            Ok(request::POLL_ADD) => self.poll(),
            Ok(request::READ | request::READV) => self.read(),
            Ok(request::RECV | request::RECVMSG) => self.receive(),
            Ok(request::ACCEPT) => self.accept(),
            Ok(request::TIMEOUT) => self.timeout(),
            _ => Err(Refusal::Operation),
        }
    }

    fn poll(self) -> Described {
        let poll = self.object.part_as("cmd", "io_poll");
        let events = poll.and_then(|poll| poll.word("events"));
        let events = events.ok_or(Refusal::Unseen)?;
        let is_multishot = events & ONE_SHOT == 0;
        let is_told = is_multishot && !self.is_woken && self.is_ready(events)?;
        Ok(FirnUringRequest {
            operation_flags: Some(events & (EVENTS | EXCLUSIVE)),
            len: is_multishot.then_some(request::POLL_MULTISHOT),
            is_told: is_told.then_some(true),
            ..self.whole
        })
    }

    /// Whether what is waited for is there.
    fn is_ready(&self, events: u32) -> Result<bool, Refusal> {
        let [low, high, ..] = events.to_le_bytes();
        let fd = self.whole.fd.and_then(|fd| i32::try_from(fd).ok());
        let fd = fd.ok_or(Refusal::Unseen)?;
        let process = pidfd::open_by_thread(Pid::from_image(self.whole.tid));
        let file = process.and_then(|process| pidfd::getfd(process, fd));
        let ready = file.and_then(|file| epoll::poll(file, i16::from_le_bytes([low, high])));
        ready.map(|ready| ready != 0).map_err(|_| Refusal::Unseen)
    }

    fn read(self) -> Described {
        let unseen = || Refusal::Unseen;
        let read = self.object.part_as("cmd", "io_rw").ok_or_else(unseen)?;
        let state = self.object.follow_as("async_data", "io_async_rw");
        if let Some(state) = state
            && state.number("bytes_done").ok_or_else(unseen)? != 0
        {
            return Err(Refusal::Begun);
        }
        // A read at the file's own position has it written there by now.
        let offset = match self.states.is_at_position(self.flags) {
            true => u64::MAX,
            false => read.number("kiocb.ki_pos").ok_or_else(unseen)?,
        };
        let is_vector = self.whole.opcode == u32::from(request::READV);
        let mut parts = Vec::new();
        if is_vector {
            let iterator = state.ok_or_else(unseen)?;
            let path = ["iter", "s.iter"].into_iter();
            let mut seen = path.filter_map(|path| iterator.part_as(path, "iov_iter"));
            parts = seen
                .next()
                .and_then(|iter| self.parts(iter))
                .ok_or_else(unseen)?;
        }
        Ok(FirnUringRequest {
            offset: Some(offset),
            address: (!is_vector).then(|| read.number("addr")).flatten(),
            len: Some(read.word("len").ok_or_else(unseen)?),
            operation_flags: Some(read.word("flags").ok_or_else(unseen)?),
            parts,
            ..self.whole
        })
    }

    /// The memory that an iterator goes over, none of which is used yet.
    fn parts(&self, iterator: Object<'_>) -> Option<Vec<FirnUringBuffer>> {
        if iterator.number("iov_offset")? != 0 {
            return None;
        }
        let (is_one, is_many) = self.states.iterators()?;
        let kind = iterator.number("iter_type")?;
        if kind == is_one {
            return Some(vec![FirnUringBuffer {
                address: iterator.number("ubuf")?,
                len_bytes: iterator.number("count")?,
            }]);
        }
        let nr = iterator.number("nr_segs")?;
        if kind != is_many || nr > MAX_PARTS {
            return None;
        }
        let list = ["__iov", "iov"];
        let part = |nth: u32| {
            let mut items = list.iter().filter_map(|list| iterator.item(list, nth));
            let part = items.next()?;
            Some(FirnUringBuffer {
                address: part.number("iov_base")?,
                len_bytes: part.number("iov_len")?,
            })
        };
        (0..u32::try_from(nr).ok()?).map(part).collect()
    }

    fn receive(self) -> Described {
        let unseen = || Refusal::Unseen;
        let received = self.object.part_as("cmd", "io_sr_msg");
        let received = received.ok_or_else(unseen)?;
        if received.number("done_io").ok_or_else(unseen)? != 0 {
            return Err(Refusal::Begun);
        }
        let address = received.number("buf").ok_or_else(unseen)?;
        if self.whole.opcode == u32::from(request::RECVMSG) {
            self.check_header(address)?;
        }
        Ok(FirnUringRequest {
            address: Some(address),
            len: Some(received.word("len").ok_or_else(unseen)?),
            operation_flags: Some(received.word("msg_flags").ok_or_else(unseen)? & !COMPAT),
            ioprio: Some(received.word("flags").ok_or_else(unseen)?),
            ..self.whole
        })
    }

    /// Looks whether the program's header of a message still says what the kernel has read of it.
    fn check_header(&self, address: u64) -> Result<(), Refusal> {
        let message = self.object.follow_as("async_data", "io_async_msghdr");
        let message = message.ok_or(Refusal::Unseen)?;
        let iterator = message.part_as("msg.msg_iter", "iov_iter");
        let parts = iterator.and_then(|iterator| self.parts(iterator));
        let kept = operations::Header {
            name: message.number("uaddr").ok_or(Refusal::Unseen)?,
            parts: parts.ok_or(Refusal::Unseen)?,
        };
        let tid = Pid::from_image(self.whole.tid);
        let read = |address, len: usize| {
            let mut bytes = vec![0; len];
            let range = RemoteRange { address, len };
            let read = process_vm::read(tid, &[range], &mut bytes).ok()?;
            (read == len).then_some(bytes)
        };
        match operations::Header::read(address, read) {
            Some(header) if header == kept => Ok(()),
            _ => Err(Refusal::HeaderChanged),
        }
    }

    fn accept(self) -> Described {
        let unseen = || Refusal::Unseen;
        let accept = self.object.part_as("cmd", "io_accept");
        let accept = accept.ok_or_else(unseen)?;
        let word = |name| accept.word(name).ok_or_else(unseen);
        Ok(FirnUringRequest {
            address: Some(accept.number("addr").ok_or_else(unseen)?),
            offset: Some(accept.number("addr_len").ok_or_else(unseen)?),
            operation_flags: Some(word("flags")?),
            ioprio: Some(word("iou_flags")?),
            file_index: Some(word("file_slot")?).filter(|slot| *slot != 0),
            ..self.whole
        })
    }

    fn timeout(self) -> Described {
        let unseen = || Refusal::Unseen;
        let timeout = self.object.part_as("cmd", "io_timeout");
        let timeout = timeout.ok_or_else(unseen)?;
        let data = self.object.follow_as("async_data", "io_timeout_data");
        let data = data.ok_or_else(unseen)?;
        let word = |name| timeout.word(name).ok_or_else(unseen);
        let flags = data.word("flags").ok_or_else(unseen)?;
        if flags & !TIMEOUT_FLAGS != 0 {
            return Err(Refusal::State);
        }
        let wanted = word("off")?;
        let (number, time, flags) = if flags & request::TIMEOUT_MULTISHOT != 0 {
            let part = |name| data.number(name).ok_or_else(unseen);
            let time = part("ts.tv_sec")?.checked_mul(SECOND);
            let time = time.and_then(|time| time.checked_add(part("ts.tv_nsec").ok()?));
            let left = if wanted == 0 { 0 } else { word("repeats")? };
            (left, time.ok_or_else(unseen)?, flags)
        } else if self.is_over {
            (0, 0, flags & !request::TIMEOUT_MOMENT)
        } else {
            let end = data.number("timer.node.expires").ok_or_else(unseen)?;
            let base = data.follow("timer.base").ok_or_else(unseen)?;
            let clock = base.number("clockid").ok_or_else(unseen)?;
            let (time, flags) = time_left(flags, clock, end, now).ok_or_else(unseen)?;
            (
                completions_left(wanted, word("target_seq")?, self.nr_completed),
                time,
                flags,
            )
        };
        Ok(FirnUringRequest {
            offset: Some(number.into()),
            len: Some(1),
            operation_flags: Some(flags),
            seconds: Some(time / SECOND),
            nanoseconds: u32::try_from(time % SECOND).ok(),
            ..self.whole
        })
    }
}

/// What is left of a timer of the kernel's that ends at some time of a clock, in nanoseconds, and the flags that ask
/// for that. Only one that goes by the date stays a moment: whoever set it wants that date.
fn time_left(
    flags: u32,
    clock: u64,
    end: u64,
    now: impl Fn(u64) -> Option<u64>,
) -> Option<(u64, u32)> {
    let moment = request::TIMEOUT_MOMENT;
    match clock {
        CLOCK_REALTIME => Some((end, flags | moment | request::TIMEOUT_REALTIME)),
        _ => Some((end.saturating_sub(now(clock)?), flags & !moment)),
    }
}

/// Of so many completions that a timeout waits for, those that are still to come. `last` is the number of the last one,
/// of which the ring has had so many. 0 is a timeout that waits for none.
fn completions_left(wanted: u32, last: u32, nr_completed: u32) -> u32 {
    match wanted {
        0 => 0,
        // With the last one the timeout is over, so at least that is missing.
        wanted => last.wrapping_sub(nr_completed).clamp(1, wanted),
    }
}

/// Nanoseconds on a clock.
fn now(clock: u64) -> Option<u64> {
    let (seconds, nanoseconds) = match clock {
        CLOCK_MONOTONIC => clock::monotonic(),
        CLOCK_BOOTTIME => clock::boottime(),
        _ => return None,
    };
    seconds.checked_mul(SECOND)?.checked_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_timeout_is_asked_for() {
        let now = |clock| (clock == CLOCK_MONOTONIC).then_some(500);
        let left = |flags, clock, end| time_left(flags, clock, end, now);
        assert_eq!(left(32, CLOCK_MONOTONIC, 700), Some((200, 32)));
        assert_eq!(left(1, CLOCK_MONOTONIC, 700), Some((200, 0)));
        assert_eq!(left(0, CLOCK_MONOTONIC, 300), Some((0, 0)));
        // Relative times are not on the clock that tells the date.
        assert_eq!(left(8, CLOCK_MONOTONIC, 700), Some((200, 8)));
        assert_eq!(left(9, CLOCK_REALTIME, 700), Some((700, 9)));
        assert_eq!(left(0, 11, 700), None);
    }

    #[test]
    fn completions_that_have_come_are_not_waited_for_again() {
        assert_eq!(completions_left(0, 7, 5), 0);
        assert_eq!(completions_left(3, 7, 5), 2);
        assert_eq!(completions_left(3, 1, u32::MAX), 2);
        assert_eq!(completions_left(3, 5, 5), 1);
    }
}
