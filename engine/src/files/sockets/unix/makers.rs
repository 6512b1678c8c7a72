//! Calls that the kernel notes the caller of, as credentials of the peer: they are made by stand-ins with the
//! pids and users of the dump.

use std::os::fd::{AsFd, OwnedFd};

use firn_proto::UnixSkEntry;
use firn_sys::socket::{self, Credentials};
use firn_sys::{Result as SysResult, stand_in};

use super::names::shown;
use super::restore::{Outcome, kind_of};
use crate::files::error::FileRestoreError;

/// Makes a pair in the name of who is noted with it.
pub(super) fn make_pair(
    who: Option<Credentials>,
    entry: &UnixSkEntry,
) -> Outcome<(OwnedFd, OwnedFd)> {
    let pair = in_the_name_of(
        who,
        |who| stand_in::pair(who, kind_of(entry)),
        || socket::pair(kind_of(entry)),
    );
    pair.map_err(FileRestoreError::refused("make", shown(entry)))
}

/// As listen(2), in the name of who is noted with the socket.
pub(super) fn listen(
    fd: impl AsFd,
    who: Option<Credentials>,
    backlog: u32,
    entry: &UnixSkEntry,
) -> Outcome<()> {
    let fd = fd.as_fd();
    let listening = in_the_name_of(
        who,
        |who| stand_in::listen(who, fd, backlog),
        || socket::listen(fd, backlog),
    );
    listening.map_err(FileRestoreError::refused("listen with", shown(entry)))
}

/// As connect(2), in the name of who is noted with the socket.
pub(super) fn connect(fd: impl AsFd, who: Option<Credentials>, address: &[u8]) -> SysResult<()> {
    let fd = fd.as_fd();
    in_the_name_of(
        who,
        |who| stand_in::connect(who, fd, address),
        || socket::connect(fd, address),
    )
}

/// Does something as somebody else, or as this process where that can't be: the pid may be taken by a
/// process outside, which then is not to be impersonated, and the user may not be allowed to.
fn in_the_name_of<T>(
    who: Option<Credentials>,
    as_other: impl FnOnce(Credentials) -> SysResult<T>,
    as_self: impl FnOnce() -> SysResult<T>,
) -> SysResult<T> {
    let Some(who) = who else {
        return as_self();
    };
    as_other(who).or_else(|errno| {
        tracing::info!(
            pid = who.pid,
            "no stand-in for the maker of a socket: {errno}"
        );
        as_self()
    })
}
