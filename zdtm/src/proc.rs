//! What /proc says about a task, read by the workloads about themselves and by the runner about them.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs;
use std::io;
use std::path::PathBuf;

/// A line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: usize,
    /// One past the last address.
    pub end: usize,
    /// Such as `rw-p`.
    pub perms: String,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Device as `major:minor` in hexadecimal.
    pub device: String,
    /// Inode number, 0 for none.
    pub inode: u64,
    /// Path or name in brackets, or nothing.
    pub path: String,
}

/// A VMA with the lines that `/proc/PID/smaps` has about it.
#[derive(Debug, Clone)]
pub struct VmaDetails {
    /// The VMA.
    pub vma: Vma,
    /// Lines by name, such as `Rss` and `VmFlags`, without the colon.
    pub lines: BTreeMap<String, String>,
}

impl Vma {
    /// Reads a line of maps; `None` for a line of another shape.
    pub fn parse(line: &str) -> Option<Vma> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let perms = words.next()?.to_owned();
        Some(Vma {
            start: usize::from_str_radix(start, 16).ok()?,
            end: usize::from_str_radix(end, 16).ok()?,
            perms,
            offset: u64::from_str_radix(words.next()?, 16).ok()?,
            device: words.next()?.to_owned(),
            inode: words.next()?.parse().ok()?,
            path: words.next().unwrap_or("").trim_start().to_owned(),
        })
    }
}

impl VmaDetails {
    /// A line that counts kB, in bytes.
    pub fn bytes(&self, name: &str) -> u64 {
        let number = self.lines.get(name).and_then(|line| line.split(' ').next());
        number
            .and_then(|number| number.parse::<u64>().ok())
            .map_or(0, |kb| kb * 1024)
    }

    /// Tells whether a two-letter flag is among the VmFlags.
    pub fn has_flag(&self, flag: &str) -> bool {
        self.lines
            .get("VmFlags")
            .is_some_and(|flags| flags.split(' ').any(|f| f == flag))
    }
}

/// Reads the text of a file below `/proc/PID`.
pub fn text(pid: impl Display, file: &str) -> io::Result<String> {
    fs::read(format!("/proc/{pid}/{file}")).map(|bytes| String::from_utf8_lossy(&bytes).into())
}

/// Reads where a link below `/proc/PID` points.
pub fn link(pid: impl Display, file: &str) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/{pid}/{file}"))
}

/// Reads the VMAs of a task.
pub fn maps(pid: impl Display) -> io::Result<Vec<Vma>> {
    Ok(text(pid, "maps")?.lines().filter_map(Vma::parse).collect())
}

/// Reads the VMAs of a task with their details.
pub fn smaps(pid: impl Display) -> io::Result<Vec<VmaDetails>> {
    Ok(parse_smaps(&text(pid, "smaps")?))
}

fn parse_smaps(text: &str) -> Vec<VmaDetails> {
    let mut all: Vec<VmaDetails> = Vec::new();
    for line in text.lines() {
        if let Some(vma) = Vma::parse(line) {
            all.push(VmaDetails {
                vma,
                lines: BTreeMap::new(),
            });
        } else if let (Some(last), Some((name, value))) = (all.last_mut(), line.split_once(':')) {
            last.lines.insert(name.to_owned(), value.trim().to_owned());
        }
    }
    all
}

/// Finds the VMA of this process that holds an address.
pub fn vma_at(addr: usize) -> io::Result<Option<Vma>> {
    Ok(maps("self")?
        .into_iter()
        .find(|vma| (vma.start..vma.end).contains(&addr)))
}

/// Finds the VMA of this process that holds an address, with its details.
pub fn details_at(addr: usize) -> io::Result<VmaDetails> {
    let found = smaps("self")?
        .into_iter()
        .find(|d| (d.vma.start..d.vma.end).contains(&addr));
    found.ok_or_else(|| io::Error::other(format!("nothing is mapped at {addr:#x}")))
}

/// Reads lines of the form `Name: value`.
pub fn lines(pid: impl Display, file: &str) -> io::Result<BTreeMap<String, String>> {
    let text = text(pid, file)?;
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    Ok(pairs
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect())
}

/// Reads the fields of `/proc/PID/stat`, numbered as in proc(5): 1 is the pid, 2 the name.
pub fn stat(pid: impl Display) -> io::Result<Vec<String>> {
    let text = text(pid, "stat")?;
    parse_stat(&text).ok_or_else(|| io::Error::other("a stat line of unknown shape"))
}

fn parse_stat(text: &str) -> Option<Vec<String>> {
    let (pid, rest) = text.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let fixed = [String::new(), pid.to_owned(), name.to_owned()];
    Some(
        fixed
            .into_iter()
            .chain(rest.split_whitespace().map(str::to_owned))
            .collect(),
    )
}

/// Lists the numbers in a directory below `/proc`, sorted.
pub fn numbers(dir: &str) -> io::Result<Vec<i32>> {
    let names = fs::read_dir(dir)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut numbers: Vec<i32> = names.filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Lists the threads of a process.
pub fn threads(pid: impl Display) -> io::Result<Vec<i32>> {
    let mut threads = numbers(&format!("/proc/{pid}/task"))?;
    threads.retain(|tid| !is_io_worker(&format!("{pid}/task/{tid}")));
    Ok(threads)
}

/// Threads that the kernel has made to work for io_uring come and go; they are none of the program's.
fn is_io_worker(thread: &str) -> bool {
    const PF_IO_WORKER: u32 = 0x10;
    let flags = stat(thread).ok().and_then(|stat| stat.get(9)?.parse().ok());
    flags.is_some_and(|flags: u32| flags & PF_IO_WORKER != 0)
}

/// Lists a process and all that descend from it, parents first; empty when it is gone.
pub fn tree(root: i32) -> io::Result<Vec<i32>> {
    let parents: Vec<(i32, i32)> = numbers("/proc")?
        .into_iter()
        .filter_map(|pid| Some((pid, stat(pid).ok()?.get(4)?.parse().ok()?)))
        .collect();
    let mut found: Vec<i32> = parents
        .iter()
        .map(|&(pid, _)| pid)
        .filter(|&pid| pid == root)
        .collect();
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(
            parents
                .iter()
                .filter(|&&(_, of)| of == parent)
                .map(|&(pid, _)| pid),
        );
        next += 1;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_lines_parse_with_and_without_a_path() {
        let vma = Vma::parse("7f00-8f00 rw-s 00001000 fd:01 42                  /a b (deleted)");
        let vma = vma.expect("a good line");
        assert_eq!((vma.start, vma.end, vma.inode), (0x7f00, 0x8f00, 42));
        assert_eq!(vma.path, "/a b (deleted)");
        assert_eq!(
            Vma::parse("7f00-8f00 rw-p 00000000 00:00 0 ")
                .expect("no path")
                .path,
            ""
        );
        assert_eq!(Vma::parse("Rss:                  12 kB"), None);
    }

    #[test]
    fn smaps_details_belong_to_the_vma_above() {
        let text = "1000-2000 rw-p 00000000 00:00 0 \nRss:   8 kB\nVmFlags: rd wr ac \n\
                    3000-4000 r--p 00000000 00:00 0 [heap]\nRss:   0 kB\n";
        let all = parse_smaps(text);
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].bytes("Rss"), 8192);
        assert!(all[0].has_flag("wr") && !all[0].has_flag("w"));
        assert_eq!(all[1].vma.path, "[heap]");
    }

    #[test]
    fn stat_fields_count_from_one_even_with_brackets_in_the_name() {
        let fields = parse_stat("7 (a) b (c)) S 1 7 7 0\n").expect("a good line");
        assert_eq!(fields[2], "a) b (c)");
        assert_eq!((fields[3].as_str(), fields[4].as_str()), ("S", "1"));
    }

    #[test]
    fn the_tree_of_this_process_starts_with_it() {
        let own = i32::try_from(std::process::id()).expect("pids are small");
        assert_eq!(tree(own).expect("proc is readable").first(), Some(&own));
    }
}
