//! XML as far as a descriptor needs it: elements, attributes and text.

use std::borrow::Cow;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// A deeper nesting is nobody's.
const MAX_DEPTH: usize = 16;

/// An element.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Element {
    pub name: String,
    pub attributes: Vec<(String, String)>,
    /// Its text, without what stands around it.
    pub text: String,
    pub children: Vec<Element>,
}

impl Element {
    /// The first child of a name.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    /// All children of a name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// Text of the first child of a name.
    pub fn text_of(&self, name: &str) -> Option<&str> {
        self.child(name).map(|child| child.text.as_str())
    }
}

/// Reads a document; the message says what is wrong with it.
pub(super) fn parse(text: &str) -> Result<Element, String> {
    let mut reader = Reader::from_str(text);
    // The document itself is the outermost element, without a name.
    let mut open = vec![Element::default()];
    loop {
        let event = reader.read_event().map_err(|error| error.to_string())?;
        match event {
            Event::Start(start) => {
                if open.len() > MAX_DEPTH {
                    return Err(format!("elements are nested deeper than {MAX_DEPTH}"));
                }
                open.push(element(&start)?);
            }
            Event::Empty(start) => {
                let element = element(&start)?;
                close(&mut open, element)?;
            }
            Event::End(_) => {
                let mut element = open.pop().unwrap_or_default();
                element.text = element.text.trim().to_owned();
                close(&mut open, element)?;
            }
            Event::Text(text) => add(&mut open, &text),
            Event::CData(text) => add(&mut open, &text),
            Event::GeneralRef(reference) => {
                let letter = reference.resolve_char_ref().map_err(|e| e.to_string())?;
                let name: &str = &reference;
                let text = match letter {
                    Some(letter) => Cow::Owned(letter.to_string()),
                    None => quick_xml::escape::resolve_predefined_entity(name)
                        .map(Cow::Borrowed)
                        .ok_or_else(|| format!("the entity '{name}' is not known"))?,
                };
                add(&mut open, &text);
            }
            Event::Eof => break,
            _ => {}
        }
    }
    match open.as_slice() {
        [document] if document.children.len() == 1 => Ok(document.children[0].clone()),
        [_] => Err("it has no root element, or several".to_owned()),
        _ => Err("an element is not closed".to_owned()),
    }
}

fn element(start: &BytesStart<'_>) -> Result<Element, String> {
    let mut element = Element {
        name: start.name().as_ref().to_owned(),
        ..Element::default()
    };
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|error| error.to_string())?;
        let name = attribute.key.as_ref().to_owned();
        let value = attribute.value.into_owned();
        element.attributes.push((name, value));
    }
    Ok(element)
}

fn close(open: &mut [Element], element: Element) -> Result<(), String> {
    let parent = open.last_mut().ok_or("an element ends that never began")?;
    parent.children.push(element);
    Ok(())
}

fn add(open: &mut [Element], text: &str) {
    if let Some(element) = open.last_mut() {
        element.text.push_str(text);
    }
}

/// Writes elements, one a line.
#[derive(Debug, Default)]
pub(super) struct Writer {
    text: String,
    depth: usize,
}

impl Writer {
    /// A document with its declaration.
    pub fn new() -> Writer {
        Writer {
            text: "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n".to_owned(),
            depth: 0,
        }
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(&"  ".repeat(self.depth));
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// An element with others in it; `tag` may hold attributes.
    pub fn group(&mut self, tag: &str, inside: impl FnOnce(&mut Writer)) {
        self.line(&format!("<{tag}>"));
        self.depth += 1;
        inside(self);
        self.depth -= 1;
        let name = tag.split(' ').next().unwrap_or(tag);
        self.line(&format!("</{name}>"));
    }

    /// An element with text.
    pub fn leaf(&mut self, name: &str, text: impl std::fmt::Display) {
        let text = text.to_string();
        let text = quick_xml::escape::escape(text.as_str());
        self.line(&format!("<{name}>{text}</{name}>"));
    }

    /// An element with nothing in it.
    pub fn empty(&mut self, name: &str) {
        self.line(&format!("<{name}/>"));
    }

    /// The document.
    pub fn finish(self) -> String {
        self.text
    }
}
