//! JSON text, laid out as crit lays it out.

use std::fmt;
use std::io::{self, Write};

use super::render::{Render, Scalar};
use super::text::{Base64Lines, to_quoted};

/// Layout of JSON text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JsonStyle {
    /// One line; numbers as they are.
    Compact,
    /// Indented; addresses in hexadecimal, flags and states as words.
    Pretty,
}

/// Key under which a message keeps fields that the schema does not know.
pub(crate) const UNKNOWN: &str = "firn.unknown";
/// Key of the object that stands for a string which is not UTF-8.
pub(crate) const RAW_TEXT: &str = "firn.bytes";

/// Writes JSON. The first error of the sink is kept until [`finish`](Self::finish).
#[derive(Debug)]
pub(crate) struct JsonWriter<W> {
    out: W,
    style: JsonStyle,
    /// For each open object or list, whether it is empty so far.
    open: Vec<bool>,
    after_key: bool,
    failed: Option<io::Error>,
}

impl<W: Write> JsonWriter<W> {
    pub(crate) fn new(out: W, style: JsonStyle) -> Self {
        Self {
            out,
            style,
            open: Vec::new(),
            after_key: false,
            failed: None,
        }
    }

    /// Ends the text with a line end.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.put(b"\n");
        match self.failed {
            Some(error) => Err(error),
            None => self.out.flush(),
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.failed = self.out.write_all(bytes).err();
        }
    }

    /// Says whether writing has failed, so that there is no use in going on.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    fn put_formatted(&mut self, text: fmt::Arguments<'_>) {
        if self.failed.is_none() {
            self.failed = self.out.write_fmt(text).err();
        }
    }

    fn line(&mut self) {
        if self.style == JsonStyle::Pretty {
            self.put(b"\n");
            for _ in 0..self.open.len() {
                self.put(b"    ");
            }
        }
    }

    /// Separates from what stands before.
    fn separate(&mut self) {
        if std::mem::take(&mut self.after_key) {
            return;
        }
        let Some(empty) = self.open.last_mut() else {
            return;
        };
        let first = std::mem::replace(empty, false);
        match self.style {
            JsonStyle::Compact if !first => self.put(b", "),
            JsonStyle::Pretty if !first => self.put(b","),
            _ => {}
        }
        self.line();
    }

    fn begin(&mut self, bracket: &[u8]) {
        self.separate();
        self.put(bracket);
        self.open.push(true);
    }

    fn end(&mut self, bracket: &[u8]) {
        if self.open.pop() == Some(false) {
            self.line();
        }
        self.put(bracket);
    }

    fn string(&mut self, text: &str) {
        self.put(b"\"");
        if text
            .bytes()
            .all(|byte| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\'))
        {
            self.put(text.as_bytes());
        } else {
            let mut escaped = String::with_capacity(text.len() + 8);
            escape_into(&mut escaped, text);
            self.put(escaped.as_bytes());
        }
        self.put(b"\"");
    }

    /// Writes a string value.
    pub(crate) fn text(&mut self, text: &str) {
        self.separate();
        self.string(text);
    }

    /// Writes a string of base64, whose bytes `feed` supplies.
    pub(crate) fn base64<T>(&mut self, feed: impl FnOnce(&mut dyn Write) -> T) -> T {
        self.separate();
        self.put(b"\"");
        let mut lines = Base64Lines::new(&mut self.out, "\\n");
        let fed = feed(&mut lines);
        if let Err(error) = lines.finish() {
            self.failed.get_or_insert(error);
        }
        self.put(b"\"");
        fed
    }

    fn bytes(&mut self, bytes: &[u8]) {
        if let Err(error) = self.base64(|lines| lines.write_all(bytes)) {
            self.failed.get_or_insert(error);
        }
    }
}

impl<W: Write> Render for JsonWriter<W> {
    fn for_people(&self) -> bool {
        self.style == JsonStyle::Pretty
    }

    fn begin_message(&mut self) {
        self.begin(b"{");
    }

    fn end_message(&mut self) {
        self.end(b"}");
    }

    fn begin_list(&mut self) {
        self.begin(b"[");
    }

    fn end_list(&mut self) {
        self.end(b"]");
    }

    fn key(&mut self, name: &str) {
        self.separate();
        self.string(name);
        self.put(b": ");
        self.after_key = true;
    }

    fn scalar(&mut self, value: Scalar<'_>) {
        match value {
            Scalar::Text(text) => match std::str::from_utf8(text) {
                Ok(text) => self.text(text),
                Err(_) => {
                    self.begin_message();
                    self.key(RAW_TEXT);
                    self.bytes(text);
                    self.end_message();
                }
            },
            Scalar::Word(word) => self.text(word),
            Scalar::Hex(value) => {
                self.separate();
                self.put_formatted(format_args!("\"{value:#x}\""));
            }
            Scalar::SocketName(bytes) => self.text(&to_quoted(bytes)),
            Scalar::Bytes(bytes) => self.bytes(bytes),
            Scalar::Unsigned(value) => {
                self.separate();
                self.put_formatted(format_args!("{value}"));
            }
            Scalar::Signed(value) => {
                self.separate();
                self.put_formatted(format_args!("{value}"));
            }
            Scalar::Bool(value) => {
                self.separate();
                self.put(if value { b"true" } else { b"false" });
            }
        }
    }

    fn unknown(&mut self, bytes: &[u8]) {
        self.key(UNKNOWN);
        self.bytes(bytes);
    }
}

/// Escapes everything but printable ASCII, as Python's writer does.
fn escape_into(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='\u{7f}' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(style: JsonStyle, build: impl FnOnce(&mut JsonWriter<&mut Vec<u8>>)) -> String {
        let mut out = Vec::new();
        let mut json = JsonWriter::new(&mut out, style);
        build(&mut json);
        json.finish().unwrap();
        String::from_utf8(out).unwrap()
    }

    fn sample(json: &mut JsonWriter<&mut Vec<u8>>) {
        json.begin_message();
        json.key("a");
        json.scalar(Scalar::Unsigned(u64::MAX));
        json.key("b");
        json.begin_list();
        json.scalar(Scalar::Signed(-1));
        json.scalar(Scalar::Bool(true));
        json.end_list();
        json.key("c");
        json.begin_list();
        json.end_list();
        json.key("d");
        json.begin_message();
        json.end_message();
        json.end_message();
    }

    #[test]
    fn both_layouts_are_those_of_crit() {
        let compact = "{\"a\": 18446744073709551615, \"b\": [-1, true], \"c\": [], \"d\": {}}\n";
        assert_eq!(written(JsonStyle::Compact, sample), compact);
        let pretty = "{\n    \"a\": 18446744073709551615,\n    \"b\": [\n        -1,\n        \
                      true\n    ],\n    \"c\": [],\n    \"d\": {}\n}\n";
        assert_eq!(written(JsonStyle::Pretty, sample), pretty);
    }

    #[test]
    fn strings_are_ascii_whatever_they_hold() {
        let text = |bytes: &'static [u8]| {
            written(JsonStyle::Compact, |json| json.scalar(Scalar::Text(bytes)))
        };
        assert_eq!(
            text("/ü\"\\\u{1}😀".as_bytes()),
            "\"/\\u00fc\\\"\\\\\\u0001\\ud83d\\ude00\"\n"
        );
        assert_eq!(text(b"\xff\xfe"), "{\"firn.bytes\": \"//4=\\n\"}\n");
    }

    #[test]
    fn an_error_of_the_sink_is_told_at_the_end() {
        let mut room = [0; 4];
        let mut json = JsonWriter::new(&mut room[..], JsonStyle::Compact);
        json.text("longer than the room");
        assert!(json.has_failed());
        assert_eq!(json.finish().unwrap_err().kind(), io::ErrorKind::WriteZero);
    }
}
