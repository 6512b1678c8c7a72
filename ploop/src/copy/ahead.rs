//! Blocks that are read before they are asked for, over several connections.
//!
//! Block number `n` of what is expected is read by connection `n` modulo their number, so that the
//! blocks come back in order without being sorted.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use crate::server::{Client, ControlError};

/// Bytes that wait in memory at most, or one block of each connection where that is more.
const AHEAD_BYTES: usize = 16 << 20;

/// A part of the disk that is read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len_bytes: usize,
}

/// Readers, and what they were told to read.
#[derive(Debug)]
pub(super) struct ReadAhead {
    fetchers: Vec<Fetcher>,
    expected: VecDeque<(usize, Block)>,
    next: usize,
}

#[derive(Debug)]
struct Fetcher {
    orders: Sender<Vec<Block>>,
    results: Receiver<Result<Vec<u8>, ControlError>>,
}

impl ReadAhead {
    /// Reads over these connections blocks of `unit_bytes` at most; over none it reads nothing.
    pub fn over(connections: Vec<Client>, unit_bytes: u32) -> ReadAhead {
        let unit = usize::try_from(unit_bytes).unwrap_or(usize::MAX);
        let each = AHEAD_BYTES / unit.max(1) / connections.len().max(1);
        let fetchers = connections.into_iter();
        ReadAhead {
            fetchers: fetchers
                .map(|client| Fetcher::start(client, each))
                .collect(),
            expected: VecDeque::new(),
            next: 0,
        }
    }

    /// Begins to read blocks.
    pub fn expect(&mut self, blocks: &[Block]) {
        let count = self.fetchers.len();
        if count == 0 {
            return;
        }
        let mut orders = vec![Vec::new(); count];
        for block in blocks {
            orders[self.next].push(*block);
            self.expected.push_back((self.next, *block));
            self.next = (self.next + 1) % count;
        }
        for (fetcher, orders) in self.fetchers.iter().zip(orders) {
            // One that has left is found when its block is fetched.
            let _ = fetcher.orders.send(orders);
        }
    }

    /// The bytes of a block, or None where it is not the next expected.
    pub fn fetch(&mut self, block: Block) -> Option<Result<Vec<u8>, ControlError>> {
        self.expected.front().filter(|(_, next)| *next == block)?;
        let (fetcher, _) = self.expected.pop_front()?;
        self.fetchers[fetcher].results.recv().ok()
    }
}

impl Fetcher {
    fn start(mut client: Client, ahead: usize) -> Fetcher {
        let (orders, incoming) = channel::<Vec<Block>>();
        let (outgoing, results) = sync_channel(ahead);
        // Ends with the one that gives orders, or takes results.
        std::thread::spawn(move || {
            for block in incoming.into_iter().flatten() {
                let mut bytes = vec![0; block.len_bytes];
                let read = client.read(&mut bytes, block.offset).map(|()| bytes);
                if outgoing.send(read).is_err() {
                    return;
                }
            }
        });
        Fetcher { orders, results }
    }
}
