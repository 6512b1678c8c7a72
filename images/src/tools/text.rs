//! Bytes as text: base64 with line ends, quoted-printable.

use std::io::{self, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Bytes that make up one line of base64: 76 characters, as MIME has it.
const LINE_BYTES: usize = 57;

/// Writes base64 in lines that each end with the text `newline`, fed piece by piece.
#[derive(Debug)]
pub(crate) struct Base64Lines<W> {
    out: W,
    newline: &'static str,
    pending: Vec<u8>,
}

impl<W: Write> Base64Lines<W> {
    pub(crate) fn new(out: W, newline: &'static str) -> Self {
        let pending = Vec::with_capacity(LINE_BYTES);
        Self {
            out,
            newline,
            pending,
        }
    }

    fn line(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut text = [0; 76];
        let len = STANDARD
            .encode_slice(bytes, &mut text)
            .expect("57 bytes make 76 characters");
        self.out.write_all(&text[..len])?;
        self.out.write_all(self.newline.as_bytes())
    }

    /// Writes the last, short line.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        let pending = std::mem::take(&mut self.pending);
        if pending.is_empty() {
            return Ok(());
        }
        self.line(&pending)
    }
}

impl<W: Write> Write for Base64Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        while self.pending.len() + rest.len() >= LINE_BYTES {
            let (head, tail) = rest.split_at(LINE_BYTES - self.pending.len());
            rest = tail;
            self.pending.extend_from_slice(head);
            let line = std::mem::take(&mut self.pending);
            self.line(&line)?;
            self.pending = line;
            self.pending.clear();
        }
        self.pending.extend_from_slice(rest);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Reads base64 with any line ends.
pub(crate) fn from_base64(text: &str) -> Option<Vec<u8>> {
    if text.bytes().any(|byte| byte.is_ascii_whitespace()) {
        let text: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
        return STANDARD.decode(text).ok();
    }
    STANDARD.decode(text).ok()
}

/// Writes bytes as quoted-printable text with lines of at most 76 characters.
///
/// Carriage returns are always quoted, so that every name comes back as it was.
pub(crate) fn to_quoted(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    let mut column = 0;
    for (index, &byte) in bytes.iter().enumerate() {
        let next = bytes.get(index + 1).copied();
        if byte == b'\n' {
            out.push('\n');
            column = 0;
        } else if is_quoted(byte, next, column == 0) {
            if column + 3 >= 76 {
                out.push_str("=\n");
                column = 0;
            }
            out.push_str(&format!("={byte:02X}"));
            column += 3;
        } else {
            if next.is_some_and(|next| next != b'\n') && column + 1 >= 76 {
                out.push_str("=\n");
                column = 0;
            }
            out.push(char::from(byte));
            column += 1;
        }
    }
    out
}

fn is_quoted(byte: u8, next: Option<u8>, line_start: bool) -> bool {
    let ends_line = matches!(next, None | Some(b'\n'));
    match byte {
        b'=' => true,
        b'.' => line_start && (ends_line || matches!(next, Some(b'\r' | 0))),
        b' ' | b'\t' => ends_line,
        _ => !(0x21..=0x7e).contains(&byte),
    }
}

/// Reads quoted-printable text; `None` where it is not.
pub(crate) fn from_quoted(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'=' {
            out.push(byte);
            continue;
        }
        rest = match tail {
            [b'\n', after @ ..] | [b'\r', b'\n', after @ ..] => after,
            [high, low, after @ ..] => {
                let digits = std::str::from_utf8(&tail[..2]).ok()?;
                if !(high.is_ascii_hexdigit() && low.is_ascii_hexdigit()) {
                    return None;
                }
                out.push(u8::from_str_radix(digits, 16).ok()?);
                after
            }
            _ => return None,
        };
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn base64(bytes: &[u8]) -> String {
        let mut out = Vec::new();
        let mut lines = Base64Lines::new(&mut out, "\n");
        lines.write_all(bytes).unwrap();
        lines.finish().unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn base64_has_lines_as_crit_has() {
        assert_eq!(base64(b""), "");
        assert_eq!(base64(b"abcd"), "YWJjZA==\n");
        let text = base64(&[b'a'; 100]);
        assert_eq!(text.lines().map(str::len).collect::<Vec<_>>(), [76, 60]);
        assert!(text.ends_with("YQ==\n"));
    }

    #[test]
    fn names_are_quoted_as_crit_does() {
        assert_eq!(to_quoted(b"L3RtcC94AA="), "L3RtcC94AA=3D");
        assert_eq!(
            to_quoted(b"\0abc def \nx\xff\xc3\xbc~tab\t."),
            "=00abc def=20\nx=FF=C3=BC~tab\t."
        );
        assert_eq!(to_quoted(b"a b \n\tz"), "a b=20\n\tz");
        assert_eq!(to_quoted(b".x\n.y"), ".x\n.y");
        let long = [&[b'a'; 104][..], b"\0"].concat();
        assert_eq!(
            to_quoted(&long),
            format!("{}=\n{}=00", "a".repeat(75), "a".repeat(29))
        );
    }

    proptest! {
        #[test]
        fn quoted_bytes_come_back(bytes: Vec<u8>) {
            prop_assert_eq!(from_quoted(&to_quoted(&bytes)), Some(bytes));
        }

        #[test]
        fn quoted_lines_come_back(text in "[ =.a\r\n\t]{0,200}") {
            prop_assert_eq!(from_quoted(&to_quoted(text.as_bytes())), Some(text.into_bytes()));
        }

        #[test]
        fn base64_comes_back_however_it_is_fed(pieces: Vec<Vec<u8>>) {
            let mut out = Vec::new();
            let mut lines = Base64Lines::new(&mut out, "\n");
            for piece in &pieces {
                lines.write_all(piece).unwrap();
            }
            lines.finish().unwrap();
            let text = String::from_utf8(out).unwrap();
            prop_assert_eq!(&text, &base64(&pieces.concat()));
            prop_assert_eq!(from_base64(&text), Some(pieces.concat()));
        }

        #[test]
        fn any_text_is_read_without_panic(text: String) {
            let _ = (from_base64(&text), from_quoted(&text));
        }
    }
}
