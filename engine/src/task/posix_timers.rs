//! POSIX timers: ids, what they notify, settings, the time that is left, overruns.
//!
//! /proc/PID/timers tells what a timer was made with, the task itself what it is set to. On restore a
//! timer must have its old id, which programs keep in their memory. Since Linux 6.15 a process may ask
//! for ids (PR_TIMER_CREATE_RESTORE_IDS); before, ids count up, and timers are made and deleted until the
//! wanted one comes.
//!
//! A timer that notifies one thread is made by that thread, because a timer on a thread's CPU clock
//! counts the time of its maker; all others are made by the leader.
//!
//! Overruns can't be set, but they can be brought about: the timer is started as if it had last expired
//! so many intervals ago, and its one signal is taken. It goes on in step.
//!
//! Source: man 2 timer_create, timer_settime; man 5 proc_pid_timers; linux kernel/time/posix-timers.c.

use firn_proto::{PosixTimerEntry, SignalQueueEntry};
use firn_sys::{Pid, clock, nr, procfs};

use super::status::StatusError;
use crate::program::{Arena, Data, Program, ProgramId, Rule, Slot};

const SIGEV_SIGNAL: u32 = 0;
const SIGEV_NONE: u32 = 1;
const SIGEV_THREAD: u32 = 2;
const SIGEV_THREAD_ID: u32 = 4;
const PR_TIMER_CREATE_RESTORE_IDS: u32 = 77;
const CLOCK_REALTIME: i32 = 0;
const CLOCK_MONOTONIC: i32 = 1;
const CLOCK_THREAD_CPUTIME: i32 = 3;
const CLOCK_BOOTTIME: i32 = 7;
const TIMER_ABSTIME: u32 = 1;
const EAGAIN: i32 = 11;
const NANOS: u128 = 1_000_000_000;
/// struct itimerspec: interval and value, seconds and nanoseconds each.
const SETTING_SIZE: usize = 32;
/// struct sigevent.
const SIGEVENT_SIZE: usize = 64;
/// Highest id that is reached by making and deleting timers.
const MAX_WALKED_ID: u32 = 20_000;

/// Reads what a process's timers were made with; their settings are [`ask`]ed for.
///
/// # Errors
/// The process is gone, or the file has another form than documented.
pub fn read(pid: Pid) -> Result<Vec<PosixTimerEntry>, StatusError> {
    let path = format!("/proc/{pid}/timers");
    let text = match procfs::read_to_string(&path) {
        Ok(text) => text,
        // Kernels without CONFIG_POSIX_TIMERS.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            let path = path.into();
            return Err(StatusError::Read { path, source });
        }
    };
    parse(&text).map_err(|field| StatusError::Field {
        path: path.into(),
        field,
    })
}

fn parse(text: &str) -> Result<Vec<PosixTimerEntry>, &'static str> {
    let mut timers: Vec<PosixTimerEntry> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':').ok_or("line")?;
        let value = value.trim();
        if key == "ID" {
            timers.push(PosixTimerEntry {
                it_id: value.parse().map_err(|_| "ID")?,
                ..PosixTimerEntry::default()
            });
            continue;
        }
        let timer = timers.last_mut().ok_or("ID")?;
        match key {
            "signal" => parse_signal(value, timer).ok_or("signal")?,
            "notify" => parse_notify(value, timer).ok_or("notify")?,
            "ClockID" => {
                let clock: i32 = value.parse().map_err(|_| "ClockID")?;
                timer.clock_id = clock.cast_unsigned();
            }
            _ => {}
        }
    }
    timers.sort_by_key(|timer| timer.it_id);
    Ok(timers)
}

/// `10/000000000000beef`: number and value.
fn parse_signal(text: &str, timer: &mut PosixTimerEntry) -> Option<()> {
    let (signal, value) = text.split_once('/')?;
    timer.si_signo = signal.parse().ok()?;
    let value = value.strip_prefix("0x").unwrap_or(value);
    timer.sival_ptr = match value {
        "(null)" => 0,
        hex => u64::from_str_radix(hex, 16).ok()?,
    };
    Some(())
}

/// `signal/pid.10`, `thread/pid.10`, `none/pid.10`, `signal/tid.11`.
fn parse_notify(text: &str, timer: &mut PosixTimerEntry) -> Option<()> {
    let (how, whom) = text.split_once('/')?;
    let (kind, id) = whom.split_once('.')?;
    timer.it_sigev_notify = match how {
        "signal" => SIGEV_SIGNAL,
        "none" => SIGEV_NONE,
        "thread" => SIGEV_THREAD,
        _ => return None,
    };
    if kind == "tid" {
        timer.it_sigev_notify |= SIGEV_THREAD_ID;
        timer.notify_thread_id = Some(id.parse().ok()?);
    }
    Some(())
}

/// What a process with timers is asked about them.
#[derive(Debug)]
pub struct TimerQuestions {
    made: Vec<PosixTimerEntry>,
    settings: Data,
    overruns: Vec<Slot>,
}

/// Adds the calls that read the settings of all timers.
pub fn ask(program: &mut Program, made: Vec<PosixTimerEntry>) -> TimerQuestions {
    let settings = program.space(made.len() * SETTING_SIZE);
    let mut overruns = Vec::with_capacity(made.len());
    for (nth, timer) in made.iter().enumerate() {
        let why = "reading a POSIX timer's overruns";
        let id = [timer.it_id.into()];
        overruns.push(program.call_to_slot(nr::TIMER_GETOVERRUN, &id, Rule::Ok, why));
        let args = [timer.it_id.into(), settings.at(nth * SETTING_SIZE).into()];
        program.call(nr::TIMER_GETTIME, &args, Rule::Ok, "reading a POSIX timer");
    }
    TimerQuestions {
        made,
        settings,
        overruns,
    }
}

impl TimerQuestions {
    /// The image's form of all timers.
    pub fn answers(&self, arena: &Arena, id: ProgramId) -> Vec<PosixTimerEntry> {
        let settings = arena.read(id, self.settings);
        let timers = self.made.iter().zip(settings.chunks_exact(SETTING_SIZE));
        timers
            .zip(&self.overruns)
            .map(|((made, setting), overrun)| {
                let word = |nth: usize| {
                    let bytes = &setting[8 * nth..8 * nth + 8];
                    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
                };
                PosixTimerEntry {
                    overrun: u32::try_from(arena.slot(id, *overrun)).unwrap_or(0),
                    isec: word(0),
                    insec: word(1),
                    vsec: word(2),
                    vnsec: word(3),
                    ..*made
                }
            })
            .collect()
    }
}

/// True for a timer on the CPU clock of the thread that made it, whichever that was.
pub fn counts_its_maker(timer: &PosixTimerEntry) -> bool {
    const PER_THREAD: i32 = 4;
    let clock = timer.clock_id.cast_signed();
    let names_nobody = clock < 0 && clock & PER_THREAD != 0 && !(clock >> 3) == 0;
    clock == CLOCK_THREAD_CPUTIME || names_nobody
}

/// The thread that makes and starts a timer.
pub fn home(timer: &PosixTimerEntry, leader: Pid) -> Pid {
    match timer.notify_thread_id {
        Some(tid) if timer.it_sigev_notify & SIGEV_THREAD_ID != 0 => Pid::from_raw(tid),
        _ => leader,
    }
}

/// How ids come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerIds {
    /// The process asks for them.
    Wanted,
    /// Timers are made and deleted until the id comes, all by the leader.
    Walked,
}

/// A timer that can't be made again here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TimerPlanError {
    /// Its id is out of reach on an old kernel.
    #[error("POSIX timer {id} of task {pid} can't have its id again: this kernel only counts up")]
    Id {
        /// The process.
        pid: Pid,
        /// The timer.
        id: u32,
    },
    /// Its maker is not known to make timers on an old kernel.
    #[error(
        "POSIX timer {id} of task {pid} runs on a thread's CPU clock: this kernel can't make it"
    )]
    ThreadClock {
        /// The process.
        pid: Pid,
        /// The timer.
        id: u32,
    },
}

/// Adds the call that lets the process choose timer ids, or the one that ends it.
pub fn plan_choice_of_ids(program: &mut Program, choose: bool) {
    let args = [PR_TIMER_CREATE_RESTORE_IDS.into(), u32::from(choose).into()];
    let why = "choosing ids of POSIX timers";
    program.call(nr::PRCTL, &args, Rule::Ok, why);
}

/// Adds the calls that make timers with the ids they had; ids must be a matter of choice just now.
pub fn plan_creation<'a>(
    program: &mut Program,
    timers: impl IntoIterator<Item = &'a PosixTimerEntry>,
) {
    for timer in timers {
        create(program, timer);
    }
}

/// Adds the calls that make all timers of a process on a kernel that only counts ids up.
///
/// # Errors
/// See [`TimerPlanError`].
pub fn plan_walk(
    program: &mut Program,
    pid: Pid,
    timers: &[PosixTimerEntry],
) -> Result<(), TimerPlanError> {
    let mut next = 0;
    for timer in timers {
        let id = timer.it_id;
        if id > MAX_WALKED_ID {
            return Err(TimerPlanError::Id { pid, id });
        }
        if counts_its_maker(timer) && home(timer, pid) != pid {
            return Err(TimerPlanError::ThreadClock { pid, id });
        }
        for skipped in next..id {
            let anything = PosixTimerEntry {
                it_id: skipped,
                clock_id: CLOCK_MONOTONIC.cast_unsigned(),
                it_sigev_notify: SIGEV_NONE,
                ..PosixTimerEntry::default()
            };
            create(program, &anything);
            let why = "deleting a POSIX timer that had a wanted one's turn";
            program.call(nr::TIMER_DELETE, &[skipped.into()], Rule::Ok, why);
        }
        create(program, timer);
        // The id that came is the wanted one, or there is no such timer.
        let setting = program.space(SETTING_SIZE);
        let why = format!("looking for POSIX timer {id}");
        program.call(
            nr::TIMER_GETTIME,
            &[id.into(), setting.into()],
            Rule::Ok,
            why,
        );
        next = id + 1;
    }
    Ok(())
}

fn create(program: &mut Program, timer: &PosixTimerEntry) {
    let mut event = [0u8; SIGEVENT_SIZE];
    event[..8].copy_from_slice(&timer.sival_ptr.to_le_bytes());
    event[8..12].copy_from_slice(&timer.si_signo.to_le_bytes());
    event[12..16].copy_from_slice(&timer.it_sigev_notify.to_le_bytes());
    event[16..20].copy_from_slice(&timer.notify_thread_id.unwrap_or(0).to_le_bytes());
    let event = program.data(&event);
    let id = program.data(&timer.it_id.to_le_bytes());
    let clock = timer.clock_id.cast_signed();
    let args = [clock.into(), event.into(), id.into()];
    let why = format!("making POSIX timer {}", timer.it_id);
    program.call(nr::TIMER_CREATE, &args, Rule::Ok, why);
}

/// A timer whose start is computed at the last moment: it must seem to have expired some time ago.
#[derive(Debug, Clone)]
pub struct LateStart {
    /// Where its setting stands.
    pub setting: Data,
    timer: PosixTimerEntry,
}

impl LateStart {
    /// The setting, by the clock of this moment.
    pub fn bytes(&self) -> Vec<u8> {
        let now = now(self.timer.clock_id.cast_signed()).unwrap_or(0);
        self.setting_at(now)
    }

    fn setting_at(&self, now: u128) -> Vec<u8> {
        let interval = nanos(self.timer.isec, self.timer.insec);
        let next = now + nanos(self.timer.vsec, self.timer.vnsec);
        let expirations = u128::from(self.timer.overrun) + 1;
        // A clock that is younger than the overruns can't have seen them.
        let first = next.checked_sub(expirations * interval);
        setting(interval, first.filter(|time| *time > 0).unwrap_or(next))
    }
}

fn nanos(sec: u64, nsec: u64) -> u128 {
    u128::from(sec) * NANOS + u128::from(nsec)
}

fn setting(interval: u128, value: u128) -> Vec<u8> {
    let part = |time: u128| u64::try_from(time).unwrap_or(u64::MAX).to_le_bytes();
    let words = [
        interval / NANOS,
        interval % NANOS,
        value / NANOS,
        value % NANOS,
    ];
    words.into_iter().flat_map(part).collect()
}

fn now(clock: i32) -> Option<u128> {
    let (sec, nsec) = match clock {
        CLOCK_REALTIME => clock::realtime(),
        CLOCK_MONOTONIC => clock::monotonic(),
        CLOCK_BOOTTIME => clock::boottime(),
        _ => return None,
    };
    Some(nanos(sec, nsec))
}

/// Adds the calls that start the timers that were running; `pending` are the signals that the thread or
/// its process have been given back already. Timers whose start must be computed later are returned.
pub fn plan_start<'a>(
    program: &mut Program,
    timers: impl IntoIterator<Item = &'a PosixTimerEntry>,
    pending: &[&SignalQueueEntry],
) -> Vec<LateStart> {
    let running = timers.into_iter().filter(|timer| is_running(timer));
    let (late, plain): (Vec<_>, Vec<_>) =
        running.partition(|timer| can_overrun(timer) && !is_pending(timer.si_signo, pending));
    let mut starts = Vec::with_capacity(late.len());
    for timer in late {
        starts.push(plan_overrun(program, timer));
    }
    for timer in plain {
        let interval = nanos(timer.isec, timer.insec);
        let left = nanos(timer.vsec, timer.vnsec);
        let value = if left == 0 { interval } else { left };
        let setting = program.data(&setting(interval, value));
        start(program, timer, 0, setting);
    }
    starts
}

fn is_running(timer: &PosixTimerEntry) -> bool {
    (timer.isec, timer.insec, timer.vsec, timer.vnsec) != (0, 0, 0, 0)
}

/// Overruns of a timer that sends signals, repeats, and whose clock can be read from outside.
fn can_overrun(timer: &PosixTimerEntry) -> bool {
    timer.overrun > 0
        && timer.it_sigev_notify != SIGEV_NONE
        && (timer.isec, timer.insec) != (0, 0)
        && now(timer.clock_id.cast_signed()).is_some()
}

/// The signal that is taken must be the timer's own.
fn is_pending(signal: u32, queues: &[&SignalQueueEntry]) -> bool {
    let number = signal.to_le_bytes();
    let mut signals = queues.iter().flat_map(|queue| &queue.signals);
    signals.any(|pending| pending.siginfo.starts_with(&number))
}

fn start(program: &mut Program, timer: &PosixTimerEntry, flags: u32, setting: Data) {
    let args = [timer.it_id.into(), flags.into(), setting.into(), 0.into()];
    let why = format!("starting POSIX timer {}", timer.it_id);
    program.call(nr::TIMER_SETTIME, &args, Rule::Ok, why);
}

fn plan_overrun(program: &mut Program, timer: &PosixTimerEntry) -> LateStart {
    let setting = program.space(SETTING_SIZE);
    start(program, timer, TIMER_ABSTIME, setting);
    let set = program.data(&(1u64 << (timer.si_signo - 1)).to_le_bytes());
    let patience = program.data(&[2u64.to_le_bytes(), 0u64.to_le_bytes()].concat());
    let args = [set.into(), 0.into(), patience.into(), 8.into()];
    let why = format!("taking the signal of POSIX timer {}", timer.it_id);
    program.call(nr::RT_SIGTIMEDWAIT, &args, Rule::OkOr(EAGAIN), why);
    LateStart {
        setting,
        timer: *timer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMERS: &str = "ID: 3\nsignal: 34/000000000000beef\nnotify: signal/tid.11\nClockID: 1\n\
        ID: 1\nsignal: 14/(null)\nnotify: none/pid.10\nClockID: -6\n";

    #[test]
    fn what_proc_tells_is_understood_and_sorted() {
        let timers = parse(TIMERS).unwrap();
        assert_eq!((timers[0].it_id, timers[1].it_id), (1, 3));
        assert_eq!(timers[0].clock_id.cast_signed(), -6);
        assert_eq!(timers[0].it_sigev_notify, SIGEV_NONE);
        assert_eq!(timers[1].sival_ptr, 0xbeef);
        assert_eq!(timers[1].notify_thread_id, Some(11));
        assert_eq!(home(&timers[1], Pid::from_raw(10)), Pid::from_raw(11));
        assert_eq!(parse("signal: 1/2\n"), Err("ID"));
    }

    #[test]
    fn clocks_of_their_maker_are_known_in_both_forms() {
        let on = |clock: i32| PosixTimerEntry {
            clock_id: clock.cast_unsigned(),
            ..PosixTimerEntry::default()
        };
        assert!(counts_its_maker(&on(3)));
        // What libc makes of CLOCK_THREAD_CPUTIME_ID and CLOCK_PROCESS_CPUTIME_ID.
        assert!(counts_its_maker(&on(-2)));
        assert!(!counts_its_maker(&on(-6)));
        assert!(!counts_its_maker(&on(1)));
    }

    #[test]
    fn an_old_kernel_counts_up_to_the_id() {
        let mut program = Program::new("test");
        let timer = PosixTimerEntry {
            it_id: 2,
            ..PosixTimerEntry::default()
        };
        plan_walk(&mut program, Pid::from_raw(7), &[timer]).unwrap();
        // Two made and deleted, one made and looked for.
        assert_eq!(program.len(), 6);
        let far = PosixTimerEntry {
            it_id: 1 << 30,
            ..PosixTimerEntry::default()
        };
        let mut program = Program::new("test");
        assert!(plan_walk(&mut program, Pid::from_raw(7), &[far]).is_err());
    }

    #[test]
    fn overruns_lie_so_many_intervals_back() {
        let timer = PosixTimerEntry {
            overrun: 4,
            isec: 10,
            vsec: 3,
            clock_id: 1,
            si_signo: 34,
            ..PosixTimerEntry::default()
        };
        let mut program = Program::new("test");
        let starts = plan_start(&mut program, [&timer], &[]);
        assert_eq!((starts.len(), program.len()), (1, 2));
        let bytes = starts[0].setting_at(100 * NANOS);
        assert_eq!(bytes, setting(10 * NANOS, 53 * NANOS));
        // Too young a clock: no overruns, but in step.
        let bytes = starts[0].setting_at(5 * NANOS);
        assert_eq!(bytes, setting(10 * NANOS, 8 * NANOS));
    }
}
