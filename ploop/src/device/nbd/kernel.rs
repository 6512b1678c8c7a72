//! A block device of the kernel's own NBD client.
//!
//! One connection, which any number of threads serve. When the worker dies its end is closed with it, and
//! the kernel has new requests wait for the next connection; those that were sent and not answered it sends
//! once more when they are [`RETRY_SECONDS`] old. A request that takes as long makes the kernel give the
//! connection up, too: the worker then ends, and the next one begins only when nothing of the last one is
//! under way any more, so that no old write can follow a newer one.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::netlink::{Client, NewDevice};
use super::transmit::{Connection, End};
use super::{abi, handshake};
use crate::device::{
    AttachOptions, Attached, Channel, Device, Ended, Export, Lent, View, open_node,
};

/// Seconds after which the kernel sends an unanswered request once more.
const RETRY_SECONDS: u64 = 15;
/// Seconds for which requests wait for a server; then they fail.
const WAIT_SECONDS: u64 = 24 * 3600;
/// How long the kernel may take to see that a connection has died, or a node to appear.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(2);

/// The kernel's client and the device that it makes.
#[derive(Debug)]
pub struct NbdDevice {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    client: Client,
    /// The device, once it is connected.
    index: Option<u32>,
    /// The kernel's end of the connection that is to become a device.
    waiting: Option<UnixStream>,
}

impl NbdDevice {
    /// Looks for the kernel's client.
    ///
    /// # Errors
    /// The kernel has none, its module is not loaded, or this is not the first network namespace.
    pub fn begin() -> io::Result<NbdDevice> {
        let state = State {
            client: Client::find()?,
            index: None,
            waiting: None,
        };
        Ok(NbdDevice {
            state: Mutex::new(state),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect(&self, how: &AttachOptions<'_>) -> io::Result<u32> {
        let mut state = self.lock();
        let socket = state.waiting.take();
        let socket = socket.ok_or_else(|| io::Error::other("it is attached already"))?;
        let device = NewDevice {
            size_bytes: how.view.len_bytes(how.disk_bytes),
            flags: handshake::export_flags(!how.read_only),
            retry_seconds: RETRY_SECONDS,
            wait_seconds: WAIT_SECONDS,
        };
        let connected = state.client.connect(&device, socket.as_fd());
        match connected {
            Ok(index) => state.index = Some(index),
            // So the worker hears that there will be no user; it may be gone itself.
            Err(_) => drop((&socket).write_all(&abi::disconnect_request())),
        }
        connected
    }
}

impl Device for NbdDevice {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn lend(&self) -> io::Result<Lent> {
        let mut state = self.lock();
        let ours = match state.index {
            None => {
                let (kernels, ours) = UnixStream::pair()?;
                state.waiting = Some(kernels);
                ours
            }
            Some(index) => match reconnect(&mut state.client, index) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    return Ok(Lent::Released);
                }
                connected => connected?,
            },
        };
        let channel = Channel::Nbd {
            fd: ours.as_raw_fd(),
        };
        Ok(Lent::Channel(channel, vec![ours.into()]))
    }

    fn attach(&self, how: &AttachOptions<'_>) -> io::Result<Attached> {
        let index = self.connect(how)?;
        let path = PathBuf::from(format!("/dev/nbd{index}"));
        // Only when it is open here: others look at every new device, and close it again.
        let held = open_node(&path, !how.read_only, PATIENCE).and_then(|held| {
            self.lock().client.disconnect_on_close(index)?;
            Ok(held)
        });
        if held.is_err() {
            // The cause is what opening said.
            let _ = self.lock().client.disconnect(index);
        }
        Ok(Attached {
            path,
            held: held?.into(),
        })
    }
}

/// Makes a new connection, the kernel's end of which takes the place of the dead one; gives ours.
fn reconnect(client: &mut Client, index: u32) -> io::Result<UnixStream> {
    let begun = Instant::now();
    loop {
        let (kernels, ours) = UnixStream::pair()?;
        client.reconnect(index, kernels.as_fd())?;
        drop(kernels);
        if !is_hung_up(&ours)? {
            return Ok(ours);
        }
        // The kernel has not yet seen that the last connection is dead.
        if begun.elapsed() > PATIENCE {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(PAUSE);
    }
}

fn is_hung_up(stream: &UnixStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let now = rustix::time::Timespec::default();
    rustix::event::poll(&mut fds, Some(&now))?;
    Ok(fds[0].revents().contains(PollFlags::HUP))
}

/// Starts the threads that answer the kernel.
///
/// # Errors
/// No thread.
pub fn start(
    connection: UnixStream,
    export: &Arc<Export>,
    view: View,
    threads: usize,
    ended: &Sender<Ended>,
) -> io::Result<()> {
    let agreed = handshake::Agreed::default();
    let writable = export.is_writable();
    let connection = Connection::new(connection, Arc::clone(export), view, writable, agreed);
    let connection = Arc::new(connection);
    for number in 0..threads.max(2) {
        let connection = Arc::clone(&connection);
        let ended = ended.clone();
        std::thread::Builder::new()
            .name(format!("disk{number}"))
            .spawn(move || serve(&connection, &ended))?;
    }
    Ok(())
}

fn serve(connection: &Connection, ended: &Sender<Ended>) {
    let tell = |cause| {
        // The receiver leaves when the first cause has come.
        let _ = ended.send(cause);
    };
    let served = connection.run(&|end| {
        tell(match end {
            End::Disconnected => Ended::Released,
            End::Lost => Ended::Failed,
        });
    });
    if let Err(error) = served {
        eprintln!("nbd: {error}");
        tell(Ended::Failed);
    }
}

/// The index of a device of the kernel's client, by its node.
pub fn index_of(device: &Path) -> Option<u32> {
    let name = device.file_name()?.to_str()?;
    name.strip_prefix("nbd")?.parse().ok()
}

/// Gives a connected device another size.
///
/// # Errors
/// The kernel has no client, or the device is connected no more.
pub fn resize(index: u32, size_bytes: u64) -> io::Result<()> {
    Client::find()?.resize(index, size_bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::guest::Partition;
    use crate::{Access, ChainDisk, HostFile, RawImage};

    const SIZE: u64 = 4 << 20;

    fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut bytes = abi::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }

    /// Cookie and error of an answer.
    fn answer(kernel: &mut UnixStream) -> (u64, u32) {
        let mut head = [0; 16];
        kernel.read_exact(&mut head).unwrap();
        assert_eq!(head[..4], abi::SIMPLE_REPLY_MAGIC.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        (u64::from_be_bytes(head[8..].try_into().unwrap()), error)
    }

    /// A disk served to what plays the kernel: a partition that begins at 1 MiB.
    fn served(dir: &Path) -> (UnixStream, Arc<Export>, Receiver<Ended>) {
        let file = HostFile::create(&dir.join("disk")).unwrap();
        file.file().set_len(SIZE).unwrap();
        let image = RawImage::open(Box::new(file), Access::ReadWrite, 1 << 16).unwrap();
        let disk = ChainDisk::new(vec![Arc::new(image)]).unwrap();
        let export = Arc::new(Export::new(Arc::new(disk)));
        let partition = Partition {
            offset: 1 << 20,
            len_bytes: 2 << 20,
        };
        let view = View::of(&partition, SIZE);
        let (kernel, ours) = UnixStream::pair().unwrap();
        let (ended, end) = channel();
        start(ours, &export, view, 3, &ended).unwrap();
        (kernel, export, end)
    }

    #[test]
    fn the_kernels_requests_are_answered_by_several_threads() {
        let dir = tempfile::tempdir().unwrap();
        let (mut kernel, export, end) = served(dir.path());
        // Many in flight, answered in any order.
        for number in 0..64u8 {
            let offset = u64::from(number) * 4096;
            let flags = u16::from(number % 8 == 0) * abi::FLAG_FUA;
            let mut write = request(abi::command::WRITE, flags, number.into(), offset, 4096);
            write.extend([number; 4096]);
            kernel.write_all(&write).unwrap();
        }
        let mut cookies: Vec<u64> = (0..64).map(|_| answer(&mut kernel).0).collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..64).collect::<Vec<u64>>());
        let mut there = vec![0; 64 * 4096];
        export.read(&mut there, 1 << 20).unwrap();
        for (number, block) in there.chunks(4096).enumerate() {
            assert!(block.iter().all(|byte| usize::from(*byte) == number));
        }
        let read = request(abi::command::READ, 0, 77, 5 * 4096, 512);
        kernel.write_all(&read).unwrap();
        assert_eq!(answer(&mut kernel), (77, 0));
        let mut data = [0; 512];
        kernel.read_exact(&mut data).unwrap();
        assert_eq!(data, [5; 512]);
        // The partition ends at 2 MiB, whatever the disk has behind it.
        let beyond = request(abi::command::TRIM, 0, 78, (2 << 20) - 512, 1024);
        kernel.write_all(&beyond).unwrap();
        assert_eq!(answer(&mut kernel), (78, 28));
        kernel.write_all(&abi::disconnect_request()).unwrap();
        assert_eq!(end.recv(), Ok(Ended::Released));
        assert!(end.recv().is_err());
    }

    #[test]
    fn a_connection_that_breaks_is_no_farewell() {
        let dir = tempfile::tempdir().unwrap();
        let (mut kernel, _export, end) = served(dir.path());
        let cut = request(abi::command::WRITE, 0, 1, 0, 4096);
        kernel.write_all(&cut).unwrap();
        drop(kernel);
        assert_eq!(end.recv(), Ok(Ended::Failed));
    }

    #[test]
    fn a_socket_that_nobody_took_is_seen() {
        let (kernels, ours) = UnixStream::pair().unwrap();
        assert!(!is_hung_up(&ours).unwrap());
        drop(kernels);
        assert!(is_hung_up(&ours).unwrap());
    }

    #[test]
    fn devices_are_told_by_their_nodes() {
        assert_eq!(index_of(Path::new("/dev/nbd12")), Some(12));
        assert_eq!(index_of(Path::new("/dev/nbd1p2")), None);
        assert_eq!(index_of(Path::new("/dev/loop3")), None);
    }
}
