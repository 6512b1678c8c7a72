//! The disk over the NBD protocol on a Unix socket: for programs such as `qemu-img` and `nbdinfo`, and
//! for the kernel's own client, which makes a block device of it.

mod abi;
mod handshake;
mod kernel;
mod netlink;
mod transmit;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Export, View};
use transmit::Connection;

pub use kernel::{NbdDevice, index_of, resize, start};

/// Connections at once.
const MAX_CONNECTIONS: usize = 32;

/// A socket that is served until this is dropped; its connections end with it.
#[derive(Debug)]
pub struct Listening {
    socket: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    is_over: AtomicBool,
    connections: Mutex<Vec<UnixStream>>,
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<UnixStream>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves a disk on a new socket.
///
/// # Errors
/// The socket can't be made, for instance because its name is taken.
pub fn listen(export: Arc<Export>, socket: &Path, writable: bool) -> io::Result<Listening> {
    let listener = UnixListener::bind(socket)?;
    let shared = Arc::new(Shared {
        is_over: AtomicBool::new(false),
        connections: Mutex::new(Vec::new()),
    });
    let listening = Listening {
        socket: socket.to_owned(),
        shared: Arc::clone(&shared),
    };
    std::thread::Builder::new()
        .name("nbd".to_owned())
        .spawn(move || accept(&listener, &export, writable, &shared))?;
    Ok(listening)
}

fn accept(listener: &UnixListener, export: &Arc<Export>, writable: bool, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.is_over.load(Ordering::Acquire) {
            return;
        }
        let Ok(stream) = stream else { return };
        let Ok(copy) = stream.try_clone() else {
            continue;
        };
        let number = {
            let mut connections = shared.connections();
            if connections.len() >= MAX_CONNECTIONS {
                continue;
            }
            connections.push(copy);
            std::os::fd::AsRawFd::as_raw_fd(&connections[connections.len() - 1])
        };
        let export = Arc::clone(export);
        let shared = Arc::clone(shared);
        std::thread::spawn(move || {
            if let Err(error) = serve(export, stream, writable) {
                eprintln!("nbd: {error}");
            }
            let is_other = |one: &UnixStream| std::os::fd::AsRawFd::as_raw_fd(one) != number;
            shared.connections().retain(is_other);
        });
    }
}

/// Serves one client from the handshake to its end.
///
/// # Errors
/// The client broke the protocol or the connection.
pub fn serve(export: Arc<Export>, mut stream: UnixStream, writable: bool) -> io::Result<()> {
    let writable = writable && export.is_writable();
    match handshake::agree(&mut stream, &export, writable)? {
        Some(agreed) => Connection::new(stream, export, View::WHOLE, writable, agreed).run(&|_| ()),
        None => Ok(()),
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        // Wakes the thread that accepts, which then sees that it is over.
        let _ = UnixStream::connect(&self.socket);
        let _ = std::fs::remove_file(&self.socket);
        for stream in self.shared.connections().iter() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}
