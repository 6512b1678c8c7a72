//! Names: of threads, and the arguments, environment and auxiliary vector as /proc shows them.

use std::fs;
use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, bail, ensure};

use crate::{Stage, Workload, proc, sys};

pub static COMM: Workload = Workload::new(
    "task/comm",
    "names of the process and of every thread",
    comm,
);
pub static ARGUMENTS: Workload = Workload::new(
    "task/arguments",
    "argv and environ as /proc shows them",
    arguments,
);
pub static TITLE: Workload = Workload::new(
    "task/title",
    "argv overwritten in place, as setproctitle does",
    title,
);
pub static AUXV: Workload = Workload::new(
    "task/auxv",
    "the auxiliary vector, and what it points to",
    auxv,
);

fn set_name(name: &str) -> Result<()> {
    Ok(fs::write(
        format!("/proc/self/task/{}/comm", sys::tid()),
        name,
    )?)
}

fn name() -> Result<String> {
    let text = proc::text("self", &format!("task/{}/comm", sys::tid()))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

fn comm(stage: &Stage) -> Result<()> {
    let names = [
        "one",
        "fifteen-letters",
        "with (brackets)",
        "white \t space",
    ];
    let (send, receive) = mpsc::channel();
    let handles: Vec<_> = names
        .into_iter()
        .map(|wanted| {
            let send = send.clone();
            thread::spawn(move || -> Result<()> {
                set_name(wanted)?;
                send.send(())?;
                crate::stop::wait();
                let found = name()?;
                ensure!(
                    found == wanted,
                    "a thread was called `{wanted}`, is called `{found}`"
                );
                Ok(())
            })
        })
        .collect();
    handles.iter().try_for_each(|_| receive.recv())?;
    set_name("leader) S 1 (")?;
    stage.ready_and_wait()?;
    ensure!(
        name()? == "leader) S 1 (",
        "the process is called `{}`",
        name()?
    );
    for handle in handles {
        handle.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    Ok(())
}

fn arguments(stage: &Stage) -> Result<()> {
    let read = || {
        Ok::<_, std::io::Error>((
            proc::text("self", "cmdline")?,
            proc::text("self", "environ")?,
        ))
    };
    let before = read()?;
    ensure!(
        before.0.contains("task/arguments"),
        "odd arguments: {before:?}"
    );
    stage.ready_and_wait()?;
    let after = read()?;
    ensure!(
        before == after,
        "arguments and environment were {before:?}, are {after:?}"
    );
    let own: Vec<String> = std::env::args().collect();
    ensure!(
        before.0.trim_end_matches('\0').split('\0').eq(own),
        "argv is not what /proc says"
    );
    Ok(())
}

/// Writes over the memory that /proc/PID/cmdline reads, without telling the kernel anything.
fn title(stage: &Stage) -> Result<()> {
    let stat = proc::stat("self")?;
    let (start, end): (usize, usize) = (stat[48].parse()?, stat[49].parse()?);
    let area = sys::Region {
        addr: start,
        len: end - start,
    };
    let mut text = vec![b'#'; area.len];
    text[area.len - 1] = 0;
    text[..5].copy_from_slice(b"title");
    area.put(0, &text);
    let wanted = proc::text("self", "cmdline")?;
    ensure!(
        wanted.starts_with("title#"),
        "the title does not show: {wanted:?}"
    );
    stage.ready_and_wait()?;
    let found = proc::text("self", "cmdline")?;
    ensure!(found == wanted, "the title was {wanted:?}, is {found:?}");
    Ok(())
}

const AT_EXECFN: u64 = 31;
const AT_RANDOM: u64 = 25;
const AT_SYSINFO_EHDR: u64 = 33;

fn entries() -> Result<Vec<(u64, u64)>> {
    let bytes = fs::read("/proc/self/auxv")?;
    let words = bytes
        .chunks_exact(8)
        .map(|word| Ok(u64::from_ne_bytes(word.try_into()?)));
    let words = words.collect::<Result<Vec<u64>>>()?;
    Ok(words
        .chunks_exact(2)
        .map(|pair| (pair[0], pair[1]))
        .collect())
}

fn entry(entries: &[(u64, u64)], kind: u64) -> Result<usize> {
    match entries.iter().find(|(found, _)| *found == kind) {
        Some((_, value)) => Ok(usize::try_from(*value)?),
        None => bail!("no entry {kind} in auxv"),
    }
}

fn auxv(stage: &Stage) -> Result<()> {
    let before = entries()?;
    let random = sys::Region {
        addr: entry(&before, AT_RANDOM)?,
        len: 16,
    }
    .get(0, 16);
    stage.ready_and_wait()?;
    let after = entries()?;
    ensure!(before == after, "auxv was {before:x?}, is {after:x?}");
    let now = sys::Region {
        addr: entry(&after, AT_RANDOM)?,
        len: 16,
    }
    .get(0, 16);
    ensure!(
        random == now,
        "the random bytes were {random:x?}, are {now:x?}"
    );
    let own = std::env::current_exe()?;
    let length = own.as_os_str().len();
    let name = sys::Region {
        addr: entry(&after, AT_EXECFN)?,
        len: length,
    }
    .get(0, length);
    ensure!(
        name == own.as_os_str().as_encoded_bytes(),
        "AT_EXECFN points to something else"
    );
    let vdso = proc::vma_at(entry(&after, AT_SYSINFO_EHDR)?)?;
    let found = vdso.as_ref().map_or("nothing", |vma| vma.path.as_str());
    ensure!(found == "[vdso]", "AT_SYSINFO_EHDR points to {found}");
    Ok(())
}
