//! Tools for people and programs that look into images.
//!
//! * [`decode`] prints an image as JSON in the shape of `crit decode`, [`encode`] turns such JSON
//!   back into the image.
//! * [`show`] prints a line for each entry.
//! * [`info`] explains a checkpoint to a person, as text or JSON.
//! * [`check`] proves that a directory is whole, or lists all that is wrong with it.
//!
//! ```
//! use firn_images::tools::{JsonStyle, decode_file, encode};
//! use firn_images::{ImageKind, write_single};
//! use firn_proto::StatsEntry;
//!
//! let dir = tempfile::tempdir()?;
//! write_single(dir.path(), ImageKind::StatsDump, &StatsEntry::default())?;
//! let path = dir.path().join("stats-dump");
//!
//! let mut json = Vec::new();
//! decode_file(&path, JsonStyle::Compact, &mut json)?;
//! assert_eq!(json, b"{\"magic\": \"STATS\", \"entries\": [{}]}\n");
//!
//! let mut image = Vec::new();
//! encode(&json[..], &mut image)?;
//! assert_eq!(image, std::fs::read(&path)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod check;
#[cfg(test)]
mod crit;
#[cfg(test)]
mod damage;
mod decode;
mod encode;
mod extra;
mod info;
mod json;
mod json_fault;
mod line;
#[cfg(test)]
mod made_up;
mod parse;
mod payload;
mod render;
#[cfg(test)]
mod roundtrip;
mod schema;
mod set;
mod show;
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
pub use json_fault::{JsonFault, JsonFaultKind};
pub use show::show;
pub use wire::WireFault;
