//! Many descriptors: in one process, in a tree that shares them, and in one that has more of them than a
//! process may have. The engine gets no higher limit than the tasks have.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::sys::Region;
use crate::{Child, Stage, Workload, sys};

/// What a process has besides, and what the engine needs.
const OTHERS: usize = 100;
const FEW: usize = 4000;
/// As many as the usual limit of 20,000 leaves.
const MOST: usize = 19_900;

pub static CROWD: Workload = Workload::new(
    "files/crowd",
    "four thousand descriptors of many kinds, and as many as may be",
    |stage| crowd(stage, FEW),
)
.descriptor_limit(FEW + OTHERS);
pub static MOST_DESCRIPTORS: Workload = Workload::new(
    "files/most-descriptors",
    "19,900 descriptors of many kinds in one process",
    |stage| crowd(stage, MOST),
)
.descriptor_limit(MOST + OTHERS)
.heavy();
pub static HALF_PIPES: Workload = Workload::new(
    "files/crowd-half-pipes",
    "two thousand pipes of which one end is closed",
    |stage| half_pipes(stage, FEW / 2),
)
.descriptor_limit(FEW / 2 + OTHERS);
pub static SHARED: Workload = Workload::new(
    "files/crowd-shared",
    "twenty processes that share a thousand open files",
    |stage| shared(stage, 20, 1000),
);
pub static MOST_SHARED: Workload = Workload::new(
    "files/most-shared",
    "two hundred processes that share five thousand open files",
    |stage| shared(stage, 200, 5000),
)
.heavy();
pub static APART: Workload = Workload::new(
    "files/crowd-apart",
    "five processes with a thousand descriptors each, which none may have together",
    |stage| apart(stage, 5, 1000),
)
.descriptor_limit(1000 + OTHERS);
pub static MOST_APART: Workload = Workload::new(
    "files/most-apart",
    "ten processes with 5,000 descriptors each, which none may have together",
    |stage| apart(stage, 10, 5000),
)
.heavy();

pub static MEMORY_FILES: Workload = Workload::new(
    "files/crowd-memory",
    "memory files of three processes, sealed, empty, mapped, more than one may have open",
    |stage| memory_files(stage, 3, 1000),
)
.descriptor_limit(1000 + OTHERS);
pub static MOST_MEMORY_FILES: Workload = Workload::new(
    "files/most-memory-files",
    "22,500 memory files of five processes",
    |stage| memory_files(stage, 5, 4500),
)
.heavy();

/// Descriptors and what is to be found behind them.
enum Object {
    /// A file at this position.
    File(OwnedFd, usize),
    /// A pipe with this number in it.
    Pipe(OwnedFd, OwnedFd, usize),
    /// A pipe with this number in it, and nobody to write more.
    Reader(OwnedFd, usize),
    Counter(OwnedFd, usize),
    /// Two connected sockets; this number waits at the first.
    Sockets(OwnedFd, OwnedFd, usize),
    /// A socket whose peer is gone and has left this number.
    Left(OwnedFd, usize),
    Datagrams(OwnedFd),
    /// One open file under two numbers, at this position.
    Twins(OwnedFd, OwnedFd, usize),
    Memory(OwnedFd, usize),
}

const NR_KINDS: usize = 9;

impl Object {
    /// Makes the object with that number, of a kind that follows from it.
    fn new(stage: &Stage, number: usize) -> Result<Object> {
        let text = number.to_string();
        let file = || -> Result<OwnedFd> {
            let file = sys::open(stage.path("numbers"), libc::O_RDWR)?;
            sys::seek(&file, i64::try_from(number)?, libc::SEEK_SET)?;
            Ok(file)
        };
        Ok(match number % NR_KINDS {
            0 => Object::File(file()?, number),
            1 => {
                let (reader, writer) = sys::pipe(libc::O_CLOEXEC)?;
                sys::write(&writer, text.as_bytes())?;
                Object::Pipe(reader, writer, number)
            }
            2 => {
                let (reader, writer) = sys::pipe(0)?;
                sys::write(&writer, text.as_bytes())?;
                Object::Reader(reader, number)
            }
            3 => Object::Counter(sys::eventfd(u32::try_from(number)?, 0)?, number),
            4 => {
                let (one, other) = sys::socket_pair(libc::SOCK_STREAM)?;
                sys::write(&other, text.as_bytes())?;
                Object::Sockets(one, other, number)
            }
            5 => {
                let (one, other) = sys::socket_pair(libc::SOCK_STREAM)?;
                sys::write(&other, text.as_bytes())?;
                Object::Left(one, number)
            }
            6 => Object::Datagrams(sys::socket(libc::AF_UNIX, libc::SOCK_DGRAM)?),
            7 => {
                let one = file()?;
                Object::Twins(sys::dup(&one)?, one, number)
            }
            // The engine holds these twice.
            _ if number % (10 * NR_KINDS) != NR_KINDS - 1 => Object::File(file()?, number),
            _ => {
                let memory = sys::memfd(c"crowd", 0)?;
                sys::write(&memory, text.as_bytes())?;
                Object::Memory(memory, number)
            }
        })
    }

    fn nr_descriptors(&self) -> usize {
        match self {
            Object::Pipe(..) | Object::Sockets(..) | Object::Twins(..) => 2,
            _ => 1,
        }
    }

    /// Looks whether everything is as it was made.
    fn check(&self) -> Result<()> {
        match self {
            Object::File(file, number) => at(file, *number),
            Object::Pipe(reader, writer, number) => {
                ensure!(sys::write(writer, b"+")? == 1, "the pipe takes nothing");
                holds(reader, &format!("{number}+"))
            }
            Object::Reader(reader, number) => {
                holds(reader, &number.to_string())?;
                ended(reader)
            }
            Object::Counter(counter, number) => match number {
                0 => Ok(()),
                _ => {
                    let found = sys::read_number(counter)?;
                    ensure!(found == u64::try_from(*number)?, "the count is {found}");
                    Ok(())
                }
            },
            Object::Sockets(one, other, number) => {
                holds(one, &number.to_string())?;
                sys::write(one, b"back")?;
                holds(other, "back")
            }
            Object::Left(one, number) => {
                holds(one, &number.to_string())?;
                ended(one)
            }
            Object::Datagrams(socket) => {
                let kind = sys::sockopt_int(socket, libc::SOL_SOCKET, libc::SO_TYPE)?;
                ensure!(kind == libc::SOCK_DGRAM, "the socket is of kind {kind}");
                ensure!(sys::peer_name(socket).is_err(), "the socket has a peer");
                Ok(())
            }
            Object::Twins(one, other, number) => {
                at(one, *number)?;
                at(other, *number + 1)
            }
            Object::Memory(memory, number) => {
                let text = number.to_string();
                at(memory, text.len())?;
                sys::seek(memory, 0, libc::SEEK_SET)?;
                holds(memory, &text)
            }
        }
    }
}

/// Whether a file is at a position; it is one further on afterwards.
fn at(file: &OwnedFd, position: usize) -> Result<()> {
    let found = sys::seek(file, 0, libc::SEEK_CUR)?;
    ensure!(
        found == u64::try_from(position)?,
        "the position is {found}, was {position}"
    );
    sys::seek(file, 1, libc::SEEK_CUR)?;
    Ok(())
}

fn holds(fd: &OwnedFd, text: &str) -> Result<()> {
    let found = sys::read_exact(fd, text.len())?;
    ensure!(
        found == text.as_bytes(),
        "{} came and not {text}",
        String::from_utf8_lossy(&found)
    );
    Ok(())
}

fn ended(fd: &OwnedFd) -> Result<()> {
    let read = sys::read(fd, &mut [0])?;
    ensure!(read == 0, "{read} bytes more came");
    Ok(())
}

/// Makes objects with that many descriptors.
fn make(stage: &Stage, nr_descriptors: usize) -> Result<Vec<Object>> {
    let (mut objects, mut nr) = (Vec::new(), 0);
    while nr < nr_descriptors {
        let number = objects.len();
        let object = Object::new(stage, number).with_context(|| format!("object {number}"))?;
        nr += object.nr_descriptors();
        objects.push(object);
    }
    Ok(objects)
}

fn check(objects: &[Object]) -> Result<()> {
    for (number, object) in objects.iter().enumerate() {
        object.check().with_context(|| format!("object {number}"))?;
    }
    Ok(())
}

fn limit(nr: usize) -> Result<()> {
    let limit = u64::try_from(nr)?;
    sys::set_limit(libc::RLIMIT_NOFILE, limit, limit)
        .context("setting the limit of descriptors")?;
    Ok(())
}

fn crowd(stage: &Stage, nr_descriptors: usize) -> Result<()> {
    limit(nr_descriptors + OTHERS)?;
    fs::write(stage.path("numbers"), vec![b'0'; nr_descriptors + 1])?;
    let objects = make(stage, nr_descriptors)?;
    stage.ready_and_wait()?;
    check(&objects)
}

/// Each of them takes two descriptors of who makes it.
fn half_pipes(stage: &Stage, nr: usize) -> Result<()> {
    limit(nr + OTHERS)?;
    let make = |number: usize| -> Result<Object> {
        let (reader, writer) = sys::pipe(0)?;
        sys::write(&writer, number.to_string().as_bytes())?;
        Ok(Object::Reader(reader, number))
    };
    let pipes: Vec<Object> = (0..nr).map(make).collect::<Result<_>>()?;
    stage.ready_and_wait()?;
    check(&pipes)
}

/// All count on in the same counters and read on in the same files.
fn shared(stage: &Stage, nr_processes: usize, nr_descriptors: usize) -> Result<()> {
    limit(nr_descriptors + OTHERS)?;
    fs::write(stage.path("numbers"), vec![b'0'; nr_descriptors + 1])?;
    let (mut counters, mut files) = (Vec::new(), Vec::new());
    for number in 0..nr_descriptors / 2 {
        counters.push(sys::eventfd(u32::try_from(number)?, 0)?);
        let file = sys::open(stage.path("numbers"), libc::O_RDONLY)?;
        sys::seek(&file, i64::try_from(number)?, libc::SEEK_SET)?;
        files.push(file);
    }
    let use_all = || -> Result<()> {
        for counter in &counters {
            sys::write(counter, &1u64.to_ne_bytes())?;
        }
        for file in &files {
            sys::seek(file, 1, libc::SEEK_CUR)?;
        }
        Ok(())
    };
    let child = || {
        stage.child(|stage| {
            stage.ready_and_wait()?;
            use_all()
        })
    };
    let children: Vec<Child> = (0..nr_processes).map(|_| child()).collect::<Result<_>>()?;
    stage.ready_and_wait()?;
    children.into_iter().try_for_each(Child::finish)?;
    for (number, (counter, file)) in counters.iter().zip(&files).enumerate() {
        let wanted = number + nr_processes;
        let found = sys::read_number(counter)?;
        ensure!(
            found == u64::try_from(wanted)?,
            "counter {number} is {found} and not {wanted}"
        );
        at(file, wanted).with_context(|| format!("file {number}"))?;
    }
    Ok(())
}

fn apart(stage: &Stage, nr_processes: usize, nr_descriptors: usize) -> Result<()> {
    limit(nr_descriptors + OTHERS)?;
    fs::write(stage.path("numbers"), vec![b'0'; nr_descriptors + 1])?;
    let child = |_| {
        stage.child(|stage| {
            let objects = make(stage, nr_descriptors)?;
            stage.ready_and_wait()?;
            check(&objects)
        })
    };
    let children: Vec<Child> = (0..nr_processes).map(child).collect::<Result<_>>()?;
    stage.ready_and_wait()?;
    children.into_iter().try_for_each(Child::finish)
}

/// A memory file with a number in it, or with nothing.
struct MemoryFile {
    file: OwnedFd,
    text: String,
    seals: i32,
    mapped: Option<Region>,
}

impl MemoryFile {
    fn new(number: usize) -> Result<MemoryFile> {
        let file = sys::memfd(c"number", libc::MFD_ALLOW_SEALING)?;
        let text = match number % 5 {
            0 => String::new(),
            _ => number.to_string(),
        };
        sys::write(&file, text.as_bytes())?;
        let seals = match number % 3 {
            0 => libc::F_SEAL_WRITE | libc::F_SEAL_GROW,
            1 => libc::F_SEAL_SHRINK,
            _ => 0,
        };
        if seals != 0 {
            sys::fcntl(&file, libc::F_ADD_SEALS, i64::from(seals))?;
        }
        let mapped = match number % 50 {
            3 => Some((
                sys::open(
                    format!("/proc/self/fd/{}", file.as_raw_fd()),
                    libc::O_RDONLY,
                )?,
                libc::PROT_READ,
            )),
            4 if !number.is_multiple_of(3) => Some((sys::dup(&file)?, sys::RW)),
            _ => None,
        };
        let map = |(file, prot): (OwnedFd, i32)| {
            Region::map(
                None,
                sys::PAGE,
                prot,
                libc::MAP_SHARED,
                Some(file.as_fd()),
                0,
            )
        };
        let mapped = mapped.map(map).transpose().context("mapping")?;
        Ok(MemoryFile {
            file,
            text,
            seals,
            mapped,
        })
    }

    fn check(&self) -> Result<()> {
        at(&self.file, self.text.len())?;
        sys::seek(&self.file, 0, libc::SEEK_SET)?;
        holds(&self.file, &self.text)?;
        ended(&self.file)?;
        let seals = sys::fcntl(&self.file, libc::F_GET_SEALS, 0)?;
        ensure!(seals == self.seals, "the seals are {seals:#x}");
        if let Some(mapped) = &self.mapped {
            let found = mapped.get(0, self.text.len());
            ensure!(found == self.text.as_bytes(), "{found:?} is mapped");
        }
        Ok(())
    }
}

fn memory_files(stage: &Stage, nr_processes: usize, nr_files: usize) -> Result<()> {
    limit(nr_files + OTHERS)?;
    let child = |nth: usize| {
        stage.child(move |stage| {
            let numbers = nth * nr_files..(nth + 1) * nr_files;
            let files: Vec<MemoryFile> = numbers.map(MemoryFile::new).collect::<Result<_>>()?;
            stage.ready_and_wait()?;
            for (n, file) in files.iter().enumerate() {
                file.check().with_context(|| format!("memory file {n}"))?;
            }
            Ok(())
        })
    };
    let children: Vec<Child> = (0..nr_processes).map(child).collect::<Result<_>>()?;
    stage.ready_and_wait()?;
    children.into_iter().try_for_each(Child::finish)
}
