//! The explanation as text.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use crate::utc_date;

use super::{CheckpointInfo, FileInfo, MadeInfo, MemoryInfo, SizeInfo, TaskInfo};

/// Files of one kind that are listed by name.
const LISTED: usize = 20;
/// Descriptors of one file that are listed.
const DESCRIPTORS: usize = 8;

impl Display for CheckpointInfo {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "checkpoint {}", self.directory)?;
        if !self.complete {
            writeln!(
                f,
                "  UNFINISHED: it has no inventory and cannot be restored"
            )?;
        }
        write!(f, "{}", self.made)?;
        write_tasks(f, &self.tasks)?;
        write_memory(f, &self.memory)?;
        write_files(f, &self.files)?;
        write!(f, "{}", self.sizes)?;
        for line in &self.unreadable {
            writeln!(f, "cannot be read: {line}")?;
        }
        Ok(())
    }
}

impl Display for MadeInfo {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "  made by {}", self.by)?;
        if let Some(version) = self.image_version {
            write!(f, ", image version {version}")?;
        }
        if let Some(at) = self.at_unix {
            write!(f, ", {}", utc_date(at))?;
        } else if let Some(at) = self.file_time_unix {
            write!(f, ", inventory of {}", utc_date(at))?;
        }
        writeln!(f)?;
        for (what, value) in [
            ("kernel", &self.kernel),
            ("cpu", &self.cpu),
            ("host name", &self.host_name),
            ("increment to", &self.parent),
        ] {
            if let Some(value) = value {
                writeln!(f, "  {what} {value}")?;
            }
        }
        Ok(())
    }
}

fn write_tasks(f: &mut Formatter<'_>, tasks: &[TaskInfo]) -> fmt::Result {
    writeln!(f, "\ntasks ({})", tasks.len())?;
    for task in tasks {
        // Deep trees stay readable to the right of this.
        let indent = 2 + 2 * task.depth.min(30);
        write!(f, "{:indent$}{} {}", "", task.pid, command(task))?;
        write!(f, "  [{}", task.state)?;
        if task.threads.len() > 1 {
            write!(f, ", {} threads", task.threads.len())?;
        }
        if let Some(uid) = task.uid.filter(|uid| *uid != 0) {
            write!(f, ", uid {uid}")?;
        }
        let stored: u64 = task.memory.values().map(|memory| memory.stored).sum();
        if stored > 0 {
            write!(f, ", {}", size(stored))?;
        }
        writeln!(f, "]")?;
    }
    Ok(())
}

/// Writes a command line as one would type it; without one, the name in brackets.
fn command(task: &TaskInfo) -> String {
    if task.arguments.is_empty() {
        return format!("[{}]", printable(&task.name));
    }
    let quoted = task.arguments.iter().map(|argument| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,+@%^".contains(c);
        match argument.chars().all(plain) && !argument.is_empty() {
            true => argument.clone(),
            false => format!("'{}'", printable(argument).replace('\'', "'\\''")),
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// Replaces what would move the cursor.
fn printable(text: &str) -> String {
    let shown = |c: char| match c.is_control() {
        true => '\u{b7}',
        false => c,
    };
    text.chars().map(shown).collect()
}

/// Takes one number of a kind of memory.
type Part = fn(&MemoryInfo) -> u64;

fn write_memory(f: &mut Formatter<'_>, kinds: &BTreeMap<&str, MemoryInfo>) -> fmt::Result {
    if kinds.is_empty() {
        return Ok(());
    }
    let any = |part: Part| kinds.values().any(|memory| part(memory) > 0);
    let mut columns: Vec<(&str, Part)> = vec![("mapped", |m| m.mapped), ("stored", |m| m.stored)];
    if any(|m| m.in_parent) {
        columns.push(("in parent", |m| m.in_parent));
    }
    if any(|m| m.remote) {
        columns.push(("remote", |m| m.remote));
    }
    write!(f, "\n{:<14}", "memory")?;
    for (title, _) in &columns {
        write!(f, "{title:>12}")?;
    }
    writeln!(f)?;
    for (kind, memory) in kinds {
        write!(f, "  {kind:<12}")?;
        for (_, part) in &columns {
            write!(f, "{:>12}", size(part(memory)))?;
        }
        writeln!(f)?;
    }
    Ok(())
}

fn write_files(f: &mut Formatter<'_>, files: &[FileInfo]) -> fmt::Result {
    let descriptors: usize = files.iter().map(|file| file.descriptors.len()).sum();
    writeln!(f, "\nfiles ({}), descriptors ({descriptors})", files.len())?;
    for group in files.chunk_by(|a, b| a.kind == b.kind) {
        writeln!(f, "  {} ({})", group[0].kind, group.len())?;
        for file in group.iter().take(LISTED) {
            write!(f, "    {}", printable(&file.name))?;
            if file.deleted {
                write!(f, " (deleted)")?;
            }
            if file.waiting_bytes > 0 {
                write!(f, ", {} waiting", size(file.waiting_bytes))?;
            }
            let owners = file.descriptors.iter().take(DESCRIPTORS);
            let owners: Vec<_> = owners.map(|d| format!("{}:{}", d.pid, d.fd)).collect();
            write!(f, "  [{}", owners.join(" "))?;
            if let Some(more @ 1..) = file.descriptors.len().checked_sub(DESCRIPTORS) {
                write!(f, " and {more} more")?;
            }
            writeln!(f, "]")?;
        }
        if let Some(more @ 1..) = group.len().checked_sub(LISTED) {
            writeln!(f, "    and {more} more")?;
        }
    }
    Ok(())
}

impl Display for SizeInfo {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "\n{} in {} images: pages {}",
            size(self.total),
            self.images,
            size(self.pages)
        )?;
        if self.ghost_files > 0 {
            write!(f, ", deleted files {}", size(self.ghost_files))?;
        }
        writeln!(f, ", the rest {}", size(self.metadata))
    }
}

/// Writes a number of bytes in the largest unit that leaves at least 1.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut whole, mut rest, mut unit) = (bytes, 0, 0);
    while whole >= 1024 {
        (whole, rest, unit) = (whole / 1024, whole % 1024, unit + 1);
    }
    match unit {
        0 => format!("{whole} B"),
        _ => format!("{whole}.{} {}", rest * 10 / 1024, UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_one_decimal() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(u64::MAX), "15.9 EiB");
    }
}
