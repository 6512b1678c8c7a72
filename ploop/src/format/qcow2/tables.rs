//! L1, L2 and refcounts of a qcow2 image.

use std::collections::{BTreeMap, BTreeSet};

use super::header::{Header, long};
use super::{COMPRESSED, COPIED, OFFSET};
use crate::DiskError;
use crate::storage::{Access, Storage};

/// The tables, and what of them is not in the file yet.
pub(super) struct Tables {
    header: Header,
    l1: Vec<u64>,
    l1_touched: bool,
    /// L2 tables that were asked for, by their number.
    l2: BTreeMap<u32, Vec<u64>>,
    l2_touched: BTreeSet<u32>,
    /// Offsets of the refcount blocks.
    blocks: Vec<u64>,
    blocks_table_touched: bool,
    /// Refcounts of the file's clusters.
    refcounts: Vec<u16>,
    refcounts_touched: BTreeSet<usize>,
    /// No cluster below is free.
    hint: usize,
    /// Clusters to be given back when nothing durable leads to them.
    freed: Vec<u64>,
}

/// Writes an empty image into an empty file.
///
/// # Errors
/// The cluster is no power of two from 64 KiB to 2 MiB, the size is no number of clusters or too large, or
/// the host refused.
pub fn create(storage: &dyn Storage, size_bytes: u64, cluster_bytes: u32) -> Result<(), DiskError> {
    let name = storage.name();
    if !cluster_bytes.is_power_of_two() || !(1 << 16..=1 << 21).contains(&cluster_bytes) {
        let what =
            format!("{cluster_bytes} bytes are no cluster: a power of two from 64K to 2M is");
        return Err(DiskError::refused(name, what));
    }
    let unit = u64::from(cluster_bytes);
    if size_bytes == 0 || !size_bytes.is_multiple_of(unit) {
        let what = format!("{size_bytes} bytes are no number of clusters of {cluster_bytes}");
        return Err(DiskError::refused(name, what));
    }
    // Cluster 0 is the header, 1 the refcount table, 2 its first block, then comes the L1 table.
    let mut header = Header {
        version: 3,
        cluster_bits: cluster_bytes.trailing_zeros(),
        size_bytes,
        l1_entries: 0,
        l1_offset: 3 * unit,
        refcounts_offset: unit,
        refcounts_clusters: 1,
        snapshots: 0,
        incompatible: 0,
        refcount_order: 4,
    };
    let l1_clusters = (header.wanted_l1() * 8).div_ceil(unit).max(1);
    let l1_entries = u32::try_from(l1_clusters * unit / 8)
        .ok()
        .filter(|n| *n <= 1 << 22);
    header.l1_entries = l1_entries
        .ok_or_else(|| DiskError::refused(name, format!("{size_bytes} bytes are too many")))?;
    let used = 3 + l1_clusters;
    let mut block = vec![0; usize::try_from(unit).unwrap_or_default()];
    for count in block
        .chunks_exact_mut(2)
        .take(usize::try_from(used).unwrap_or(usize::MAX))
    {
        count.copy_from_slice(&1u16.to_be_bytes());
    }
    storage
        .set_len(used * unit)
        .and_then(|()| storage.write_at(&(2 * unit).to_be_bytes(), unit))
        .and_then(|()| storage.write_at(&block, 2 * unit))
        .and_then(|()| storage.sync())
        .and_then(|()| storage.write_at(&header.encode(), 0))
        .and_then(|()| storage.sync())
        .map_err(|error| DiskError::io(name, "write", 0, error))
}

impl Tables {
    pub fn load(
        storage: &dyn Storage,
        header: Header,
        access: Access,
    ) -> Result<Tables, DiskError> {
        let file_bytes = storage
            .len_bytes()
            .map_err(|error| DiskError::io(storage.name(), "read", 0, error))?;
        let l1 = longs(
            storage,
            header.l1_offset,
            header.l1_entries.into(),
            file_bytes,
        )?;
        let mut tables = Tables {
            header,
            l1,
            l1_touched: false,
            l2: BTreeMap::new(),
            l2_touched: BTreeSet::new(),
            blocks: Vec::new(),
            blocks_table_touched: false,
            refcounts: Vec::new(),
            refcounts_touched: BTreeSet::new(),
            hint: 0,
            freed: Vec::new(),
        };
        if access == Access::ReadWrite {
            tables.load_refcounts(storage, file_bytes)?;
        }
        Ok(tables)
    }

    fn unit(&self) -> u64 {
        self.header.cluster_bytes()
    }

    fn per_block(&self) -> usize {
        usize::try_from(self.unit() / 2).unwrap_or(usize::MAX)
    }

    fn load_refcounts(&mut self, storage: &dyn Storage, file_bytes: u64) -> Result<(), DiskError> {
        let unit = self.unit();
        let entries = u64::from(self.header.refcounts_clusters) * unit / 8;
        self.blocks = longs(storage, self.header.refcounts_offset, entries, file_bytes)?;
        let clusters = usize::try_from(file_bytes.div_ceil(unit)).unwrap_or(usize::MAX);
        self.refcounts = vec![0; clusters];
        let mut bytes = vec![0; usize::try_from(unit).unwrap_or_default()];
        for (number, offset) in self.blocks.clone().into_iter().enumerate() {
            let first = number * self.per_block();
            if offset == 0 || first >= clusters {
                continue;
            }
            if !offset.is_multiple_of(unit) || offset + unit > file_bytes {
                let what = format!("a block of refcounts stands at byte {offset}");
                return Err(DiskError::corrupt(storage.name(), what));
            }
            storage
                .read_at(&mut bytes, offset)
                .map_err(|error| DiskError::io(storage.name(), "read", offset, error))?;
            let counts = bytes
                .chunks_exact(2)
                .map(|two| u16::from_be_bytes([two[0], two[1]]));
            for (slot, count) in self.refcounts[first..].iter_mut().zip(counts) {
                *slot = count;
            }
        }
        Ok(())
    }

    fn split(&self, cluster: u32) -> (u32, usize) {
        let entries = self.header.l2_entries();
        let number = u64::from(cluster) / entries;
        let index = u64::from(cluster) % entries;
        (
            u32::try_from(number).unwrap_or(u32::MAX),
            usize::try_from(index).unwrap_or(usize::MAX),
        )
    }

    fn l1_entry(&self, number: u32) -> u64 {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        self.l1.get(index).copied().unwrap_or(0)
    }

    /// What L2 says of a cluster; 0 behind the end.
    pub fn entry(&mut self, storage: &dyn Storage, cluster: u32) -> Result<u64, DiskError> {
        if u64::from(cluster) >= self.header.size_bytes.div_ceil(self.unit()) {
            return Ok(0);
        }
        let (number, index) = self.split(cluster);
        if !self.l2.contains_key(&number) {
            let at = self.l1_entry(number) & OFFSET;
            if at == 0 {
                return Ok(0);
            }
            let len = storage
                .len_bytes()
                .map_err(|error| DiskError::io(storage.name(), "read", at, error))?;
            let table = longs(storage, at, self.header.l2_entries(), len)?;
            self.l2.insert(number, table);
        }
        let entry = self.l2.get(&number).and_then(|table| table.get(index));
        let entry = entry.copied().unwrap_or(0);
        if entry & COMPRESSED == 0 && !(entry & OFFSET).is_multiple_of(self.unit()) {
            let what = format!("cluster {cluster} lies at no cluster of the file");
            return Err(DiskError::corrupt(storage.name(), what));
        }
        Ok(entry)
    }

    /// Changes what L2 says of a cluster; the old place is given back later.
    pub fn set(
        &mut self,
        storage: &dyn Storage,
        cluster: u32,
        entry: u64,
    ) -> Result<(), DiskError> {
        let old = self.entry(storage, cluster)?;
        if old & COMPRESSED != 0 {
            let what = "compressed clusters are not written; 'qemu-img convert' makes plain ones";
            return Err(DiskError::refused(storage.name(), what));
        }
        let (number, index) = self.split(cluster);
        if !self.l2.contains_key(&number) {
            if entry == 0 {
                return Ok(());
            }
            let at = self.take(storage)?;
            let slot = usize::try_from(number).unwrap_or(usize::MAX);
            let Some(slot) = self.l1.get_mut(slot) else {
                return Err(DiskError::corrupt(
                    storage.name(),
                    "its L1 table is too short",
                ));
            };
            *slot = at | COPIED;
            self.l1_touched = true;
            let entries = usize::try_from(self.header.l2_entries()).unwrap_or_default();
            self.l2.insert(number, vec![0; entries]);
        }
        if let Some(slot) = self
            .l2
            .get_mut(&number)
            .and_then(|table| table.get_mut(index))
        {
            *slot = entry;
        }
        self.l2_touched.insert(number);
        if old & OFFSET != 0 && old & OFFSET != entry & OFFSET {
            self.freed.push(old & OFFSET);
        }
        Ok(())
    }

    /// Hands out a cluster.
    pub fn take(&mut self, storage: &dyn Storage) -> Result<u64, DiskError> {
        let free = self.refcounts[self.hint.min(self.refcounts.len())..]
            .iter()
            .position(|c| *c == 0);
        let index = match free {
            Some(after) => self.hint + after,
            None => self.refcounts.len(),
        };
        self.hint = index;
        self.cover(storage, index)?;
        self.count(index, 1);
        Ok(index as u64 * self.unit())
    }

    fn count(&mut self, index: usize, count: u16) {
        if self.refcounts.len() <= index {
            self.refcounts.resize(index + 1, 0);
        }
        self.refcounts[index] = count;
        let block = index / self.per_block();
        self.refcounts_touched.insert(block);
        if count == 0 {
            self.hint = self.hint.min(index);
        }
    }

    /// Makes sure that a block of refcounts covers a cluster. A new block counts itself.
    fn cover(&mut self, storage: &dyn Storage, index: usize) -> Result<(), DiskError> {
        let number = index / self.per_block();
        match self.blocks.get(number) {
            Some(0) => {}
            Some(_) => return Ok(()),
            None => {
                let what = "its refcount table is full; 'qemu-img convert' makes a larger one";
                return Err(DiskError::refused(storage.name(), what));
            }
        }
        // The cluster after the one that is asked for, unless that is covered by the same block anyway.
        let own = index.max(self.refcounts.len()) + 1;
        let own = match own / self.per_block() == number {
            true => own,
            false => number * self.per_block(),
        };
        self.blocks[number] = own as u64 * self.unit();
        self.blocks_table_touched = true;
        self.count(own, 1);
        Ok(())
    }

    /// Takes back a cluster that nothing ever led to.
    pub fn give_back(&mut self, at: u64) {
        let index = usize::try_from(at / self.unit()).unwrap_or(usize::MAX);
        self.count(index, 0);
    }

    pub fn flush(&mut self, storage: &dyn Storage) -> Result<(), DiskError> {
        let unit = self.unit();
        sync(storage)?;
        self.write_refcounts(storage)?;
        if self.blocks_table_touched {
            sync(storage)?;
            put(storage, &encode(&self.blocks), self.header.refcounts_offset)?;
            self.blocks_table_touched = false;
        }
        if !self.l2_touched.is_empty() {
            sync(storage)?;
        }
        for number in self.l2_touched.clone() {
            let at = self.l1_entry(number) & OFFSET;
            if let Some(table) = self.l2.get(&number) {
                put(storage, &encode(table), at)?;
            }
        }
        let touched = !std::mem::take(&mut self.l2_touched).is_empty();
        if self.l1_touched {
            sync(storage)?;
            put(storage, &encode(&self.l1), self.header.l1_offset)?;
            self.l1_touched = false;
        }
        if touched {
            sync(storage)?;
        }
        for at in std::mem::take(&mut self.freed) {
            storage
                .punch(at..at + unit)
                .map_err(|error| DiskError::io(storage.name(), "write", at, error))?;
            self.give_back(at);
        }
        Ok(())
    }

    fn write_refcounts(&mut self, storage: &dyn Storage) -> Result<(), DiskError> {
        for number in self.refcounts_touched.clone() {
            let first = number * self.per_block();
            let last = (first + self.per_block()).min(self.refcounts.len());
            let counts = self.refcounts[first.min(last)..last].iter();
            let mut bytes: Vec<u8> = counts.flat_map(|count| count.to_be_bytes()).collect();
            bytes.resize(self.per_block() * 2, 0);
            put(storage, &bytes, self.blocks[number])?;
        }
        self.refcounts_touched.clear();
        Ok(())
    }

    pub fn grow(&mut self, storage: &dyn Storage, size_bytes: u64) -> Result<(), DiskError> {
        let mut wanted = self.header.clone();
        wanted.size_bytes = size_bytes;
        if u32::try_from(size_bytes.div_ceil(self.unit())).is_err() {
            let what = format!("{size_bytes} bytes are too many");
            return Err(DiskError::refused(storage.name(), what));
        }
        let old = (self.header.l1_offset, u64::from(self.header.l1_entries));
        let moves = wanted.wanted_l1() > old.1;
        if moves {
            self.new_l1(storage, &mut wanted)?;
        }
        self.l1_touched |= moves;
        self.header.l1_offset = wanted.l1_offset;
        self.flush(storage)?;
        sync(storage)?;
        put(storage, &wanted.encode(), 0)?;
        sync(storage)?;
        self.header = wanted;
        if moves {
            for cluster in 0..(old.1 * 8).div_ceil(self.unit()) {
                self.freed.push(old.0 + cluster * self.unit());
            }
        }
        Ok(())
    }

    /// Takes a row of clusters at the end for a longer L1 table.
    fn new_l1(&mut self, storage: &dyn Storage, wanted: &mut Header) -> Result<(), DiskError> {
        let unit = self.unit();
        let clusters = (wanted.wanted_l1() * 8).div_ceil(unit);
        let entries = u32::try_from(clusters * unit / 8)
            .ok()
            .filter(|n| *n <= 1 << 22);
        let Some(entries) = entries else {
            let what = format!("{} bytes are too many", wanted.size_bytes);
            return Err(DiskError::refused(storage.name(), what));
        };
        // A block of refcounts may take the cluster behind the end: the row begins behind that.
        let count = usize::try_from(clusters).unwrap_or(usize::MAX);
        for index in self.refcounts.len()..self.refcounts.len() + count + 1 {
            self.cover(storage, index)?;
        }
        let first = self.refcounts.len();
        for index in first..first + count {
            self.cover(storage, index)?;
            self.count(index, 1);
        }
        wanted.l1_entries = entries;
        wanted.l1_offset = first as u64 * unit;
        self.l1
            .resize(usize::try_from(entries).unwrap_or_default(), 0);
        Ok(())
    }
}

fn sync(storage: &dyn Storage) -> Result<(), DiskError> {
    storage
        .sync()
        .map_err(|error| DiskError::io(storage.name(), "sync", 0, error))
}

fn put(storage: &dyn Storage, bytes: &[u8], at: u64) -> Result<(), DiskError> {
    storage
        .write_at(bytes, at)
        .map_err(|error| DiskError::io(storage.name(), "write", at, error))
}

fn encode(table: &[u64]) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

fn longs(
    storage: &dyn Storage,
    at: u64,
    count: u64,
    file_bytes: u64,
) -> Result<Vec<u64>, DiskError> {
    let len = count.saturating_mul(8);
    if at.checked_add(len).is_none_or(|end| end > file_bytes) {
        let what = format!("a table at byte {at} reaches over the file's end");
        return Err(DiskError::corrupt(storage.name(), what));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
    storage
        .read_at(&mut bytes, at)
        .map_err(|error| DiskError::io(storage.name(), "read", at, error))?;
    Ok((0..bytes.len())
        .step_by(8)
        .map(|at| long(&bytes, at))
        .collect())
}
