//! What a partition's store holds and has done.

use kernel::Bytes;

/// Counts of one partition. Those of the first group fall again, the others only rise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreCounters {
    /// Pages in segments that are not retired, KSM's word for physical pages that are shared.
    pub pages_shared: u64,
    /// Segments that are not retired.
    pub segments: u64,
    /// The memory of these pages.
    pub bytes: Bytes,

    /// Pages copied into segments.
    pub filled: u64,
    /// Pages that were to be filled and were found there, compared in full.
    pub known: u64,
    /// Segments retired.
    pub retired: u64,
    /// Pages of retired segments.
    pub pages_retired: u64,
    /// Pages whose content was another than the one seen when it was to be copied.
    pub hash_mismatch: u64,
    /// Pages refused because they hold only zeros.
    pub zero_refused: u64,
    /// Pages that could not be read.
    pub unread: u64,
    /// Pages refused because the limit was reached.
    pub full: u64,
    /// Pages whose fingerprint is another page's: chance, once in 2^64 pages, or an attack on the secret.
    pub collisions: u64,
}
