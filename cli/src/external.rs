//! `--external` and `--inherit-fd`: objects that tasks outside have a side of.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::RawFd;

use clap::Args;

/// Words that begin CRIU's names of objects which belong to namespaces.
const OF_NAMESPACES: [&str; 8] = [
    "mnt[", "dev[", "net[", "pid[", "veth[", "macvlan[", "netdev[", "ipc[",
];

/// An object that is external to the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum External {
    /// A pipe, terminal or file, by CRIU's name.
    File(String),
    /// A unix socket outside, by its inode number.
    UnixPeer(u32),
}

/// Options of dump.
#[derive(Debug, Clone, Args)]
pub struct ExternalArgs {
    /// Take an object that others outside have, too, and that the restore will be given
    #[arg(
        help = "Take an object that tasks outside have, too, and that the restore will be given: \
                pipe:[INODE], socket:[INODE] (TCP, UDP and their like), tty[RDEV:DEV], file[MNT:INODE], \
                unix[INODE]; may repeat"
    )]
    #[arg(long, value_name = "RESOURCE", value_parser = external)]
    pub external: Vec<External>,
}

/// Options of restore.
#[derive(Debug, Clone, Args)]
pub struct InheritArgs {
    /// Put a descriptor in the place of an object of the images
    #[arg(
        help = "Put descriptor N in the place of an object of the images: fd[N]:pipe:[INODE], \
                fd[N]:socket:[INODE], fd[N]:tty[RDEV:DEV], fd[N]:file[MNT:INODE], fd[N]:/memfd:NAME, or \
                fd[N]:PATH without the leading slash; debug[N]:TEXT writes a text to it; may repeat"
    )]
    #[arg(long, value_name = "fd[N]:RESOURCE", value_parser = inherited)]
    pub inherit_fd: Vec<Inherited>,
    /// Names what was external at the dump; each also needs --inherit-fd
    #[arg(long, value_name = "RESOURCE", value_parser = external)]
    pub external: Vec<External>,
}

/// What is done with a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inherited {
    /// It takes the place of an object.
    Object(RawFd, String),
    /// A text is written to it.
    Debug(RawFd, String),
}

fn external(text: &str) -> Result<External, String> {
    if OF_NAMESPACES.iter().any(|word| text.starts_with(word)) {
        let later = "it belongs to a namespace; tasks in namespaces of their own are refused at dump until then";
        return Err(later.to_owned());
    }
    if let Some(inode) = between(text, "unix[") {
        let inode = inode.parse().map_err(|_| "expected unix[INODE]")?;
        return Ok(External::UnixPeer(inode));
    }
    let hexadecimal = |pair: &str| {
        let pair = pair.split_once(':');
        pair.is_some_and(|(a, b)| [a, b].iter().all(|n| u64::from_str_radix(n, 16).is_ok()))
    };
    let numbered = between(text, "pipe:[").or_else(|| between(text, "socket:["));
    let is_numbered = numbered.is_some_and(|inode| inode.parse::<u64>().is_ok());
    let pair = between(text, "tty[").or_else(|| between(text, "file["));
    match is_numbered || pair.is_some_and(hexadecimal) {
        true => Ok(External::File(text.to_owned())),
        false => Err(
            "expected pipe:[INODE], socket:[INODE], tty[RDEV:DEV], file[MNT:INODE] or unix[INODE]"
                .to_owned(),
        ),
    }
}

fn between<'a>(text: &'a str, start: &str) -> Option<&'a str> {
    text.strip_prefix(start)?.strip_suffix(']')
}

fn inherited(text: &str) -> Result<Inherited, String> {
    let parse = |start: &str| {
        let (number, key) = text.strip_prefix(start)?.split_once("]:")?;
        let number: RawFd = number.parse().ok().filter(|fd| *fd >= 0)?;
        (!key.is_empty()).then(|| (number, key.to_owned()))
    };
    let object = parse("fd[").map(|(fd, key)| Inherited::Object(fd, key));
    object
        .or_else(|| parse("debug[").map(|(fd, text)| Inherited::Debug(fd, text)))
        .ok_or_else(|| "expected fd[N]:RESOURCE".to_owned())
}

impl ExternalArgs {
    /// Names of pipes, terminals and files.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.external.iter().filter_map(|external| match external {
            External::File(key) => Some(key.as_str()),
            External::UnixPeer(_) => None,
        })
    }

    /// Inode numbers of unix sockets outside.
    pub fn unix_peers(&self) -> impl Iterator<Item = u32> {
        self.external.iter().filter_map(|external| match external {
            External::UnixPeer(inode) => Some(*inode),
            External::File(_) => None,
        })
    }
}

impl InheritArgs {
    /// Descriptors and what they take the place of.
    pub fn objects(&self) -> impl Iterator<Item = (RawFd, &str)> {
        self.inherit_fd
            .iter()
            .filter_map(|inherited| match inherited {
                Inherited::Object(fd, key) => Some((*fd, key.as_str())),
                Inherited::Debug(..) => None,
            })
    }

    /// An object that is named as external and for which nothing is given.
    pub fn missing(&self) -> Option<&str> {
        self.external.iter().find_map(|external| match external {
            External::File(key) => {
                let given = self.objects().any(|(_, given)| given == key);
                (!given).then_some(key.as_str())
            }
            External::UnixPeer(_) => None,
        })
    }

    /// Writes the texts of `debug[N]`.
    ///
    /// # Errors
    /// A descriptor can't be written to.
    pub fn write_debug(&self) -> std::io::Result<()> {
        for inherited in &self.inherit_fd {
            if let Inherited::Debug(fd, text) = inherited {
                let mut file = OpenOptions::new()
                    .append(true)
                    .open(format!("/proc/self/fd/{fd}"))?;
                file.write_all(text.as_bytes())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_criu() {
        assert_eq!(
            external("pipe:[12]"),
            Ok(External::File("pipe:[12]".into()))
        );
        assert_eq!(
            external("tty[8803:1b]"),
            Ok(External::File("tty[8803:1b]".into()))
        );
        assert_eq!(external("unix[77]"), Ok(External::UnixPeer(77)));
        for wrong in ["pipe:[x]", "tty[8803]", "file[1:g]", "unix[]", "x"] {
            assert!(external(wrong).is_err(), "{wrong}");
        }
        assert!(external("mnt[/x]:y").is_err_and(|said| said.contains("namespace")));
        let object = |fd, key: &str| Ok(Inherited::Object(fd, key.to_owned()));
        assert_eq!(inherited("fd[7]:pipe:[12]"), object(7, "pipe:[12]"));
        assert_eq!(inherited("fd[0]:var/log/x"), object(0, "var/log/x"));
        assert_eq!(
            inherited("debug[2]:here"),
            Ok(Inherited::Debug(2, "here".into()))
        );
        for wrong in ["fd[7]", "fd[]:x", "fd[-1]:x", "fd[7]:", "7:x"] {
            assert!(inherited(wrong).is_err(), "{wrong}");
        }
    }
}
