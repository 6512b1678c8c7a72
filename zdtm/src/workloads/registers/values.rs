//! Values in general, x87, SSE, AVX and AVX-512 registers.

use std::sync::mpsc;
use std::thread;

use anyhow::{Result, anyhow, ensure};

use super::spin::{self, Block, Spin};
use crate::{Need, Stage, Workload};

pub static GENERAL: Workload =
    Workload::new("registers/general", "general registers and flags", |s| {
        alone(s, &SETS[0])
    });
pub static X87: Workload = Workload::new("registers/x87", "x87 stack and control word", |s| {
    alone(s, &SETS[1])
});
pub static SSE: Workload = Workload::new("registers/sse", "xmm registers and MXCSR", |s| {
    alone(s, &SETS[2])
});
pub static AVX: Workload =
    Workload::new("registers/avx", "ymm registers", |s| alone(s, &SETS[3])).needs(&[Need::Avx]);
pub static AVX512: Workload = Workload::new("registers/avx512", "zmm and mask registers", |s| {
    alone(s, &SETS[4])
})
.needs(&[Need::Avx512]);
pub static THREADS: Workload = Workload::new(
    "registers/threads",
    "six threads, each with registers of its own",
    threads,
);

/// One set of registers: its loop, how the words are made valid for it, and how many count.
struct Set {
    name: &'static str,
    spin: Spin,
    make: fn(&mut [u64; 320]),
    count: usize,
}

static SETS: [Set; 5] = [
    Set {
        name: "general",
        spin: spin::zdtm_spin_general,
        make: make_general,
        count: 16,
    },
    Set {
        name: "x87",
        spin: spin::zdtm_spin_x87,
        make: make_x87,
        count: 17,
    },
    Set {
        name: "sse",
        spin: spin::zdtm_spin_sse,
        make: make_sse,
        count: 33,
    },
    Set {
        name: "avx",
        spin: spin::zdtm_spin_avx,
        make: |_| (),
        count: 64,
    },
    Set {
        name: "avx512",
        spin: spin::zdtm_spin_avx512,
        make: |_| (),
        count: 264,
    },
];

fn make_general(words: &mut [u64; 320]) {
    const FLAGS: u64 = 0xcd5 | 0x202; // carry to overflow, direction, interrupts and the fixed bit
    words[14] = 0;
    words[15] = FLAGS;
}

fn make_x87(words: &mut [u64; 320]) {
    for value in 0..8 {
        // A normal number: the integer bit set, an exponent in the middle.
        words[2 * value] |= 1 << 63;
        words[2 * value + 1] = 0x4000 + value as u64;
    }
    // Single precision, round up, all exceptions masked.
    words[16] = 0x087f;
}

fn make_sse(words: &mut [u64; 320]) {
    // Flush to zero, denormals are zero, round down, all exceptions masked.
    words[32] = 0xbfc0;
}

impl Set {
    fn block(&self, seed: u64) -> Box<Block> {
        let mut block = Box::new(Block::new(seed));
        (self.make)(&mut block.load);
        block
    }

    /// Holds the values in registers until SIGTERM, and compares.
    fn hold(&self, mut block: Box<Block>) -> Result<()> {
        // SAFETY: the loop reads and writes the block only, and keeps what the ABI wants kept.
        unsafe { (self.spin)(&raw mut *block) };
        for index in 0..self.count {
            let (was, is) = (block.load[index], block.store[index]);
            ensure!(
                was == is,
                "{} word {index} was {was:#x}, is {is:#x}",
                self.name
            );
        }
        Ok(())
    }
}

fn alone(stage: &Stage, set: &'static Set) -> Result<()> {
    let block = set.block(7);
    stage.ready()?;
    set.hold(block)
}

fn threads(stage: &Stage) -> Result<()> {
    let met = [None, None, None, Need::Avx.unmet(), Need::Avx512.unmet()];
    let sets: Vec<&'static Set> = SETS
        .iter()
        .zip(met)
        .filter_map(|(set, unmet)| unmet.is_none().then_some(set))
        .collect();
    let (send, receive) = mpsc::channel();
    let handles: Vec<_> = (0..6)
        .map(|index| {
            let set = sets[index % sets.len()];
            let block = set.block(index as u64 + 100);
            let send = send.clone();
            thread::spawn(move || {
                send.send(())?;
                drop(send);
                set.hold(block)
            })
        })
        .collect();
    handles.iter().try_for_each(|_| receive.recv())?;
    stage.ready_and_wait()?;
    handles.into_iter().try_for_each(|handle| {
        handle
            .join()
            .map_err(|_| anyhow!("a thread panicked, see the log"))?
    })
}
