//! A message as one line of text.

use super::render::{Render, Scalar};

/// Bytes that are shown of longer ones.
const SHOWN_BYTES: usize = 16;

/// Writes messages as `name=value` pairs.
///
/// All stand in one line, but lists of different messages, which have a line for each of them.
#[derive(Debug, Default)]
pub(crate) struct LineWriter {
    line: String,
    /// Open messages and lists.
    open: Vec<Frame>,
}

/// An open message or list.
#[derive(Debug)]
enum Frame {
    /// Its fields so far.
    Message(String),
    /// Its values so far, and how often each comes in a row.
    List(Vec<(String, usize)>),
}

impl LineWriter {
    /// Gives the text.
    pub(crate) fn finish(self) -> String {
        self.line
    }

    fn value(&mut self, value: String) {
        match self.open.last_mut() {
            None => self.line.push_str(&value),
            Some(Frame::Message(text)) => text.push_str(&value),
            Some(Frame::List(values)) => match values.last_mut() {
                Some((last, count)) if *last == value => *count += 1,
                _ => values.push((value, 1)),
            },
        }
    }

    /// Writes a list: messages each in a line of its own, other values in one.
    fn joined(&self, values: Vec<(String, usize)>) -> String {
        let messages = values.len() > 1 && values.iter().all(|(value, _)| value.starts_with('{'));
        let written = values.into_iter().map(|(value, count)| match count {
            1 => value,
            count => format!("{value}*{count}"),
        });
        let written: Vec<String> = written.collect();
        if !messages {
            return format!("[{}]", written.join(" "));
        }
        let indent = format!("\n{:1$}", "", 6 + 2 * self.open.len());
        format!("[{indent}{}]", written.join(&indent))
    }
}

impl Render for LineWriter {
    fn for_people(&self) -> bool {
        true
    }

    fn begin_message(&mut self) {
        self.open.push(Frame::Message(String::new()));
    }

    fn end_message(&mut self) {
        if let Some(Frame::Message(text)) = self.open.pop() {
            self.value(format!("{{{text}}}"));
        }
    }

    fn begin_list(&mut self) {
        self.open.push(Frame::List(Vec::new()));
    }

    fn end_list(&mut self) {
        if let Some(Frame::List(values)) = self.open.pop() {
            let list = self.joined(values);
            self.value(list);
        }
    }

    fn key(&mut self, name: &str) {
        let text = match self.open.last_mut() {
            Some(Frame::Message(text)) => text,
            _ => &mut self.line,
        };
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(name);
        text.push('=');
    }

    fn scalar(&mut self, value: Scalar<'_>) {
        self.value(match value {
            Scalar::Unsigned(value) => value.to_string(),
            Scalar::Signed(value) => value.to_string(),
            Scalar::Hex(value) => format!("{value:#x}"),
            Scalar::Bool(value) => value.to_string(),
            Scalar::Word("") => "0".to_owned(),
            Scalar::Word(word) => word.replace(" | ", "|"),
            Scalar::Text(text) | Scalar::SocketName(text) => {
                format!("\"{}\"", text.escape_ascii())
            }
            Scalar::Bytes(bytes) => hexadecimal(bytes),
        });
    }

    fn unknown(&mut self, bytes: &[u8]) {
        self.key("unknown");
        self.value(hexadecimal(bytes));
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(SHOWN_BYTES)];
    let digits: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
    match bytes.len() > SHOWN_BYTES {
        true => format!("<{digits}... {} bytes>", bytes.len()),
        false => format!("<{digits}>"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_are_counted_and_bytes_shortened() {
        let mut line = LineWriter::default();
        line.key("list");
        line.begin_list();
        for value in [7, 0, 0, 0, 8] {
            line.scalar(Scalar::Unsigned(value));
        }
        line.end_list();
        line.key("inner");
        line.begin_message();
        line.key("name");
        line.scalar(Scalar::Text(b"a\"\xff"));
        line.key("flags");
        line.scalar(Scalar::Word("A | B"));
        line.end_message();
        line.key("many");
        line.begin_list();
        for byte in [0xab, 0xab, 0xcd] {
            line.begin_message();
            line.unknown(&[byte; 17]);
            line.end_message();
        }
        line.end_list();
        let text = line.finish();
        let bytes = |digits: &str| format!("{{unknown=<{}... 17 bytes>}}", digits.repeat(16));
        let head = r#"list=[7 0*3 8] inner={name="a\"\xff" flags=A|B}"#;
        let many = format!("[\n      {}*2\n      {}]", bytes("ab"), bytes("cd"));
        assert_eq!(text, format!("{head} many={many}"));
    }
}
