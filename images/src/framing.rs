//! How entries are laid out in a file.
//!
//! ```text
//! offset  width
//! 0       4      first magic, IMG_COMMON or IMG_SERVICE; absent in the inventory, and in
//!                every file of sets of version 1
//!         4      type magic
//!                then, up to the end of the file:
//!         4      length of a message
//!         len    the message (proto2)
//!                payload, if the kind has any
//! ```
//!
//! Numbers are little-endian. There is no count, padding, checksum or trailer.

use crate::kind::{Header, KindInfo};

/// First magic of ordinary images.
pub const IMG_COMMON: u32 = 0x5456_4319;
/// First magic of images that are about an operation and not about tasks.
pub const IMG_SERVICE: u32 = 0x5510_5940;
/// Value of `img_version` in the inventory of every set that is written.
pub const IMG_VERSION: u32 = 2;
/// The most bytes that one message may have, in either direction.
///
/// An address space of a million mappings needs 60 MiB.
pub const MAX_MESSAGE_BYTES: u32 = 256 << 20;
/// The most bytes of payload that are read into memory at once; longer payload is copied.
pub const MAX_PAYLOAD_BYTES: u64 = 256 << 20;

/// Gives the bytes with which a file of the kind begins.
pub(crate) fn header_bytes(info: &KindInfo) -> Vec<u8> {
    let magic = info.magic.to_le_bytes();
    match info.header {
        Header::Raw => Vec::new(),
        Header::Bare => magic.to_vec(),
        Header::Common => [IMG_COMMON.to_le_bytes(), magic].concat(),
        Header::Service => [IMG_SERVICE.to_le_bytes(), magic].concat(),
    }
}
