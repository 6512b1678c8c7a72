//! The kernel's own NBD client, and how it is told what to do: the family `nbd` of generic netlink.
//!
//! A message has, behind the netlink header, the command (1 byte), the version (1), two bytes of zero and
//! attributes. Numbers are in the machine's byte order.
//!
//! | attribute | number | value |
//! |---|---:|---|
//! | index of the device; none asks for a free one | 1 | u32 |
//! | size in bytes | 2 | u64 |
//! | logical block in bytes | 3 | u64 |
//! | seconds after which a request is sent again | 4 | u64 |
//! | flags of the export, as in the handshake | 5 | u64 |
//! | flags of the client | 6 | u64 |
//! | sockets: items (1), each with a descriptor (1, u32) | 7 | nested |
//! | seconds for which requests wait for a connection | 8 | u64 |
//!
//! Source: linux include/uapi/linux/nbd-netlink.h (linux 4.12), genetlink.h

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use firn_sys::netlink::{ACK, Attributes, GENERIC, Netlink, REQUEST, Request};

const FAMILY: &str = "nbd";
const VERSION: u8 = 1;

/// The family of families, and what it is asked for.
const CONTROL: u16 = 16;
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_FAMILY_ID: u16 = 1;
const CONTROL_FAMILY_NAME: u16 = 2;

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;

const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

/// The device is disconnected when its last user closes it.
const CLIENT_DISCONNECT_ON_CLOSE: u64 = 1 << 1;

/// Bytes of the generic header before the attributes.
const HEADER: usize = 4;

/// What a new device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NewDevice {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Flags of the export.
    pub flags: u16,
    /// Seconds after which a request without an answer is sent again.
    pub retry_seconds: u64,
    /// Seconds for which requests wait when there is no connection.
    pub wait_seconds: u64,
}

/// A conversation with the kernel's client.
#[derive(Debug)]
pub(super) struct Client {
    netlink: Netlink,
    family: u16,
}

impl Client {
    /// Looks for the client.
    ///
    /// # Errors
    /// `NotFound` where the kernel has none, or its module is not loaded, or this is not the first network
    /// namespace.
    pub fn find() -> io::Result<Client> {
        let mut netlink = Netlink::open(GENERIC)?;
        let request = message(CONTROL, CONTROL_GET_FAMILY).text(CONTROL_FAMILY_NAME, FAMILY);
        let answer = match ask(&mut netlink, request, CONTROL_FAMILY_ID) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the kernel offers no client; it needs the module nbd and the first network namespace",
            )),
            other => other,
        }?;
        let family = answer.and_then(|value| Some(u16::from_ne_bytes(value.try_into().ok()?)));
        let family = family.ok_or_else(|| io::Error::other("the kernel names no family"))?;
        Ok(Client { netlink, family })
    }

    /// Makes a device of a connection on which the transmission begins at once; its index.
    ///
    /// # Errors
    /// Needs CAP_SYS_ADMIN.
    pub fn connect(&mut self, device: &NewDevice, socket: BorrowedFd<'_>) -> io::Result<u32> {
        let request = connect(self.family, device, socket.as_raw_fd());
        let answer = ask(&mut self.netlink, request, INDEX)?;
        let index = answer.and_then(|value| Some(u32::from_ne_bytes(value.try_into().ok()?)));
        index.ok_or_else(|| io::Error::other("the kernel names no device"))
    }

    /// Gives a device another connection in the place of a dead one. Where none is dead the kernel lets go
    /// of the socket and says nothing.
    ///
    /// # Errors
    /// `EINVAL`: the device is connected no more.
    pub fn reconnect(&mut self, index: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.tell(reconnect(self.family, index, socket.as_raw_fd()))
    }

    /// Has a device disconnected when its last user closes it.
    ///
    /// # Errors
    /// `EINVAL`: the device is connected no more.
    pub fn disconnect_on_close(&mut self, index: u32) -> io::Result<()> {
        let request = about(self.family, RECONFIGURE, index)
            .attribute(CLIENT_FLAGS, &CLIENT_DISCONNECT_ON_CLOSE.to_ne_bytes());
        self.tell(request)
    }

    /// Gives a device another size.
    ///
    /// # Errors
    /// `EINVAL`: the device is connected no more.
    pub fn resize(&mut self, index: u32, size_bytes: u64) -> io::Result<()> {
        let request =
            about(self.family, RECONFIGURE, index).attribute(SIZE_BYTES, &size_bytes.to_ne_bytes());
        self.tell(request)
    }

    /// Disconnects a device, whoever uses it.
    ///
    /// # Errors
    /// There is no such device.
    pub fn disconnect(&mut self, index: u32) -> io::Result<()> {
        self.tell(about(self.family, DISCONNECT, index))
    }

    fn tell(&mut self, request: Request) -> io::Result<()> {
        Ok(self.netlink.request(request)?)
    }
}

/// Sends a request; gives one attribute of the answer.
fn ask(netlink: &mut Netlink, request: Request, attribute: u16) -> io::Result<Option<Vec<u8>>> {
    let mut found = None;
    netlink.dump(request, |payload| {
        let attributes = Attributes(payload.get(HEADER..).unwrap_or_default());
        found = found.take().or_else(|| {
            let mut attributes = attributes;
            let value = attributes.find(|(kind, _)| *kind == attribute);
            value.map(|(_, value)| value.to_vec())
        });
    })?;
    Ok(found)
}

fn message(family: u16, command: u8) -> Request {
    Request::new(family, REQUEST | ACK, &[command, VERSION, 0, 0])
}

fn about(family: u16, command: u8, index: u32) -> Request {
    message(family, command).attribute(INDEX, &index.to_ne_bytes())
}

fn connect(family: u16, device: &NewDevice, socket: i32) -> Request {
    let request = message(family, CONNECT)
        .attribute(SIZE_BYTES, &device.size_bytes.to_ne_bytes())
        .attribute(BLOCK_SIZE_BYTES, &512u64.to_ne_bytes())
        .attribute(TIMEOUT, &device.retry_seconds.to_ne_bytes())
        .attribute(SERVER_FLAGS, &u64::from(device.flags).to_ne_bytes())
        .attribute(DEAD_CONN_TIMEOUT, &device.wait_seconds.to_ne_bytes());
    with_socket(request, socket)
}

fn reconnect(family: u16, index: u32, socket: i32) -> Request {
    with_socket(about(family, RECONFIGURE, index), socket)
}

fn with_socket(request: Request, socket: i32) -> Request {
    request.nested(SOCKETS, |items| {
        items.nested(SOCK_ITEM, |item| {
            item.attribute(SOCK_FD, &socket.to_ne_bytes())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attributes of a message, without its two headers.
    fn attributes(bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        Attributes(&bytes[16 + HEADER..])
            .map(|(kind, value)| (kind, value.to_vec()))
            .collect()
    }

    fn number(value: u64) -> Vec<u8> {
        value.to_ne_bytes().to_vec()
    }

    #[test]
    fn a_new_device_is_described_as_the_kernel_reads_it() {
        let device = NewDevice {
            size_bytes: 5 << 20,
            flags: 0x25,
            retry_seconds: 15,
            wait_seconds: 86400,
        };
        let bytes = connect(0x22, &device, 7).finish(3);
        // Length, family, REQUEST | ACK, number, port; command, version.
        assert_eq!(
            bytes[..4],
            u32::try_from(bytes.len()).unwrap().to_ne_bytes()
        );
        assert_eq!(bytes[4..6], 0x22u16.to_ne_bytes());
        assert_eq!(bytes[6..8], 5u16.to_ne_bytes());
        assert_eq!(bytes[8..20], [3, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0]);
        let socket = [12, 0, 1, 0x80, 8, 0, 1, 0, 7, 0, 0, 0].to_vec();
        let expected = vec![
            (2, number(5 << 20)),
            (3, number(512)),
            (4, number(15)),
            (5, number(0x25)),
            (8, number(86400)),
            (7, socket),
        ];
        assert_eq!(attributes(&bytes), expected);
    }

    #[test]
    fn another_connection_names_its_device() {
        let bytes = reconnect(0x22, 11, 9).finish(1);
        assert_eq!(bytes[16], 3);
        let socket = [12, 0, 1, 0x80, 8, 0, 1, 0, 9, 0, 0, 0].to_vec();
        assert_eq!(
            attributes(&bytes),
            vec![(1, vec![11, 0, 0, 0]), (7, socket)]
        );
    }
}
