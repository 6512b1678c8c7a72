//! Brings a CRIU command line and its configuration files into the one form that the argument
//! definitions take: the command first, then long options with their value in the same word.
//!
//! As getopt(3) does, options may stand before the command, short ones may be bundled (`-dSv4`), and
//! `-v` may be repeated. Words that no table row covers pass through, so that their error message
//! comes from the definitions, with a suggestion.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::config::{Setting, Sources};
use crate::options::{self, LATER_COMMANDS, Opt, State, Value};
use crate::output::Failure;

/// What messages are printed at without `-v`.
pub const DEFAULT_VERBOSITY: u8 = 2;

/// A command line in canonical form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Normalized {
    /// Words for the parser, the program's name included.
    pub words: Vec<OsString>,
    /// Remarks for the user: options that mean nothing to this command.
    pub warnings: Vec<String>,
}

/// One option on its way.
#[derive(Debug, Clone)]
struct Given {
    opt: &'static Opt,
    negated: bool,
    value: Option<OsString>,
    /// As the user wrote it, or the place in a configuration file.
    origin: Origin,
}

#[derive(Debug, Clone)]
enum Origin {
    CommandLine(String),
    File(String),
}

/// Words of a command line, sorted by kind.
#[derive(Debug, Default)]
struct Scan {
    given: Vec<Given>,
    /// Unknown options and further operands, in order.
    other: Vec<OsString>,
    command: Option<OsString>,
    /// From `--` on.
    rest: Vec<OsString>,
}

/// Brings `argv` (program name first) into canonical form.
///
/// # Errors
/// An option that this version does not have, a missing value, an unreadable configuration file.
pub fn normalize(
    argv: Vec<OsString>,
    env: impl Fn(&str) -> Option<OsString>,
) -> Result<Normalized, Failure> {
    let mut scan = scan(&argv)?;
    let command = scan.command.take();
    let Some(bit) = command.as_deref().and_then(command_bit) else {
        refuse_later_command(command.as_deref())?;
        return Ok(Normalized {
            words: argv,
            warnings: Vec::new(),
        });
    };
    let last = |name: &str| scan.given.iter().rfind(|given| given.opt.long == name);
    let config = last("config").and_then(|given| given.value.clone());
    let no_default = last("no-default-config").is_some();
    let wants_help = last("help").is_some();
    let mut given = Vec::new();
    if !wants_help {
        let settings = Sources::of(config.as_ref(), no_default, env).read()?;
        given = settings
            .into_iter()
            .map(from_file)
            .collect::<Result<_, _>>()?;
    }
    given.append(&mut scan.given);
    let name = command.expect("a command with a bit has a name");
    let mut made = Normalized {
        words: argv.into_iter().take(1).chain([name.clone()]).collect(),
        warnings: Vec::new(),
    };
    emit(&given, bit, &name.to_string_lossy(), &mut made)?;
    made.words.append(&mut scan.other);
    made.words.append(&mut scan.rest);
    Ok(made)
}

fn command_bit(command: &OsStr) -> Option<u8> {
    match command.to_str()? {
        "dump" => Some(options::DUMP),
        "restore" => Some(options::RESTORE),
        "check" => Some(options::CHECK),
        _ => None,
    }
}

fn refuse_later_command(command: Option<&OsStr>) -> Result<(), Failure> {
    let Some(name) = command
        .and_then(OsStr::to_str)
        .filter(|name| LATER_COMMANDS.contains(name))
    else {
        return Ok(());
    };
    let text = format!("this version has no command '{name}'");
    Err(Failure::usage(text).hint("it has dump, restore, image, check, unlock, ploop and demo"))
}

fn scan(argv: &[OsString]) -> Result<Scan, Failure> {
    let mut scan = Scan::default();
    let mut words = argv.iter().skip(1);
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        if bytes == b"--" {
            scan.rest.push(word.clone());
            scan.rest.extend(words.cloned());
            break;
        }
        if let Some(long) = bytes.strip_prefix(b"--") {
            scan_long(word, long, &mut words, &mut scan)?;
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            scan_shorts(word, &mut words, &mut scan)?;
        } else if scan.command.is_none() {
            scan.command = Some(word.clone());
            if command_bit(word).is_none() {
                // Not a CRIU command: its words are none of our business.
                break;
            }
        } else {
            scan.other.push(word.clone());
        }
    }
    Ok(scan)
}

fn scan_long<'a>(
    word: &OsString,
    long: &[u8],
    words: &mut impl Iterator<Item = &'a OsString>,
    scan: &mut Scan,
) -> Result<(), Failure> {
    let (name, value) = match long.iter().position(|&b| b == b'=') {
        Some(at) => (
            &long[..at],
            Some(OsString::from_vec(long[at + 1..].to_vec())),
        ),
        None => (long, None),
    };
    let name = String::from_utf8_lossy(name).into_owned();
    let origin = Origin::CommandLine(format!("--{name}"));
    let Some((opt, negated)) = look_up(&name) else {
        scan.other.push(word.clone());
        return Ok(());
    };
    let value = match value {
        Some(_) if negated || opt.value == Value::Flag => {
            return Err(Failure::usage(format!("option --{name} takes no value")));
        }
        None if !negated && opt.value == Value::Required => {
            Some(next(words, &format!("--{name}"))?)
        }
        other => other,
    };
    scan.given.push(Given {
        opt,
        negated,
        value,
        origin,
    });
    Ok(())
}

fn look_up(name: &str) -> Option<(&'static Opt, bool)> {
    let plain = options::by_long(name).map(|opt| (opt, false));
    plain.or_else(|| options::negated(name).map(|opt| (opt, true)))
}

fn scan_shorts<'a>(
    word: &OsString,
    words: &mut impl Iterator<Item = &'a OsString>,
    scan: &mut Scan,
) -> Result<(), Failure> {
    let mut rest = &word.as_bytes()[1..];
    while let Some((&byte, tail)) = rest.split_first() {
        let letter = char::from(byte);
        let origin = Origin::CommandLine(format!("-{letter}"));
        let Some(opt) = options::by_short(letter) else {
            // The definitions name the unknown letter.
            scan.other.push(OsString::from(format!("-{letter}")));
            return Ok(());
        };
        rest = tail;
        let value = match opt.value {
            Value::Flag => None,
            Value::Required if tail.is_empty() => Some(next(words, &format!("-{letter}"))?),
            Value::Optional if tail.is_empty() => None,
            Value::Required | Value::Optional => {
                rest = &[];
                Some(OsString::from_vec(tail.to_vec()))
            }
        };
        scan.given.push(Given {
            opt,
            negated: false,
            value,
            origin,
        });
    }
    Ok(())
}

fn next<'a>(
    words: &mut impl Iterator<Item = &'a OsString>,
    name: &str,
) -> Result<OsString, Failure> {
    let word = words.next().cloned();
    word.ok_or_else(|| Failure::usage(format!("option {name} needs a value")))
}

fn from_file(setting: Setting) -> Result<Given, Failure> {
    let Setting { name, value, place } = setting;
    let (opt, negated) = look_up(&name)
        .ok_or_else(|| Failure::usage(format!("{place}: there is no option '{name}'")))?;
    let takes = if negated { Value::Flag } else { opt.value };
    match (takes, &value) {
        (Value::Flag, Some(_)) => {
            return Err(Failure::usage(format!(
                "{place}: option '{name}' takes no value"
            )));
        }
        (Value::Required, None) => {
            return Err(Failure::usage(format!(
                "{place}: option '{name}' needs a value"
            )));
        }
        _ => {}
    }
    Ok(Given {
        opt,
        negated,
        value: value.map(OsString::from),
        origin: Origin::File(place),
    })
}

fn emit(given: &[Given], bit: u8, command: &str, made: &mut Normalized) -> Result<(), Failure> {
    let mut verbosity = None;
    for given in given {
        if given.opt.commands & bit == 0 {
            // A configuration file serves all commands; on a command line it may be a mistake.
            if let Origin::CommandLine(name) = &given.origin {
                made.warnings
                    .push(format!("option {name} has no effect on {command}"));
            }
            continue;
        }
        if given.negated && given.opt.state != State::Here {
            // Taking back what is not there leaves things as they are.
            continue;
        }
        refuse_absent(given)?;
        if given.opt.long == "verbosity" {
            verbosity = Some(raised(verbosity.unwrap_or(DEFAULT_VERBOSITY), given)?);
            continue;
        }
        made.words.push(word(given));
    }
    made.words
        .extend(verbosity.map(|level| OsString::from(format!("--verbosity={level}"))));
    Ok(())
}

fn refuse_absent(given: &Given) -> Result<(), Failure> {
    let long = given.opt.long;
    let name = match &given.origin {
        Origin::CommandLine(name) if *name == format!("--{long}") => name.clone(),
        Origin::CommandLine(name) => format!("{name} (--{long})"),
        Origin::File(place) => format!("--{long} ({place})"),
    };
    match given.opt.state {
        State::Here => Ok(()),
        State::Later(instead) => {
            let text = format!("option {name} is not in this version of firn: {instead}");
            Err(Failure::usage(text))
        }
        State::Removed(instead) => Err(Failure::usage(format!(
            "option {name} no longer exists: {instead}"
        ))),
    }
}

/// `-v` and each further v raise the level by one, a number sets it.
fn raised(level: u8, given: &Given) -> Result<u8, Failure> {
    let Some(value) = &given.value else {
        return Ok(level.saturating_add(1));
    };
    let text = value.to_string_lossy();
    if !text.is_empty() && text.bytes().all(|b| b == b'v') {
        let more = u8::try_from(text.len()).unwrap_or(u8::MAX);
        return Ok(level.saturating_add(1).saturating_add(more));
    }
    text.parse()
        .map_err(|_| Failure::usage(format!("verbosity '{text}' is not a number")))
}

fn word(given: &Given) -> OsString {
    let mut word = OsString::from(if given.negated { "--no-" } else { "--" });
    word.push(given.opt.long);
    if let Some(value) = &given.value {
        word.push("=");
        word.push(value);
    }
    word
}

#[cfg(test)]
#[path = "normalize_tests.rs"]
mod tests;
