//! Tools for people and programs that look into images.
//!
//! * [`decode`] prints an image as JSON in the shape of `crit decode`, [`encode`] turns such JSON
//!   back into the image.
//! * [`info`] explains a checkpoint to a person, as text or JSON.
//! * [`check`] proves that a directory is whole, or lists all that is wrong with it.

mod check;
#[cfg(test)]
mod crit;
mod decode;
mod encode;
mod info;
mod json;
#[cfg(test)]
mod made_up;
mod parse;
mod payload;
mod render;
#[cfg(test)]
mod roundtrip;
mod schema;
mod set;
mod text;
mod vma;
mod wire;
mod words;

pub use check::{CheckReport, Fault, Problem, check};
pub use decode::{DecodeError, decode, decode_file};
pub use encode::{EncodeError, encode};
pub use info::{
    CheckpointInfo, DescriptorInfo, FileInfo, MadeInfo, MemoryInfo, SizeInfo, TaskInfo, info,
};
pub use json::JsonStyle;
pub use parse::{JsonFault, JsonFaultKind};
pub use wire::WireFault;
