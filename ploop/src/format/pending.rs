//! Changes of a table that outlive the process, but need not outlive the machine.
//!
//! Bytes of the disk go to the file at once and survive the end of the process in the host's page
//! cache; entries of the BAT wait in memory for the next flush. A server whose death shall lose nothing
//! that it has acknowledged keeps them also in memory that outlives it, such as a memfd that its
//! supervisor holds.

/// A list of changed entries, kept outside of the process.
pub trait PendingLog: Send + Sync {
    /// Appends: from now on `cluster` has this entry; 0 means no place.
    fn record(&self, cluster: u32, entry: u32);
    /// Number of changes that were ever appended.
    fn position(&self) -> u64;
    /// Drops all changes up to that position, in one step: they are in the file.
    fn forget(&self, until: u64);
    /// The changes that are left, oldest first.
    fn entries(&self) -> Vec<(u32, u32)>;
}
