//! Names that a tree still has which was killed a moment ago: the kernel ends its io_uring requests in flight on its
//! own time, and until then they hold the sockets that they wait for.

use std::time::{Duration, Instant};

use firn_sys::{Errno, Result};

/// The kernel needs some milliseconds. Somebody else's socket is still there afterwards.
const PATIENCE: Duration = Duration::from_secs(2);
const BETWEEN_TRIES: Duration = Duration::from_millis(5);

/// Does what needs a name or an address, once more for as long as that may be such a one.
pub(super) fn outlast(act: impl Fn() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        match act() {
            Err(Errno::EADDRINUSE | Errno::EADDRNOTAVAIL) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(BETWEEN_TRIES);
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_taken_for_a_moment_is_tried_again() {
        let tries = Cell::new(0);
        let taken_twice = || {
            tries.set(tries.get() + 1);
            if tries.get() > 2 {
                Ok(())
            } else {
                Err(Errno::EADDRINUSE)
            }
        };
        assert_eq!(outlast(taken_twice), Ok(()));
        assert_eq!(tries.get(), 3);
        assert_eq!(outlast(|| Err(Errno::EINVAL)), Err(Errno::EINVAL));
    }
}
