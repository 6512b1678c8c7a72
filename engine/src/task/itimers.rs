//! Interval timers: real, virtual and profiling, with the time that is left.
//!
//! The rest is read while the task is stopped and armed again late in the restore, when all signals are
//! blocked, so that a tick that falls due meanwhile stays pending.
//!
//! Source: man 2 setitimer.

use firn_proto::{ItimerEntry, TaskTimersEntry};
use firn_sys::nr;

use crate::program::{Data, Program, Rule};

/// struct itimerval: interval and value, seconds and microseconds each.
const SIZE: usize = 32;
const NAMES: [&str; 3] = ["ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF"];

/// Adds the calls that read all three timers; returns where the answers stand.
pub fn ask(program: &mut Program) -> Data {
    let answers = program.space(3 * SIZE);
    for (which, at) in (0u32..3).zip([0, SIZE, 2 * SIZE]) {
        let args = [which.into(), answers.at(at).into()];
        program.call(nr::GETITIMER, &args, Rule::Ok, "reading an interval timer");
    }
    answers
}

/// Converts the answers of [`ask`] to the image's form.
pub fn to_image(answers: &[u8]) -> TaskTimersEntry {
    let mut timers = answers.chunks_exact(SIZE).map(|timer| {
        let word = |nth: usize| {
            u64::from_le_bytes(timer[8 * nth..8 * nth + 8].try_into().expect("eight bytes"))
        };
        ItimerEntry {
            isec: word(0),
            iusec: word(1),
            vsec: word(2),
            vusec: word(3),
        }
    });
    let mut next = || timers.next().unwrap_or_default();
    TaskTimersEntry {
        real: next(),
        virt: next(),
        prof: next(),
        posix: Vec::new(),
    }
}

/// Adds the calls that arm the timers that were armed.
pub fn plan(program: &mut Program, timers: &TaskTimersEntry) {
    for (which, timer) in (0u32..3).zip([&timers.real, &timers.virt, &timers.prof]) {
        let Some((sec, usec)) = time_left(timer) else {
            continue;
        };
        let fields = [timer.isec, timer.iusec, sec, usec];
        let bytes: Vec<u8> = fields
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect();
        let value = program.data(&bytes);
        let name = NAMES[usize::try_from(which).expect("0 to 2")];
        let args = [which.into(), value.into(), 0.into()];
        program.call(nr::SETITIMER, &args, Rule::Ok, format!("arming {name}"));
    }
}

/// Time until the next tick; None for a timer that is not armed.
///
/// The kernel arms a repeating real timer again only when its signal is taken: caught with the signal
/// pending, it has an interval but no time left. The tick that is pending comes anyway, so the next one
/// is an interval away.
fn time_left(timer: &ItimerEntry) -> Option<(u64, u64)> {
    [(timer.vsec, timer.vusec), (timer.isec, timer.iusec)]
        .into_iter()
        .find(|time| *time != (0, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeating_timer_with_its_tick_pending_goes_on() {
        let timer = ItimerEntry {
            isec: 0,
            iusec: 20,
            vsec: 0,
            vusec: 0,
        };
        assert_eq!(time_left(&timer), Some((0, 20)));
        assert_eq!(time_left(&ItimerEntry::default()), None);
    }

    #[test]
    fn only_armed_timers_are_armed_again() {
        let mut answers = [0u8; 3 * SIZE];
        answers[SIZE + 16] = 5;
        let image = to_image(&answers);
        assert_eq!(image.virt.vsec, 5);
        let mut program = Program::new("test");
        plan(&mut program, &image);
        assert_eq!(program.len(), 1);
        assert_eq!(program.why(0), "arming ITIMER_VIRTUAL");
    }
}
