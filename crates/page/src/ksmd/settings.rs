//! What the model is told: ksmd's settings, and what its work costs.

use std::time::Duration;

/// The settings of `/sys/kernel/mm/ksm` that the model knows, by their names there. The default is the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Pages compared before ksmd sleeps; without effect under an advisor. At least 1.
    pub pages_to_scan: u32,
    /// Milliseconds of sleep between batches.
    pub sleep_millisecs: u32,
    /// Skip pages that were compared before without success.
    pub smart_scan: bool,
    /// Map zero-filled pages to the kernel's zero page.
    pub use_zero_pages: bool,
    /// Mappings of one page, at least 2.
    pub max_page_sharing: u32,
    /// Who sets `pages_to_scan`.
    pub advisor: Advisor,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            pages_to_scan: 100,
            sleep_millisecs: 20,
            smart_scan: true,
            use_zero_pages: false,
            max_page_sharing: 256,
            advisor: Advisor::None,
        }
    }
}

/// `advisor_mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Advisor {
    /// `none`: [`Settings::pages_to_scan`] holds.
    #[default]
    None,
    /// `scan-time`: the kernel adapts `pages_to_scan` after each pass.
    ScanTime(ScanTime),
}

/// The numbers of the scan-time advisor, by their names without `advisor_`. The default is the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanTime {
    /// Per cent of one processor that ksmd may use.
    pub max_cpu: u32,
    /// Pages in a batch at the start. The kernel never uses it as a lower limit.
    pub min_pages_to_scan: u32,
    /// Most pages in a batch.
    pub max_pages_to_scan: u32,
    /// Seconds that a pass should take, at least 1.
    pub target_scan_time: u32,
}

impl Default for ScanTime {
    fn default() -> Self {
        Self { max_cpu: 70, min_pages_to_scan: 500, max_pages_to_scan: 30_000, target_scan_time: 200 }
    }
}

/// Processor time of ksmd's steps, in nanoseconds, and the kernel's tick.
///
/// The default was measured on Linux 6.18 on a busy AMD EPYC: a pass over 40,000 to 160,000 pages, whose contents differ
/// early, cost within a quarter of what it gives. Trees of 10,000 pages stay in the caches and cost a third less, and
/// contents that are equal for long before they differ cost more. Other machines differ by small factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// A page that is merged already.
    pub merged: u64,
    /// A page that is not: its checksum.
    pub checksum: u64,
    /// One level of the stable tree, for a page whose checksum has not changed.
    pub stable_level: u64,
    /// One level of the unstable tree, for a page that the stable tree does not have.
    pub unstable_level: u64,
    /// Merging a page; two that meet in the unstable tree are two.
    pub merge: u64,
    /// A page that smart scan skips.
    pub skipped: u64,
    /// The start of a pass.
    pub pass: u64,
    /// Waking for a batch.
    pub batch: u64,
    /// The tick: sleeps end on one. 0 for sleeps of exact length.
    pub tick: u64,
}

impl Default for Costs {
    fn default() -> Self {
        Self {
            merged: 300,
            checksum: 1_250,
            stable_level: 200,
            unstable_level: 330,
            merge: 700,
            skipped: 250,
            pass: 50_000,
            batch: 5_000,
            tick: 4_000_000,
        }
    }
}

impl Costs {
    /// When a sleep that starts at `now` ends, both in nanoseconds: a timer of the kernel's wheel fires on the first
    /// tick that is later than the one asked for.
    pub(super) fn wake(&self, now: u64, sleep_millisecs: u32) -> u64 {
        let sleep = u64::from(sleep_millisecs) * 1_000_000;
        if sleep == 0 || self.tick == 0 {
            return now + sleep;
        }
        (now / self.tick + sleep.div_ceil(self.tick) + 1) * self.tick
    }
}

/// A time of the model's clock.
pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
