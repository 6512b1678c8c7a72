//! The FUSE file and the loop device on it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use super::Connection;
use crate::device::loopdev::{LoopDevice, LoopOptions};
use crate::device::{AttachOptions, Attached, Channel, Device, Lent};

/// A FUSE mount that is held until a loop device lies on its file.
#[derive(Debug)]
pub struct FuseLoop {
    channel: OwnedFd,
    resends: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    mount: Option<OwnedFd>,
    had_worker: bool,
}

impl FuseLoop {
    /// Mounts.
    ///
    /// # Errors
    /// There is no /dev/fuse, no permission to mount, or a kernel before 5.2.
    pub fn begin() -> io::Result<FuseLoop> {
        let connection = Connection::establish()?;
        Ok(FuseLoop {
            channel: connection.channel,
            resends: connection.agreement.resends,
            state: Mutex::new(State {
                mount: Some(connection.mount),
                had_worker: false,
            }),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for FuseLoop {
    fn name(&self) -> &'static str {
        "fuse+loop"
    }

    fn lend(&self) -> io::Result<Lent> {
        let channel = self.channel.try_clone()?;
        let again = std::mem::replace(&mut self.lock().had_worker, true);
        let named = Channel::Fuse {
            fd: channel.as_raw_fd(),
            resend: again && self.resends,
        };
        Ok(Lent::Channel(named, vec![channel]))
    }

    fn attach(&self, how: &AttachOptions<'_>) -> io::Result<Attached> {
        let mount = self.lock().mount.take();
        let mount = mount.ok_or_else(|| io::Error::other("it is attached already"))?;
        let file = Connection::open_file(&mount, !how.read_only)?;
        // The loop device keeps the file open, and that the mount.
        drop(mount);
        let options = LoopOptions {
            offset: how.view.offset,
            len_bytes: how.view.limit.unwrap_or(0),
            read_only: how.read_only,
            direct_io: true,
            label: how.label,
        };
        let device = LoopDevice::attach(&file, &options)?;
        Ok(Attached {
            path: device.path().to_owned(),
            held: device.into_file().into(),
        })
    }
}
