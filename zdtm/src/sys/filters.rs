//! Seccomp filters of a few instructions.

use std::io;

const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// Lets the call through.
pub const ALLOW: u32 = 0x7fff_0000;
/// Kills the process by SIGSYS.
pub const KILL: u32 = 0x8000_0000;
/// Asks the supervisor.
pub const NOTIFY: u32 = 0x7fc0_0000;
/// Gives the filter to all threads.
pub const TSYNC: u64 = 1;
/// Returns a descriptor for a supervisor.
pub const NEW_LISTENER: u64 = 8;

/// The action that makes a call fail.
pub fn fail_with(errno: u16) -> u32 {
    0x0005_0000 | u32::from(errno)
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// A filter that does `action` for each of the calls, and lets all others through.
pub fn filter(calls: &[i64], action: u32) -> Vec<libc::sock_filter> {
    let mut program = vec![instruction(LOAD_WORD, 0, 0, 0)];
    for (nth, call) in calls.iter().enumerate() {
        let to_action = u8::try_from(calls.len() - nth).unwrap_or(u8::MAX);
        let number = u32::try_from(*call).unwrap_or(u32::MAX);
        program.push(instruction(JUMP_EQUAL, to_action, 0, number));
    }
    program.push(instruction(RETURN, 0, 0, ALLOW));
    program.push(instruction(RETURN, 0, 0, action));
    program
}

/// Installs a filter for this thread; the result is 0, a descriptor, or with TSYNC a thread that could
/// not follow.
pub fn install_filter(mut program: Vec<libc::sock_filter>, flags: u64) -> io::Result<u64> {
    const SET_MODE_FILTER: i32 = 1;
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_mut_ptr(),
    };
    let nr = libc::SYS_seccomp;
    // SAFETY: the kernel copies the program during the call.
    super::check_long(unsafe { libc::syscall(nr, SET_MODE_FILTER, flags, &raw const program) })
}

/// Makes a call without arguments and returns its errno, 0 for none.
pub fn errno_of(call: i64) -> i32 {
    let result = super::call_plain(call, [0; 6]);
    result
        .err()
        .and_then(|error| error.raw_os_error())
        .unwrap_or(0)
}

/// Lives in strict mode: makes the call whose number each byte from `input` is, and answers with a byte,
/// until the input ends. Nothing but read and write is used, so this never returns.
pub fn live_strictly(input: i32, output: i32) -> io::Result<()> {
    super::prctl(libc::PR_SET_SECCOMP, 1)?;
    let mut byte = [0u8; 1];
    // SAFETY: descriptors and one byte of this stack; exit ends the thread without libc.
    unsafe {
        while libc::read(input, byte.as_mut_ptr().cast(), 1) == 1 {
            if byte[0] != 0 {
                libc::syscall(i64::from(byte[0]));
            }
            libc::write(output, byte.as_ptr().cast(), 1);
        }
        libc::syscall(libc::SYS_exit, 0);
    }
    Ok(())
}
