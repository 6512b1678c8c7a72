//! Whether somebody still uses a block device. The driver does not tell (before Linux 7.0), so it is
//! looked for in all places where a use shows.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use crate::device::users;

/// How long a change of the mounts is waited for; other namespaces' are not told.
const MOUNTED_PAUSE: Duration = Duration::from_secs(1);
/// Pause between two looks at a device that is open and not mounted.
const OPEN_PAUSE: Duration = Duration::from_millis(100);

/// Where a use was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// A file system is mounted from it, or something else has it for itself.
    Claimed,
    /// A process or a loop device has it open.
    Open,
}

/// Returns when nobody uses a device any more; `left` ends when its maker does not hold it.
pub(super) fn wait_for_end(device: &Path, left: &Receiver<()>) {
    // Nothing is ever sent: it ends with the other side.
    let _ = left.recv();
    let mounts = File::open("/proc/self/mountinfo");
    loop {
        match use_of(device) {
            Ok(Some(Use::Claimed)) => wait_for_change(mounts.as_ref().ok()),
            Ok(Some(Use::Open)) => std::thread::sleep(OPEN_PAUSE),
            Ok(None) => return,
            Err(error) => {
                eprintln!("{}: {error}", device.display());
                std::thread::sleep(MOUNTED_PAUSE);
            }
        }
    }
}

/// Waits for a change of the mounts, a while at most.
///
/// Source: man 5 proc_pid_mounts, POLLPRI
fn wait_for_change(mounts: Option<&File>) {
    let Some(mounts) = mounts else {
        return std::thread::sleep(MOUNTED_PAUSE);
    };
    let mut fds = [PollFd::new(mounts, PollFlags::PRI)];
    let timeout = rustix::time::Timespec::try_from(MOUNTED_PAUSE).ok();
    // Whatever comes of it, the device is looked at again.
    let _ = rustix::event::poll(&mut fds, timeout.as_ref());
}

fn use_of(device: &Path) -> io::Result<Option<Use>> {
    let number = match std::fs::metadata(device) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?.rdev(),
    };
    // On a block device O_EXCL asks for it alone, which a mount has it.
    let exclusive = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap_or(0);
    match OpenOptions::new()
        .read(true)
        .custom_flags(exclusive)
        .open(device)
    {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Ok(Some(Use::Claimed)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        other => drop(other?),
    }
    let is_open = users::is_open(number)? || has_loop_device(device);
    Ok(is_open.then_some(Use::Open))
}

/// Whether a loop device lies on a block device.
fn has_loop_device(device: &Path) -> bool {
    let Ok(devices) = std::fs::read_dir("/sys/block") else {
        return false;
    };
    devices.flatten().any(|entry| {
        let file = std::fs::read(entry.path().join("loop/backing_file"));
        file.is_ok_and(|path| path.trim_ascii_end() == device.as_os_str().as_encoded_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_has_no_user() {
        let none = Path::new("/dev/ublkb4711");
        assert_eq!(use_of(none).unwrap(), None);
        let (held, left) = std::sync::mpsc::channel();
        drop(held);
        wait_for_end(none, &left);
    }

    #[test]
    fn no_loop_device_lies_on_what_is_not_there() {
        assert!(!has_loop_device(Path::new("/dev/ublkb4711")));
    }
}
