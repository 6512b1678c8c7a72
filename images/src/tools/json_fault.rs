//! What can be wrong with JSON that is to become an image.

use serde_json::Value;

use super::wire::WireFault;

/// What is wrong with a JSON value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {what}")]
pub struct JsonFault {
    /// Names of the fields that lead to the value, joined by dots.
    pub path: String,
    /// What is wrong.
    pub what: JsonFaultKind,
}

/// Ways in which a JSON value can be wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonFaultKind {
    /// The message has no such field.
    #[error("{message} has no such field")]
    NoField {
        /// Name of the message.
        message: String,
    },
    /// A required field is missing.
    #[error("this field is required in {message}")]
    Required {
        /// Name of the message.
        message: String,
    },
    /// The value is of another type.
    #[error("{found} where {expected} is expected")]
    Type {
        /// The value, shortened.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Base64 or quoted-printable text is damaged, or `firn.unknown` holds no fields.
    #[error("not valid {encoding}")]
    Encoding {
        /// What it should be.
        encoding: &'static str,
    },
    /// The payload has another length than the message says.
    #[error("{found} bytes or values where the message says {expected}")]
    Length {
        /// Length of the value.
        found: u64,
        /// Length by the message.
        expected: u64,
    },
    /// Messages are nested too deep.
    #[error(transparent)]
    Depth(WireFault),
}

impl JsonFault {
    /// Makes a fault of the value at hand.
    pub(crate) fn here(what: JsonFaultKind) -> Self {
        let path = String::new();
        Self { path, what }
    }

    /// Makes a fault of a value of a wrong type.
    pub(crate) fn of_type(found: &Value, expected: &'static str) -> Self {
        let mut found = found.to_string();
        if found.len() > 40 {
            let end = (0..=37).rev().find(|at| found.is_char_boundary(*at));
            found.truncate(end.unwrap_or(0));
            found.push_str("...");
        }
        Self::here(JsonFaultKind::Type { found, expected })
    }

    /// Adds the name of the field that the value belongs to.
    pub(crate) fn within(mut self, name: &str) -> Self {
        self.path = match self.path.is_empty() {
            true => name.to_owned(),
            false => format!("{name}.{}", self.path),
        };
        self
    }
}
