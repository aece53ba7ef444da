//! What an advisor is to hold, and what it sees.
use std::time::Duration;

use crate::wanted::Rate;

/// What is to be held. Where goals conflict the ceiling wins, then memory pressure, then CPU pressure, then the time
/// of a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goals {
    /// The time of one pass over all mergeable pages.
    pub scan_time: Duration,
    /// The most that ksmd may use: share of one processor, above 0, at most 1.
    pub max_cpu: f64,
    /// Scan as fast as this share lets it while new memory is there to be merged, where it is above `max_cpu`; `None`
    /// for no boost.
    pub boost: Option<f64>,
    /// Memory pressure (PSI `some avg10`, per cent) from which on scanning gets faster; `None` to look away.
    pub memory_pressure: Option<f64>,
    /// CPU pressure (the same figure) from which on it gets slower; `None` to look away.
    pub cpu_pressure: Option<f64>,
    /// Leave ksmd as the administrator had it while there is nothing to gain.
    pub rest: bool,
    /// Leave the kernel's skipping as the administrator has it. Without, it is off: skipped pages make passes of very
    /// unequal length, two equal pages may go on missing each other, and resting saves more than skipping.
    pub keep_smart_scan: bool,
}

impl Default for Goals {
    fn default() -> Self {
        Self {
            scan_time: Duration::from_secs(200),
            max_cpu: 0.2,
            boost: Some(0.2),
            memory_pressure: Some(5.0),
            cpu_pressure: Some(60.0),
            rest: true,
            keep_smart_scan: false,
        }
    }
}

/// What the advisor sees at one time. Counters are KSM's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Look {
    /// Since the advisor's start.
    pub at: Duration,
    /// Passes completed; begins anew at 0 when somebody unmerges the host.
    pub full_scans: u64,
    /// Pages compared since boot; `None` on kernels that do not count them (before 6.6).
    pub pages_scanned: Option<u64>,
    /// Pages that smart scan skipped since boot.
    pub pages_skipped: u64,
    /// ksmd's records of pages: all that it knows of.
    pub rmap_items: u64,
    /// Mappings of merged pages, those of the zero page included.
    pub merged: u64,
    /// Pages that merging keeps from being there.
    pub saved: u64,
    /// Writes to merged pages since boot, each of which made a copy.
    pub cow: u64,
    /// Bytes saved less bookkeeping; `None` on kernels that do not say it (before 6.4).
    pub general_profit: Option<i64>,
    /// Processor time of ksmd since boot; `None` where it cannot be seen.
    pub ksmd_cpu: Option<Duration>,
    /// What ksmd runs at; `None` while it is stopped.
    pub in_force: Option<Rate>,
    /// Anonymous pages of the processes that KSM may merge: an upper bound of what can be candidates.
    pub mergeable_pages: u64,
    /// Pages by which any such process has grown since the start, newcomers wholly. Never falls.
    pub appeared_pages: u64,
    /// PSI of memory, `some avg10` in per cent; `None` where the kernel does not measure it.
    pub memory_pressure: Option<f64>,
    /// PSI of the processors.
    pub cpu_pressure: Option<f64>,
}
