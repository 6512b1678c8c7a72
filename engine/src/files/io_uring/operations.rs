//! Operations of io_uring in words, the states of requests that keep one from being asked for again, and what a
//! dump says of it then.

use firn_proto::FirnUringBuffer;
use firn_sys::io_uring::request;

use super::dump::FINISH;
use crate::files::open_file::Trouble;
use crate::kernel::Kernel;

/// Names of operations, without `IORING_OP_`, by their numbers.
const NAMES: [&str; 63] = [
    "NOP",
    "READV",
    "WRITEV",
    "FSYNC",
    "READ_FIXED",
    "WRITE_FIXED",
    "POLL_ADD",
    "POLL_REMOVE",
    "SYNC_FILE_RANGE",
    "SENDMSG",
    "RECVMSG",
    "TIMEOUT",
    "TIMEOUT_REMOVE",
    "ACCEPT",
    "ASYNC_CANCEL",
    "LINK_TIMEOUT",
    "CONNECT",
    "FALLOCATE",
    "OPENAT",
    "CLOSE",
    "FILES_UPDATE",
    "STATX",
    "READ",
    "WRITE",
    "FADVISE",
    "MADVISE",
    "SEND",
    "RECV",
    "OPENAT2",
    "EPOLL_CTL",
    "SPLICE",
    "PROVIDE_BUFFERS",
    "REMOVE_BUFFERS",
    "TEE",
    "SHUTDOWN",
    "RENAMEAT",
    "UNLINKAT",
    "MKDIRAT",
    "SYMLINKAT",
    "LINKAT",
    "MSG_RING",
    "FSETXATTR",
    "SETXATTR",
    "FGETXATTR",
    "GETXATTR",
    "SOCKET",
    "URING_CMD",
    "SEND_ZC",
    "SENDMSG_ZC",
    "READ_MULTISHOT",
    "WAITID",
    "FUTEX_WAIT",
    "FUTEX_WAKE",
    "FUTEX_WAITV",
    "FIXED_FD_INSTALL",
    "FTRUNCATE",
    "BIND",
    "LISTEN",
    "RECV_ZC",
    "EPOLL_WAIT",
    "READV_FIXED",
    "WRITEV_FIXED",
    "PIPE",
];

/// States that a request may be in and be asked for again. The kernel numbers them anew from time to time, so all go
/// by their names (`REQ_F_…_BIT`).
const HARMLESS: &[&str] = &[
    "REQ_F_FIXED_FILE_BIT",
    "REQ_F_FORCE_ASYNC_BIT",
    "REQ_F_CQE_SKIP_BIT",
    "REQ_F_INFLIGHT_BIT",
    "REQ_F_CUR_POS_BIT",
    "REQ_F_NOWAIT_BIT",
    "REQ_F_NEED_CLEANUP_BIT",
    "REQ_F_POLLED_BIT",
    "REQ_F_REFCOUNT_BIT",
    "REQ_F_ASYNC_DATA_BIT",
    "REQ_F_SINGLE_POLL_BIT",
    "REQ_F_DOUBLE_POLL_BIT",
    "REQ_F_MULTISHOT_BIT",
    "REQ_F_APOLL_MULTISHOT_BIT",
    "REQ_F_CLEAR_POLLIN_BIT",
    "REQ_F_HASH_LOCKED_BIT",
    "REQ_F_SUPPORT_NOWAIT_BIT",
    "REQ_F_ISREG_BIT",
    "REQ_F_POLL_NO_LAZY_BIT",
    "REQ_F_CAN_POLL_BIT",
    "REQ_F_SQE_COPIED_BIT",
    "REQ_F_CREDS_BIT",
];
const LINKED: &[&str] = &[
    "REQ_F_LINK_BIT",
    "REQ_F_HARDLINK_BIT",
    "REQ_F_LINK_TIMEOUT_BIT",
    "REQ_F_ARM_LTIMEOUT_BIT",
    "REQ_F_SKIP_LINK_CQES_BIT",
];
const PROVIDED: &[&str] = &[
    "REQ_F_BUFFER_SELECT_BIT",
    "REQ_F_BUFFER_SELECTED_BIT",
    "REQ_F_BUFFER_RING_BIT",
    "REQ_F_BL_EMPTY_BIT",
    "REQ_F_BL_NO_RECYCLE_BIT",
    "REQ_F_BUFFERS_COMMIT_BIT",
];
const BEGUN: &[&str] = &["REQ_F_PARTIAL_IO_BIT"];
const DRAINING: &[&str] = &["REQ_F_IO_DRAIN_BIT"];

/// Why a request in flight can't be asked for again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    Operation,
    Linked,
    Provided,
    Begun,
    Credentials,
    Draining,
    Cancelled,
    FileIsGone,
    HeaderChanged,
    OfKernelThread,
    /// It is in a state of later kernels.
    State,
    Unseen,
}

impl Refusal {
    fn reason(self) -> &'static str {
        match self {
            Refusal::Operation => "requests of this operation are not supported yet",
            Refusal::Linked => "it is part of a chain, or has a timeout linked to it",
            Refusal::Provided => "it takes its memory from a group of provided buffers",
            Refusal::Begun => "a part of what it asks for has been transferred",
            Refusal::Credentials => "it goes by other credentials than its thread has",
            Refusal::Draining => "it waits until all before it have ended (IOSQE_IO_DRAIN)",
            Refusal::Cancelled => "it is being cancelled",
            Refusal::FileIsGone => "its process has no descriptor of its file any more",
            Refusal::HeaderChanged => {
                "the program has changed the header of the message since it asked"
            }
            Refusal::OfKernelThread => "a thread of the kernel has asked (IORING_SETUP_SQPOLL)",
            Refusal::State => "it is in a state that is not known",
            Refusal::Unseen => "the kernel's memory does not tell what it asks for",
        }
    }
}

/// What is to be said of a request, given its operation and value.
pub(super) fn trouble(request: Option<(u8, u64)>, why: &Refusal) -> Trouble {
    let which = match request {
        Some((opcode, value)) => format!("{} (user_data {value:#x})", name(opcode)),
        None => "unknown".to_owned(),
    };
    let why = why.reason();
    Trouble::new(
        format!("a request of the io_uring ring is in flight: {which}; {why}"),
        FINISH,
    )
}

/// The name of an operation.
pub(super) fn name(opcode: u8) -> String {
    match NAMES.get(usize::from(opcode)) {
        Some(name) => format!("IORING_OP_{name}"),
        None => format!("operation {opcode}"),
    }
}

/// Bits of the states of requests, and other numbers of this kernel.
#[derive(Debug)]
pub(super) struct States {
    harmless: u64,
    refused: Vec<(u64, Refusal)>,
    skips_success: u64,
    at_position: u64,
    credentials: u64,
    failed: u64,
    /// Iterators over one part of a program's memory, and over several.
    iterators: Option<(u64, u64)>,
}

impl States {
    /// Those of this kernel.
    pub(super) fn of(kernel: &Kernel) -> States {
        States::by(|names| kernel.constants(names))
    }

    /// `values` tells numbers by name.
    fn by(values: impl Fn(&[&str]) -> Vec<Option<u64>>) -> States {
        let mut names = vec![
            "REQ_F_CQE_SKIP_BIT",
            "REQ_F_CUR_POS_BIT",
            "REQ_F_CREDS_BIT",
            "REQ_F_FAIL_BIT",
            "ITER_UBUF",
            "ITER_IOVEC",
        ];
        let kinds = [
            (BEGUN, Refusal::Begun),
            (LINKED, Refusal::Linked),
            (PROVIDED, Refusal::Provided),
            (DRAINING, Refusal::Draining),
        ];
        names.extend(HARMLESS);
        names.extend(kinds.iter().flat_map(|(names, _)| *names));
        let values = values(&names);
        let value = |name: &str| {
            let place = names.iter().position(|other| *other == name)?;
            values[place]
        };
        let bit = |name: &&str| {
            let place = value(name).and_then(|place| u32::try_from(place).ok());
            place.and_then(|place| 1u64.checked_shl(place)).unwrap_or(0)
        };
        let bits = |names: &[&str]| names.iter().map(bit).fold(0, |all, one| all | one);
        States {
            harmless: bits(HARMLESS),
            refused: kinds
                .iter()
                .map(|(names, why)| (bits(names), *why))
                .collect(),
            skips_success: bit(&"REQ_F_CQE_SKIP_BIT"),
            at_position: bit(&"REQ_F_CUR_POS_BIT"),
            credentials: bit(&"REQ_F_CREDS_BIT"),
            failed: bit(&"REQ_F_FAIL_BIT"),
            iterators: value("ITER_UBUF").zip(value("ITER_IOVEC")),
        }
    }

    /// Looks whether a request of an operation with these flags may be asked for again.
    pub(super) fn check(&self, opcode: u8, flags: u64) -> Result<(), Refusal> {
        // A timeout that is over has failed, also when it goes on.
        let flags = match opcode {
            request::TIMEOUT => flags & !self.failed,
            _ => flags,
        };
        let refused = self.refused.iter().find(|(bits, _)| flags & bits != 0);
        match refused {
            Some((_, why)) => Err(*why),
            None if flags & !self.harmless != 0 => Err(Refusal::State),
            None => Ok(()),
        }
    }

    /// Whether it gives no completion where it succeeds.
    pub(super) fn skips_success(&self, flags: u64) -> bool {
        flags & self.skips_success != 0
    }

    /// Whether it reads at the file's own position.
    pub(super) fn is_at_position(&self, flags: u64) -> bool {
        flags & self.at_position != 0
    }

    /// Whether it has noted whose rights it goes by.
    pub(super) fn has_credentials(&self, flags: u64) -> bool {
        flags & self.credentials != 0
    }

    /// Iterators over one part of a program's memory, and over several.
    pub(super) fn iterators(&self) -> Option<(u64, u64)> {
        self.iterators
    }
}

/// What the header of a message (struct msghdr) says of where it is to be received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// Where the sender's address goes.
    pub(super) name: u64,
    pub(super) parts: Vec<FirnUringBuffer>,
}

impl Header {
    /// Reads it from a program's memory, of which `read` gives so many bytes at an address.
    pub(super) fn read(
        address: u64,
        read: impl Fn(u64, usize) -> Option<Vec<u8>>,
    ) -> Option<Header> {
        const LEN: usize = 56;
        const MAX_PARTS: u64 = 1024;
        let words = |bytes: &[u8]| -> Vec<u64> {
            let words = bytes.chunks_exact(8);
            words
                .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
                .collect()
        };
        let header = words(&read(address, LEN)?);
        let [name, _, list, nr_parts, ..] = header[..] else {
            return None;
        };
        let nr_parts = usize::try_from(nr_parts.min(MAX_PARTS)).ok()?;
        let list = words(&read(list, 16 * nr_parts)?);
        let part = |part: &[u64]| FirnUringBuffer {
            address: part[0],
            len_bytes: part[1],
        };
        Some(Header {
            name,
            parts: list.chunks_exact(2).map(part).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that numbers states in the order in which they are asked for, and knows no links.
    fn numbered(names: &[&str]) -> Vec<Option<u64>> {
        let known = |(nth, name): (u64, &&str)| (!name.contains("LINK")).then_some(nth % 64);
        (0..).zip(names).map(known).collect()
    }

    #[test]
    fn states_that_are_not_known_to_be_harmless_are_refused() {
        let states = States::by(numbered);
        let provided = states.refused.iter();
        let provided = provided.clone().find(|(_, why)| *why == Refusal::Provided);
        let (provided, _) = provided.expect("one of the kinds");
        let check = |flags| states.check(request::READ, flags);
        assert_eq!(check(states.harmless), Ok(()));
        let one = 1 << provided.trailing_zeros();
        assert_eq!(check(one), Err(Refusal::Provided));
        assert_eq!(check(one | states.harmless), Err(Refusal::Provided));
        assert_eq!(check(1 << 63), Err(Refusal::State));
        assert_eq!(check(states.failed), Err(Refusal::State));
        assert_eq!(states.check(request::TIMEOUT, states.failed), Ok(()));
        assert!(states.skips_success(1 << 0) && states.is_at_position(1 << 1));
        assert_eq!(states.iterators(), Some((4, 5)));
    }

    #[test]
    fn a_refusal_names_the_request_and_what_to_do() {
        let said = trouble(Some((10, 0x2a)), &Refusal::Begun);
        assert_eq!(
            said.reason,
            "a request of the io_uring ring is in flight: IORING_OP_RECVMSG (user_data 0x2a); a part of what it asks \
             for has been transferred"
        );
        assert!(said.hint.expect("what to do").contains("cancel"));
        assert_eq!(name(200), "operation 200");
        assert_eq!(name(62), "IORING_OP_PIPE");
    }

    #[test]
    fn a_header_is_read_with_its_list_and_no_further() {
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let memory = |nr_parts| {
            move |address, len: usize| -> Option<Vec<u8>> {
                let bytes: Vec<u8> = match address {
                    0x100 => words(&[0x50, 16, 0x200, nr_parts, 0, 0, 0]),
                    0x200 => words(&[0x1000, 3, 0x2000, 5]),
                    _ => return None,
                };
                bytes.get(..len).map(<[u8]>::to_vec)
            }
        };
        let header = Header::read(0x100, memory(2)).expect("there");
        assert_eq!(header.name, 0x50);
        assert_eq!(header.parts[1].address, 0x2000);
        assert_eq!(header.parts[1].len_bytes, 5);
        assert_eq!(Header::read(0x100, memory(u64::MAX)), None);
        assert_eq!(Header::read(0x300, memory(2)), None);
    }
}
