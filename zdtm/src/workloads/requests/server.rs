//! A little server with nothing but io_uring: connections are accepted again and again, each has a reception in
//! flight, and what comes is sent back.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use anyhow::{Context, Result, ensure};

use super::ring::SEEN;
use crate::sys::{self, PAGE, Region, Request, Ring};
use crate::{Stage, Workload};

pub static ECHO: Workload = Workload::new(
    "requests/uring-server",
    "a server that waits in its ring, for connections by TCP and unix sockets and for what they send",
    echo,
)
.needs(SEEN)
// Its wait ends with EINTR, as after any stop, and the next one has nothing to submit.
.moves(&["syscall"])
.dump_options(&["--tcp-established"])
.restore_options(&["--tcp-established"]);

/// Values of the accepts; those of connections are their descriptors.
const ACCEPTS: [u64; 2] = [1000, 1001];
/// Added for sending.
const SENDING: u64 = 1 << 32;
const ROOM: usize = 64;
/// What ends the server.
const END: &[u8] = b"end";

struct Server {
    ring: Ring,
    memory: Region,
    connections: HashMap<RawFd, OwnedFd>,
}

impl Server {
    /// Serves until somebody sends the word that ends it; tells of the first wait.
    fn run(&mut self, listeners: [RawFd; 2]) -> Result<()> {
        for (fd, value) in listeners.into_iter().zip(ACCEPTS) {
            self.ring.put(&Request {
                opcode: sys::ACCEPT,
                fd,
                ioprio: sys::ACCEPT_MULTI,
                value,
                ..Request::default()
            });
        }
        loop {
            match self.ring.submit(1) {
                Err(error) if error.raw_os_error() != Some(libc::EINTR) => {
                    return Err(error).context("waiting");
                }
                _ => {}
            }
            for (value, result) in self.ring.take() {
                ensure!(result >= 0, "result {result} of {value:#x}");
                if self.serve(value, result)? {
                    return Ok(());
                }
            }
        }
    }

    fn serve(&mut self, value: u64, result: i32) -> Result<bool> {
        if ACCEPTS.contains(&value) {
            // SAFETY: the kernel has just made it for this process, which has it nowhere else.
            let connection = unsafe { OwnedFd::from_raw_fd(result) };
            self.connections.insert(result, connection);
            self.transfer(sys::RECV, result, ROOM)?;
            return Ok(false);
        }
        let fd = RawFd::try_from(value & (SENDING - 1))?;
        if value & SENDING != 0 {
            self.transfer(sys::RECV, fd, ROOM)?;
            return Ok(false);
        }
        let len = usize::try_from(result)?;
        let text = self.memory.get(self.place(fd)?, len);
        match len {
            0 => drop(self.connections.remove(&fd)),
            _ => self.transfer(sys::SEND, fd, len)?,
        }
        Ok(text == END)
    }

    fn place(&self, fd: RawFd) -> Result<usize> {
        let place = ROOM * usize::try_from(fd)?;
        ensure!(place + ROOM <= PAGE, "so many connections");
        Ok(place)
    }

    fn transfer(&mut self, opcode: u8, fd: RawFd, len: usize) -> Result<()> {
        let sending = if opcode == sys::SEND { SENDING } else { 0 };
        self.ring.put(&Request {
            opcode,
            fd,
            addr: self.memory.addr + self.place(fd)?,
            len: u32::try_from(len)?,
            value: u64::try_from(fd)? | sending,
            ..Request::default()
        });
        Ok(())
    }
}

/// A connection to the server.
trait Client: Read + Write {}
impl<T: Read + Write> Client for T {}

fn expect_echo(client: &mut dyn Client, text: &[u8]) -> Result<()> {
    client.write_all(text).context("sending")?;
    let mut found = vec![0; text.len()];
    client.read_exact(&mut found).context("receiving")?;
    ensure!(found == text, "{found:?} instead of {text:?}");
    Ok(())
}

fn echo(stage: &Stage) -> Result<()> {
    let path = stage.path("listener");
    let unix = UnixListener::bind(&path)?;
    let inet = TcpListener::bind("127.0.0.1:0")?;
    let address = inet.local_addr()?;
    let listeners = [unix.as_raw_fd(), inet.as_raw_fd()];
    std::thread::scope(|scope| {
        let server = scope.spawn(move || {
            // A ring of one thread, as servers have it.
            let flags = sys::SINGLE_ISSUER | sys::DEFER_TASKRUN;
            let mut server = Server {
                ring: Ring::new(8, None, flags)?,
                memory: Region::anon(PAGE)?,
                connections: HashMap::new(),
            };
            server.run(listeners)
        });
        let connect = || -> Result<[Box<dyn Client>; 2]> {
            let by_path = UnixStream::connect(&path)?;
            Ok([Box::new(by_path), Box::new(TcpStream::connect(address)?)])
        };
        let play = || -> Result<()> {
            let mut old = [connect()?, connect()?];
            let all = |clients: &mut [[Box<dyn Client>; 2]], text: &[u8]| {
                let mut clients = clients.iter_mut().flatten();
                clients.try_for_each(|client| expect_echo(client.as_mut(), text))
            };
            all(&mut old, b"before").context("before the dump")?;
            stage.ready_and_wait()?;
            all(&mut old, b"after").context("by an old connection")?;
            let mut new = [connect()?];
            all(&mut new, b"new").context("by a new connection")?;
            all(&mut old, b"and again").context("by an old connection, again")
        };
        let played = play();
        let mut last = UnixStream::connect(&path)?;
        last.write_all(END)?;
        let served = server.join().expect("it does not panic");
        played.and(served)
    })
}
