//! What the model says.

use std::time::Duration;

use crate::profit::KsmBooks;

/// What `/sys/kernel/mm/ksm` would show at one time, by its names there, and ksmd's clock. Pages unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Since ksmd was started.
    pub at: Duration,
    /// Processor time that ksmd has used.
    pub cpu: Duration,
    /// Passes completed.
    pub full_scans: u64,
    /// Batch size now; the advisor changes it.
    pub pages_to_scan: u32,
    /// Merged pages.
    pub pages_shared: u64,
    /// Mappings of these beyond the first of each.
    pub pages_sharing: u64,
    /// Pages in the unstable tree.
    pub pages_unshared: u64,
    /// Pages that changed, were skipped or were seen for the first time.
    pub pages_volatile: u64,
    /// Mappings of the zero page that KSM placed.
    pub ksm_zero_pages: u64,
    /// Pages compared.
    pub pages_scanned: u64,
    /// Pages that smart scan skipped.
    pub pages_skipped: u64,
    /// ksmd's records of pages, which cost memory.
    pub rmap_items: u64,
}

impl State {
    /// Pages that merging keeps from being there.
    pub fn pages_saved(&self) -> u64 {
        self.pages_sharing + self.ksm_zero_pages
    }

    /// `general_profit`, in bytes.
    pub fn general_profit(&self, page_size: u64) -> i64 {
        let Self { pages_sharing: pages, ksm_zero_pages: zero_pages, rmap_items, .. } = *self;
        KsmBooks { pages, zero_pages, rmap_items }.profit(page_size)
    }

    /// ksmd's share of one processor so far, 0 to 1.
    pub fn cpu_share(&self) -> f64 {
        if self.at.is_zero() { 0.0 } else { self.cpu.as_secs_f64() / self.at.as_secs_f64() }
    }
}
