//! Messages of the image files and of the service socket: schema in `proto/*.proto`, prost types
//! here, nothing else.
//!
//! Types have the CamelCase name of their message (`core_entry` is [`CoreEntry`]). Numbers and
//! types of fields are CRIU's, so each engine reads the other's images; fields numbered from
//! 20000 and messages named `firn_*` are extensions, which other readers skip.
//!
//! Encoding emits fields in the order of their numbers, as the C library does, and always
//! unpacked. Strings that come from the kernel (names, paths) are `Vec<u8>`, because the kernel
//! does not promise UTF-8.
#![forbid(unsafe_code)]

#[allow(missing_docs, clippy::all, unused_qualifications)]
#[rustfmt::skip]
#[path = "gen/messages.rs"]
mod messages;

pub use messages::*;
pub use prost::{Message, Name};

/// The schema as an encoded `FileDescriptorSet`, with the custom options of `opts.proto`
/// (`criu`: how to show a field; `os_bytes`: a string of any bytes).
pub const DESCRIPTORS: &[u8] = include_bytes!("gen/descriptors.bin");
