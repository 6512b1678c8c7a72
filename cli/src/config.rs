//! CRIU's configuration files: one long option a line, without its dashes.
//!
//! Read in this order, later ones winning and the command line winning over all: the default files
//! `/etc/criu/default.conf` and `$HOME/.criu/default.conf`, the file that `CRIU_CONFIG_FILE` names, the
//! file of `--config`. `--config` and `--no-default-config` leave the two default files out.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::output::Failure;

/// A line that sets an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Long name without dashes.
    pub name: String,
    /// Value, unquoted.
    pub value: Option<String>,
    /// Where it stands, for messages: `FILE:LINE`.
    pub place: String,
}

/// Which files are read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// Files that may be absent or out of sight.
    pub optional: Vec<PathBuf>,
    /// Files that must be there.
    pub required: Vec<PathBuf>,
}

impl Sources {
    /// Those of this command line and environment.
    pub fn of(
        config: Option<&OsString>,
        no_default: bool,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Sources {
        let mut sources = Sources::default();
        if config.is_none() && !no_default {
            sources
                .optional
                .push(PathBuf::from("/etc/criu/default.conf"));
            if let Some(home) = env("HOME") {
                sources
                    .optional
                    .push(Path::new(&home).join(".criu/default.conf"));
            }
        }
        sources
            .required
            .extend(env("CRIU_CONFIG_FILE").map(PathBuf::from));
        sources.required.extend(config.map(PathBuf::from));
        sources
    }

    /// Reads them all, in order.
    ///
    /// # Errors
    /// A required file can't be read, or a line is malformed.
    pub fn read(&self) -> Result<Vec<Setting>, Failure> {
        let mut settings = Vec::new();
        for path in &self.optional {
            match std::fs::read_to_string(path) {
                Ok(text) => settings.extend(parse(path, &text)?),
                // As in CRIU, a default file that this user can't see is none of theirs.
                Err(error) if is_out_of_sight(&error) => {}
                Err(error) => return Err(unreadable(path, &error)),
            }
        }
        for path in &self.required {
            let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, &error))?;
            settings.extend(parse(path, &text)?);
        }
        Ok(settings)
    }
}

fn is_out_of_sight(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied
    )
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    let text = format!(
        "configuration file {} can't be read: {error}",
        path.display()
    );
    Failure::usage(text).hint("--no-default-config leaves the default files out")
}

fn parse(path: &Path, text: &str) -> Result<Vec<Setting>, Failure> {
    let mut settings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let place = format!("{}:{}", path.display(), index + 1);
        let parsed = parse_line(line).map_err(|why| Failure::usage(format!("{place}: {why}")))?;
        settings.extend(parsed.map(|(name, value)| Setting { name, value, place }));
    }
    Ok(settings)
}

/// Reads one line; None for an empty one or a comment.
fn parse_line(line: &str) -> Result<Option<(String, Option<String>)>, String> {
    // A # ends the line wherever it stands, even between quotes, as in CRIU.
    let line = line.split('#').next().unwrap_or_default().trim();
    if line.is_empty() {
        return Ok(None);
    }
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    if name.starts_with('-') {
        return Err(format!("option '{name}' must stand without its dashes"));
    }
    let rest = rest.trim();
    if rest.is_empty() {
        return Ok(Some((name.to_owned(), None)));
    }
    let value = match rest.strip_prefix('"') {
        Some(quoted) => unquote(quoted)?,
        None if rest.contains(char::is_whitespace) => {
            return Err(format!("option '{name}' has more than one value; quote it"));
        }
        None => rest.to_owned(),
    };
    Ok(Some((name.to_owned(), Some(value))))
}

fn unquote(quoted: &str) -> Result<String, String> {
    let mut value = String::new();
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('"') => value.push('"'),
                Some(other) => value.extend(['\\', other]),
                None => value.push('\\'),
            },
            '"' if chars.as_str().trim().is_empty() => return Ok(value),
            '"' => {
                return Err(format!(
                    "'{}' follows the quoted value",
                    chars.as_str().trim()
                ));
            }
            _ => value.push(c),
        }
    }
    // Only a # can have cut the closing quote off; what stood before it counts.
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Option<(String, Option<String>)>, String> {
        parse_line(text)
    }

    fn set(name: &str, value: &str) -> Result<Option<(String, Option<String>)>, String> {
        Ok(Some((name.to_owned(), Some(value.to_owned()))))
    }

    #[test]
    fn lines() {
        assert_eq!(line("  # nothing"), Ok(None));
        assert_eq!(
            line("leave-running # now"),
            Ok(Some(("leave-running".to_owned(), None)))
        );
        assert_eq!(line("ghost-limit\t 2M "), set("ghost-limit", "2M"));
        assert_eq!(
            line(r#"action-script "a b \"c\"""#),
            set("action-script", r#"a b "c""#)
        );
        assert_eq!(line(r#"action-script "a#b""#), set("action-script", "a"));
        assert_eq!(
            line(r#"log-file "back\slash""#),
            set("log-file", r"back\slash")
        );
    }

    #[test]
    fn malformed_lines() {
        assert!(line("--leave-running").is_err());
        assert!(line("timeout 3 4").is_err());
        assert!(line(r#"log-file "a" b"#).is_err());
    }

    #[test]
    fn files_in_order() {
        let env = |name: &str| match name {
            "HOME" => Some(OsString::from("/home/me")),
            "CRIU_CONFIG_FILE" => Some(OsString::from("/env.conf")),
            _ => None,
        };
        let all = Sources::of(None, false, env);
        let defaults = ["/etc/criu/default.conf", "/home/me/.criu/default.conf"];
        assert_eq!(all.optional, defaults.map(PathBuf::from));
        assert_eq!(all.required, [PathBuf::from("/env.conf")]);
        let named = Sources::of(Some(&OsString::from("/mine.conf")), false, env);
        assert!(named.optional.is_empty());
        assert_eq!(
            named.required,
            ["/env.conf", "/mine.conf"].map(PathBuf::from)
        );
        assert!(Sources::of(None, true, env).optional.is_empty());
    }
}
