//! One round trip of a syscall program against the same calls injected one by one.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use firn_engine::Pid;
use firn_engine::arch::Abi;
use firn_engine::inject::{self, CallSpec, Job, RemoteCall, call_all};
use firn_engine::program::{Program, ProgramSet, Rule};
use firn_sys::{nr, ptrace, wait};

/// Calls of each way.
const CALLS: usize = 100;

/// A sleeping process, stopped by this one.
struct Victim(Child);

impl Victim {
    fn stop() -> Result<Victim> {
        let child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn()?;
        let victim = Victim(child);
        std::thread::sleep(Duration::from_millis(50));
        ptrace::seize(victim.pid(), ptrace::O_TRACESYSGOOD)?;
        ptrace::interrupt(victim.pid())?;
        wait::wait(victim.pid())?;
        Ok(victim)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs both ways in turn and prints the medians and their ratio.
pub fn run(runs: u16) -> Result<()> {
    let victim = Victim::stop()?;
    let mut program = Vec::new();
    let mut singles = Vec::new();
    for _ in 0..runs {
        program.push(one_program(victim.pid())?);
        singles.push(single_calls(victim.pid())?);
    }
    let (program, singles) = (median(&mut program), median(&mut singles));
    println!(
        "{CALLS} calls in a stopped task, medians of {runs}: one program {:.0} us \
         (mapping the arena and unmapping it included), one by one {:.0} us, ratio {:.1}",
        micros(program),
        micros(singles),
        micros(singles) / micros(program)
    );
    Ok(())
}

fn one_program(pid: Pid) -> Result<Duration> {
    let mut set = ProgramSet::new();
    let mut program = Program::new("bench");
    let mut slot = None;
    for _ in 0..CALLS {
        slot = Some(program.call_to_slot(nr::GETPID, &[], Rule::Ok, "getpid"));
    }
    program.park();
    let id = set.add(program);
    let threads = vec![(pid, id)];
    let begun = Instant::now();
    let job = Job {
        pid,
        abi: Abi::Native,
        threads,
        set,
    };
    let arenas = inject::run(&[job], None)?;
    let taken = begun.elapsed();
    let last = slot.context("there are calls")?;
    ensure!(
        arenas[0].slot(id, last) == i64::from(pid.raw()),
        "a wrong answer"
    );
    Ok(taken)
}

fn single_calls(pid: Pid) -> Result<Duration> {
    let regs = ptrace::general_regs(pid)?;
    let at = inject::find_syscall_instruction(pid, Abi::Native)?;
    let begun = Instant::now();
    for _ in 0..CALLS {
        let call = CallSpec {
            abi: Abi::Native,
            nr: nr::GETPID,
            args: [0; 6],
        };
        let mut calls = [RemoteCall::new(pid, regs, at, call)];
        call_all(&mut calls)?;
        ensure!(
            calls[0].result()? == u64::from(pid.to_image()),
            "a wrong answer"
        );
    }
    let taken = begun.elapsed();
    ptrace::set_general_regs(pid, &regs)?;
    Ok(taken)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
