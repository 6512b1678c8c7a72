//! A block device of the kernel's ublk driver.
//!
//! The supervisor makes the device and takes it away; a worker opens its channel and asks for requests.
//! When the worker dies the driver keeps all requests, and hands those that were not answered to the next
//! one. A device whose worker dies before it is made has nothing to keep: it is given up. Other than a loop
//! device's, its end has to be asked for: when nobody has it mounted or open any more the supervisor stops it.

mod abi;
mod ring;
mod serve;
mod users;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use abi::{control, feature};
use ring::Control;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags};

pub use serve::start;

use super::{AttachOptions, Attached, Channel, Device, Held, Lent, open_node};

/// How long a server's end or a new node may take.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(2);

/// Without these a device is none that outlives its server.
const NEEDED: u64 =
    feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE | feature::CMD_IOCTL_ENCODE;

/// A device of the driver's. It is taken away with this value.
pub struct UblkDevice {
    shared: Arc<Shared>,
}

struct Shared {
    control: Mutex<Control>,
    number: u32,
    /// A device that runs can get another size.
    grows: bool,
    worker: Mutex<Option<Worker>>,
    /// It is a block device.
    is_started: AtomicBool,
    /// It is none any more.
    is_over: AtomicBool,
}

/// The last worker.
struct Worker {
    number: u32,
    process: OwnedFd,
}

impl Worker {
    fn lives(&self) -> bool {
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        let now = rustix::time::Timespec::default();
        matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(0))
    }
}

impl UblkDevice {
    /// Adds a device. With `grows` only where it can be given another size while it runs (Linux 6.16).
    ///
    /// # Errors
    /// There is no driver, or it can't do what is needed.
    pub fn begin(grows: bool) -> io::Result<UblkDevice> {
        let mut driver = Control::open()?;
        let mut features = [0; 8];
        driver.command(control::GET_FEATURES, u32::MAX, 0, &mut features)?;
        let features = u64::from_ne_bytes(features);
        let wanted = NEEDED | if grows { feature::UPDATE_SIZE } else { 0 };
        if features & wanted != wanted {
            let message = format!("the driver lacks features (it has {features:#x})");
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
        let grows = features & feature::UPDATE_SIZE;
        let mut device = abi::device(
            NEEDED | grows,
            rustix::process::getpid().as_raw_nonzero().get(),
        );
        driver.command(control::ADD, u32::MAX, 0, &mut device)?;
        let (number, _) = abi::described(&device);
        Ok(UblkDevice {
            shared: Arc::new(Shared {
                control: Mutex::new(driver),
                number,
                grows: grows != 0,
                worker: Mutex::new(None),
                is_started: AtomicBool::new(false),
                is_over: AtomicBool::new(false),
            }),
        })
    }
}

impl Shared {
    fn command(&self, command: u32, value: u64, shared: &mut [u8]) -> io::Result<()> {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        control.command(command, self.number, value, shared)
    }

    fn lock_worker(&self) -> std::sync::MutexGuard<'_, Option<Worker>> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self, how: &AttachOptions<'_>) -> io::Result<(Attached, Receiver<()>)> {
        let mut parameters =
            abi::parameters(how.view, how.disk_bytes, how.unit_bytes, how.read_only);
        self.command(control::SET_PARAMETERS, 0, &mut parameters)?;
        self.start()?;
        let path = PathBuf::from(format!("/dev/ublkb{}", self.number));
        let (told, left) = channel();
        let file = open_node(&path, !how.read_only, PATIENCE)?;
        let held = Held {
            file,
            told: Some(told),
        };
        Ok((Attached { path, held }, left))
    }

    /// Makes it a block device. The driver waits for a worker that has died, and takes a device whose worker
    /// has died for one that runs: both end here.
    fn start(&self) -> io::Result<()> {
        let died = || io::Error::other("the server died while the device was made");
        let worker = self.lock_worker().as_ref().map(|worker| worker.number);
        let worker = worker.ok_or_else(died)?;
        let is_over = || self.is_over.load(Ordering::Acquire);
        Control::open()?.command_unless(control::START, self.number, worker.into(), is_over)?;
        // Under the lock, so that the next worker finds the device either made or given up.
        let held = self.lock_worker();
        let lives = held
            .as_ref()
            .is_some_and(|now| now.number == worker && now.lives());
        if is_over() || !lives {
            return Err(died());
        }
        self.is_started.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether a device can have its next worker; one that was not made when its worker died is given up.
    fn takes_a_worker(&self) -> io::Result<bool> {
        let first = {
            let worker = self.lock_worker();
            if !self.is_started.load(Ordering::Acquire) && worker.is_some() {
                self.is_over.store(true, Ordering::Release);
            }
            worker.is_none()
        };
        match first {
            true => Ok(true),
            false => self.recover(),
        }
    }

    /// Makes an end of the device; the worker hears of it.
    fn stop(&self) {
        self.is_over.store(true, Ordering::Release);
        if let Err(error) = self.command(control::STOP, 0, &mut []) {
            eprintln!("ublk: {error}");
        }
    }

    /// Lets the next server come; false where the device is none any more.
    fn recover(&self) -> io::Result<bool> {
        let begun = Instant::now();
        loop {
            if self.is_over.load(Ordering::Acquire) {
                return Ok(false);
            }
            match self.command(control::START_RECOVERY, 0, &mut []) {
                // The driver has not yet seen the last one's end.
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy
                        && begun.elapsed() < PATIENCE =>
                {
                    std::thread::sleep(PAUSE);
                }
                other => return other.map(|()| true),
            }
        }
    }
}

impl Device for UblkDevice {
    fn name(&self) -> &'static str {
        "ublk"
    }

    fn lend(&self) -> io::Result<Lent> {
        if !self.shared.takes_a_worker()? {
            return Ok(Lent::Released);
        }
        let channel = Channel::Ublk {
            device: self.shared.number,
            grows: self.shared.grows,
        };
        Ok(Lent::Channel(channel, Vec::new()))
    }

    fn lent(&self, worker: u32) {
        let pid = i32::try_from(worker).ok().and_then(Pid::from_raw);
        let process = pid.and_then(|pid| {
            // Nobody has waited for it yet: it is the one meant, alive or not.
            rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
        });
        *self.shared.lock_worker() = process.map(|process| Worker {
            number: worker,
            process,
        });
        if !self.shared.is_started.load(Ordering::Acquire) {
            return;
        }
        let number = self.shared.number;
        // Ends when the worker has asked for requests.
        std::thread::spawn(move || {
            let ended = Control::open().and_then(|mut driver| {
                driver.command(control::END_RECOVERY, number, worker.into(), &mut [])
            });
            if let Err(error) = ended {
                eprintln!("ublk: the device did not recover: {error}");
            }
        });
    }

    fn attach(&self, how: &AttachOptions<'_>) -> io::Result<Attached> {
        match self.shared.make(how) {
            Ok((attached, left)) => {
                let shared = Arc::clone(&self.shared);
                let path = attached.path.clone();
                std::thread::spawn(move || {
                    users::wait_for_end(&path, &left);
                    shared.stop();
                });
                Ok(attached)
            }
            Err(error) => {
                self.shared.stop();
                Err(error)
            }
        }
    }
}

impl Drop for UblkDevice {
    fn drop(&mut self) {
        // A device whose server has closed its image has no user any more.
        self.shared.stop();
        if let Err(error) = self.shared.command(control::DELETE, 0, &mut []) {
            eprintln!("ublk: {error}");
        }
    }
}

/// The number of a device of the driver's, by its node.
pub fn number_of(device: &Path) -> Option<u32> {
    let name = device.file_name()?.to_str()?;
    name.strip_prefix("ublkb")?.parse().ok()
}

/// Gives a device that runs another size.
///
/// # Errors
/// The driver is older than Linux 6.16.
pub fn resize(number: u32, size_bytes: u64) -> io::Result<()> {
    Control::open()?.command(
        control::UPDATE_SIZE,
        number,
        size_bytes / abi::SECTOR,
        &mut [],
    )
}
