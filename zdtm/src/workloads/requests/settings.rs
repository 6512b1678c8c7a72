//! Rings of which something was set after they were made.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::ring::SEEN;
use crate::sys::{self, PAGE, Region, Request, Ring};
use crate::{Stage, Workload, proc};

pub static POLLING_DEVICES: Workload = Workload::new(
    "requests/uring-napi",
    "rings that poll network devices, with a thread that submits and without",
    polling_devices,
)
.needs(SEEN);
pub static WORKERS: Workload = Workload::new(
    "requests/uring-workers",
    "limits and processors of the kernel's threads that work for two threads and for a ring",
    workers,
)
.needs(SEEN);

const NAPI: usize = 27;
const UNREGISTER_NAPI: usize = 28;
const PROCESSORS: usize = 17;
const LIMITS: usize = 19;
const ASYNC: u8 = 1 << 4;
/// Microseconds, and that busy polling is preferred.
const POLLED: [u8; 5] = [50, 0, 0, 0, 1];

fn polling_devices(stage: &Stage) -> Result<()> {
    let rings = [
        Ring::new(8, None, 0)?,
        Ring::new(8, None, sys::SQPOLL)?,
        Ring::new(8, None, 0)?,
    ];
    let argument = Region::anon(PAGE)?;
    let mut can_poll = true;
    for ring in &rings[..2] {
        argument.put(0, &[0; 16]);
        argument.put(0, &POLLED);
        match ring.register(NAPI, argument, 1) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                println!("this kernel polls no network devices for rings");
                can_poll = false;
            }
            set => drop(set.context("registering")?),
        }
    }
    stage.ready_and_wait()?;
    for (ring, wanted) in rings.iter().zip([POLLED, POLLED, [0; 5]]) {
        argument.put(0, &[0; 16]);
        let told = ring.register(UNREGISTER_NAPI, argument, 1);
        let found = argument.get(0, 5);
        let is_right = told.is_ok() && found == wanted;
        ensure!(
            is_right || !can_poll,
            "{told:?}, {found:?} instead of {wanted:?}"
        );
    }
    Ok(())
}

fn limits(ring: &Ring, set: [u32; 2]) -> Result<[u32; 2]> {
    let argument = Region::anon(PAGE)?;
    argument.put(0, &set[0].to_ne_bytes());
    argument.put(4, &set[1].to_ne_bytes());
    ring.register(LIMITS, argument, 2).context("limits")?;
    let word = |at| argument.word(at).load(std::sync::atomic::Ordering::SeqCst);
    Ok([word(0), word(4)])
}

fn keep_to(ring: &Ring, processor: usize) -> Result<()> {
    let argument = Region::anon(PAGE)?;
    argument.put(processor / 8, &[1 << (processor % 8)]);
    ring.register(PROCESSORS, argument, 128)
        .context("processors")
        .map(drop)
}

/// Lets a worker of the kernel do nothing.
fn work(ring: &mut Ring) -> Result<()> {
    let request = Request {
        flags: ASYNC,
        value: 7,
        ..Request::default()
    };
    let done = ring.run(&request)?;
    ensure!(done == (7, 0), "completion {done:?}");
    Ok(())
}

/// The processors of all workers, which come and go.
fn processors_of_workers() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for thread in std::fs::read_dir("/proc/self/task")? {
        let tid = thread?.file_name();
        let of = format!("{}/task/{}", sys::pid(), tid.to_string_lossy());
        let Ok(status) = proc::lines(of, "status") else {
            continue;
        };
        let line = |name: &str| status.get(name).cloned().unwrap_or_default();
        if line("Name").starts_with("iou-wrk-") {
            found.push(line("Cpus_allowed_list"));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Works with all rings until workers keep to these processors, and to no others.
fn expect_workers(wanted: &[String], mut work: impl FnMut() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        work()?;
        let found = processors_of_workers()?;
        if found == wanted {
            return Ok(());
        }
        if begun.elapsed() > Duration::from_secs(20) {
            bail!("workers keep to {found:?} instead of {wanted:?}");
        }
    }
}

fn workers(stage: &Stage) -> Result<()> {
    let last = thread::available_parallelism()?.get() - 1;
    // The ring that is used first has no limits, and the thread has them all the same.
    let mut free = Ring::new(8, None, 0)?;
    work_without_worker(&mut free)?;
    let mut ring = Ring::new(8, None, 0)?;
    work_without_worker(&mut ring)?;
    limits(&ring, [2, 3])?;
    keep_to(&ring, last)?;
    let submitter = Ring::new(8, None, sys::SQPOLL)?;
    limits(&submitter, [4, 0])?;
    keep_to(&submitter, last)?;
    let all = limits(&submitter, [0, 0])?;
    let (order, orders) = mpsc::channel::<()>();
    let (tell, answers) = mpsc::channel();
    thread::scope(|scope| {
        let other = scope.spawn(move || -> Result<()> {
            let mut own = Ring::new(8, None, 0)?;
            work_without_worker(&mut own)?;
            limits(&own, [1, 5])?;
            keep_to(&own, 0)?;
            tell.send(())?;
            for () in orders {
                ensure!(
                    limits(&own, [0, 0])? == [1, 5],
                    "limits of the other thread"
                );
                work(&mut own)?;
                tell.send(())?;
            }
            Ok(())
        });
        let hear = || answers.recv().context("the other thread has ended");
        let played = hear().and_then(|()| {
            stage.ready_and_wait()?;
            ensure!(
                limits(&submitter, [0, 0])? == all,
                "limits of the ring with a thread"
            );
            let mut wanted = vec!["0".to_owned(), last.to_string()];
            wanted.dedup();
            expect_workers(&wanted, || {
                ensure!(
                    limits(&free, [0, 0])? == [2, 3],
                    "limits of the first thread"
                );
                work(&mut free)?;
                work(&mut ring)?;
                order.send(())?;
                hear()
            })
        });
        drop(order);
        other.join().expect("it does not panic").and(played)
    })
}

/// A thread uses io_uring from its first request on.
fn work_without_worker(ring: &mut Ring) -> Result<()> {
    let done = ring.run(&Request::default())?;
    ensure!(done == (0, 0), "completion {done:?}");
    Ok(())
}
