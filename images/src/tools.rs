//! Tools for people and programs that look into images.
//!
//! * [`decode`] prints an image as JSON in the shape of `crit decode`, [`encode`] turns such JSON
//!   back into the image.

#[cfg(test)]
mod crit;
mod decode;
mod encode;
mod json;
#[cfg(test)]
mod made_up;
mod parse;
mod payload;
mod render;
#[cfg(test)]
mod roundtrip;
mod schema;
mod text;
mod wire;
mod words;

pub use decode::{DecodeError, decode, decode_file};
pub use encode::{EncodeError, encode};
pub use json::JsonStyle;
pub use parse::{JsonFault, JsonFaultKind};
pub use wire::WireFault;
