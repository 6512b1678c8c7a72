//! What ends the making of unix sockets, when all files are open: queues, peers of datagram sockets,
//! shutdowns, options.

use std::cell::Cell;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};

use firn_proto::{FdTypes, UnixSkEntry};
use firn_sys::socket::{self, SO_PEEK_OFF, SOL_SOCKET, TCP_LISTEN};

use super::super::options;
use super::super::packets::PacketRestore;
use super::USK_EXTERN;
use super::fill::{Fill, Queues};
use super::makers::listen;
use super::names::{Reach, address_of, shown};
use super::restore::{Outcome, RestoredUnix, has_lost_peer, is_stream, peer_of};
use crate::files::OutsidePeer;
use crate::files::error::FileRestoreError;
use crate::files::open;
use crate::files::shelf::OpenedFiles;

impl RestoredUnix<'_> {
    /// Fills queues and sets what remains, when all files are open. Returns what is lost, in words.
    pub(in crate::files) fn finish(
        mut self,
        packets: &mut PacketRestore,
        opened: &OpenedFiles,
    ) -> Outcome<Option<String>> {
        let nameless = Cell::new(0);
        let mut ids: Vec<u32> = self.entries.keys().copied().collect();
        ids.sort_unstable();
        let mut queues = Queues {
            entries: &self.entries,
            by_ino: &self.by_ino,
            others: &self.others,
            bound: &self.bound,
            binder: &self.binder,
            opened,
            nameless: &nameless,
        };
        let mut after = Vec::new();
        for &id in &ids {
            let entry = self.entries[&id];
            let waiting = packets.take(id);
            match queues.fill(entry, waiting)? {
                Fill::Done => {}
                Fill::AfterConnect(waiting) => after.push((entry, waiting)),
            }
        }
        for entry in self.datagrams_in_order(&ids)? {
            self.connect_datagram(entry, opened)?;
        }
        let queues = Queues {
            entries: &self.entries,
            by_ino: &self.by_ino,
            others: &self.others,
            bound: &self.bound,
            binder: &self.binder,
            opened,
            nameless: &nameless,
        };
        for (entry, waiting) in after {
            queues.send_all(entry, &waiting)?;
        }
        drop(std::mem::take(&mut self.others));
        for &id in &ids {
            if let Some(fd) = opened.get(&(FdTypes::Unixsk, id))? {
                self.finish_one(self.entries[&id], fd.as_fd())?;
            }
        }
        Ok(match nameless.get() {
            0 => None,
            nr => Some(format!(
                "{nr} messages in unix sockets have lost their senders"
            )),
        })
    }

    /// Datagram sockets that have a peer, each after all those that are connected to it: a socket with a
    /// peer takes no other, but for that very one.
    fn datagrams_in_order(&self, ids: &[u32]) -> Outcome<Vec<&UnixSkEntry>> {
        let all = ids.iter().map(|id| self.entries[id]);
        let all = all.filter(|entry| !is_stream(entry) && entry.peer != 0);
        let all: Vec<&UnixSkEntry> = all.collect();
        // How many must be connected to a socket before it.
        let mut before: HashMap<u32, usize> = HashMap::new();
        let waits_for = |entry: &UnixSkEntry| {
            let peer = self.by_ino.get(&entry.peer)?;
            (peer.peer != entry.ino).then_some(*peer)
        };
        for peer in all.iter().filter_map(|entry| waits_for(entry)) {
            *before.entry(peer.id).or_default() += 1;
        }
        let is_first = |entry: &&UnixSkEntry| !before.contains_key(&entry.id);
        let mut order: Vec<&UnixSkEntry> = all.iter().copied().filter(is_first).collect();
        let mut at = 0;
        while let Some(peer) = order.get(at).map(|entry| waits_for(entry)) {
            at += 1;
            let Some(peer) = peer.filter(|peer| !is_stream(peer) && peer.peer != 0) else {
                continue;
            };
            let left = before.get_mut(&peer.id).expect("counted above");
            *left -= 1;
            if *left == 0 {
                order.push(peer);
            }
        }
        match all
            .iter()
            .find(|entry| before.get(&entry.id).is_some_and(|left| *left != 0))
        {
            Some(entry) => Err(FileRestoreError::corrupt(
                entry.id,
                "it is in a circle of datagram sockets, which no calls can make",
            )),
            None => Ok(order),
        }
    }

    fn connect_datagram(&self, entry: &UnixSkEntry, opened: &OpenedFiles) -> Outcome<()> {
        let fd = opened.get(&(FdTypes::Unixsk, entry.id))?;
        let (Some(fd), Some(peer)) = (fd, self.by_ino.get(&entry.peer)) else {
            return Ok(());
        };
        let reach;
        let address = if peer.uflags & USK_EXTERN != 0 {
            match self.options.sockets.outside_peer(&peer.name, false) {
                OutsidePeer::Reconnect => address_of(&peer.name),
                OutsidePeer::EndOfFile | OutsidePeer::Inherit(_) => return Ok(()),
            }
        } else {
            let there = opened.get(&(FdTypes::Unixsk, peer.id))?;
            match there.filter(|_| self.bound.contains(&peer.id)) {
                Some(there) => {
                    reach = Reach::of(there, peer)?;
                    reach.address()
                }
                // A pair has been connected from the beginning.
                None => return Ok(()),
            }
        };
        let refused = FileRestoreError::refused("connect", shown(entry));
        socket::connect(fd, &address).map_err(refused)
    }

    fn finish_one(&self, entry: &UnixSkEntry, fd: BorrowedFd<'_>) -> Outcome<()> {
        let name = shown(entry);
        // One of a pair that was made for its messages, or that was connected to nobody.
        let unconnected = entry.peer == 0 && !has_lost_peer(entry);
        if !is_stream(entry) && unconnected && socket::peer_address(fd).is_ok() {
            let refused = FileRestoreError::refused("disconnect", name.clone());
            socket::disconnect(fd).map_err(refused)?;
        }
        if entry.state == TCP_LISTEN {
            listen(fd, peer_of(entry), entry.backlog, entry)?;
        }
        let how = match entry.shutdown() {
            firn_proto::SkShutdown::None => None,
            firn_proto::SkShutdown::Read => Some(socket::SHUT_RD),
            firn_proto::SkShutdown::Write => Some(socket::SHUT_WR),
            firn_proto::SkShutdown::Both => Some(socket::SHUT_RDWR),
        };
        if let Some(how) = how {
            // Sockets without a connection are marked although the call fails.
            let _ = socket::shutdown(fd, how);
        }
        options::restore_late(fd, &entry.opts, &name)?;
        if let Some(offset) = entry.firn.as_ref().and_then(|firn| firn.peek_off) {
            socket::set_number(fd, SOL_SOCKET, SO_PEEK_OFF, offset).map_err(
                FileRestoreError::refused("set the peek offset of", name.clone()),
            )?;
        }
        open::set_flags(fd, entry.flags, &name)
    }
}
