//! The record: one step of a syscall program, as the executor reads it.
//!
//! ```text
//! offset  size  field
//!      0     1  op        Op
//!      1     1  rule      what result counts as success
//!      2     1  indirect  bit i: args[i] is the address of the value, not the value
//!      3     1  flags     bit 0: repeat the call on EINTR and EAGAIN; bit 1: a 32-bit call
//!      4     2  nr        system call number
//!      6     2  out       0, or 1 + index of the slot that takes the result
//!      8    48  args      six arguments
//!     56     8  expect    the operand of `rule`
//! ```
//!
//! All little-endian, one record per cache line. The layout is shared with the assembly in
//! [`crate::arch`], which names the offsets again; the assertions below hold them together.

/// What a record does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Makes a system call and checks its result.
    Call = 0,
    /// Sleeps until the 32-bit word at `args[0]` is at least `args[1]`.
    Wait = 1,
    /// Increments the word at `args[0]` and wakes everybody who waits for it.
    Post = 2,
    /// clone3; the child goes on at the record `args[2]` with the context `args[3]`.
    Fork = 3,
    /// Marks the context as parked and sleeps until ptrace takes over.
    Park = 4,
    /// Tells which thread-local segments the thread has: bit i for entry 12 + i of the global descriptor table.
    Segments = 5,
}

/// Which result of a call counts as success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Anything that is not an errno.
    Ok,
    /// Exactly this value (an address, a descriptor, a tid).
    Exact(i64),
    /// Anything at all; the caller looks at the slot.
    Any,
    /// Success, or this errno.
    OkOr(i32),
}

impl Rule {
    pub(super) fn encode(self) -> (u8, i64) {
        match self {
            Rule::Ok => (0, 0),
            Rule::Exact(value) => (1, value),
            Rule::Any => (2, 0),
            Rule::OkOr(errno) => (3, -i64::from(errno)),
        }
    }
}

/// Flag bit: repeat the call when it returns EINTR or EAGAIN.
pub const FLAG_RETRY: u8 = 1;
/// Flag bit: make the call by `int 0x80`, with the numbers and structures of 32-bit code.
pub const FLAG_IA32: u8 = 2;

/// One record as it stands in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Record {
    /// See [`Op`].
    pub op: u8,
    /// Encoded [`Rule`].
    pub rule: u8,
    /// Which arguments are loaded through a pointer.
    pub indirect: u8,
    /// [`FLAG_RETRY`] and [`FLAG_IA32`].
    pub flags: u8,
    /// System call number.
    pub nr: u16,
    /// 0, or 1 + slot index.
    pub out: u16,
    /// Arguments or their addresses.
    pub args: [u64; 6],
    /// Operand of the rule.
    pub expect: i64,
}

/// Size of a record in bytes.
pub const RECORD_SIZE: usize = 64;

const _: () = {
    assert!(size_of::<Record>() == RECORD_SIZE);
    assert!(std::mem::offset_of!(Record, rule) == 1);
    assert!(std::mem::offset_of!(Record, indirect) == 2);
    assert!(std::mem::offset_of!(Record, flags) == 3);
    assert!(std::mem::offset_of!(Record, nr) == 4);
    assert!(std::mem::offset_of!(Record, out) == 6);
    assert!(std::mem::offset_of!(Record, args) == 8);
    assert!(std::mem::offset_of!(Record, expect) == 56);
};

impl Record {
    /// Encodes the record as the 64 bytes that the executor reads.
    pub fn to_bytes(&self) -> [u8; RECORD_SIZE] {
        let mut out = [0u8; RECORD_SIZE];
        out[0] = self.op;
        out[1] = self.rule;
        out[2] = self.indirect;
        out[3] = self.flags;
        out[4..6].copy_from_slice(&self.nr.to_le_bytes());
        out[6..8].copy_from_slice(&self.out.to_le_bytes());
        for (i, arg) in self.args.iter().enumerate() {
            out[8 + 8 * i..16 + 8 * i].copy_from_slice(&arg.to_le_bytes());
        }
        out[56..64].copy_from_slice(&self.expect.to_le_bytes());
        out
    }
}

/// State of one program while and after it runs, shared with the executor.
///
/// ```text
/// offset  size  field
///      0     4  state     0 not finished, 1 parked, 2 failed
///      8     8  record    address of the failing record
///     16     8  result    what that record's call returned
///     24     8  slots     address of slot 0
///     32     8  parked    address of the word counting parked programs
///     40     8  failed    address of the word counting failed programs
/// ```
pub const CONTEXT_SIZE: usize = 64;

/// Offsets inside a context, see [`CONTEXT_SIZE`].
pub mod context {
    /// Not finished, parked or failed.
    pub const STATE: usize = 0;
    /// Address of the failing record.
    pub const RECORD: usize = 8;
    /// Result of the failing record.
    pub const RESULT: usize = 16;
    /// Address of slot 0.
    pub const SLOTS: usize = 24;
    /// Address of the parked counter.
    pub const PARKED: usize = 32;
    /// Address of the failed counter.
    pub const FAILED: usize = 40;
    /// State: the program has reached its Park record.
    pub const STATE_PARKED: u32 = 1;
    /// State: a record's rule was not met.
    pub const STATE_FAILED: u32 = 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_every_field_at_its_offset() {
        let record = Record {
            op: Op::Call as u8,
            rule: 1,
            indirect: 0b10,
            flags: FLAG_RETRY,
            nr: 0x0102,
            out: 0x0304,
            args: [1, 2, 3, 4, 5, 6],
            expect: -2,
        };
        let bytes = record.to_bytes();
        assert_eq!(bytes[..8], [0, 1, 2, 1, 2, 1, 4, 3]);
        assert_eq!(bytes[8..16], 1u64.to_le_bytes());
        assert_eq!(bytes[48..56], 6u64.to_le_bytes());
        assert_eq!(bytes[56..64], (-2i64).to_le_bytes());
    }

    #[test]
    fn an_allowed_errno_is_stored_negated() {
        assert_eq!(Rule::OkOr(17).encode(), (3, -17));
        assert_eq!(Rule::Exact(-5).encode(), (1, -5));
    }
}
