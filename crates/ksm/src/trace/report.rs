//! What a trace has seen.

use std::collections::BTreeMap;

use serde::Serialize;

/// What happened while it was traced.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TraceReport {
    /// How long it was traced.
    pub seconds: f64,
    /// Passes over everything.
    pub passes: Passes,
    /// Pages merged.
    pub merges: Merges,
    /// Pages that were equal and could not be merged.
    pub failures: Failures,
    /// Records of merged pages dropped that nobody uses any more.
    pub ksm_pages_removed: u64,
    /// Address spaces that ksmd scans from then on.
    pub entered: u64,
    /// Address spaces that ended.
    pub exited: u64,
    /// What the kernel's advisor did; empty if it is off.
    pub advisor: Vec<Advised>,
    /// By process, who merged most first.
    pub processes: Vec<ProcessTrace>,
    /// What could not be told to be whose: processes that ended before they could be looked at.
    pub unattributed: ProcessTrace,
    /// False where the kernel does not let a process be found for an address space: all is unattributed then.
    pub can_attribute: bool,
    /// Each second that is over, the last hour at most.
    pub timeline: Vec<Second>,
    /// Events that were taken in.
    pub events: u64,
    /// Events that were lost because they were not read in time: then all counts are too small.
    pub lost_events: u64,
    /// Memory that the kernel keeps for the trace.
    pub buffer_bytes: u64,
    /// Processor time that the tracing process took.
    pub cpu_seconds: f64,
}

/// How long passes took.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Passes {
    /// Seen from begin to end.
    pub completed: u64,
    /// The shortest; `None` without any.
    pub shortest_seconds: Option<f64>,
    /// Half took no longer.
    pub median_seconds: Option<f64>,
    /// The longest.
    pub longest_seconds: Option<f64>,
    /// For how long the one that is under way has been.
    pub under_way_seconds: Option<f64>,
    /// Page addresses with a record at the begin of the last.
    pub rmap_entries: Option<u64>,
    /// Each holds passes below its bound and not below the one before; empty ones are left out.
    pub histogram: Vec<Bucket>,
}

/// A bar of the histogram.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bucket {
    /// Its bound: a power of two of a millisecond.
    pub below_seconds: f64,
    /// Passes.
    pub passes: u64,
}

/// Pages merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Merges {
    /// Replaced by an equal one.
    pub joined: u64,
    /// The first of their content, which others join.
    pub promoted: u64,
    /// Replaced by the zero page.
    pub zero_pages: u64,
}

/// Pages that could not be merged, by the kernel's error; `EFAULT`: in use for I/O, changed, or unmapped meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Failures(pub BTreeMap<String, u64>);

impl Failures {
    /// All of them.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.0.values().sum()
    }
}

/// One run of the kernel's advisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Advised {
    /// Whole seconds that it took the pass for, at least 1.
    pub scan_time: i64,
    /// What it set.
    pub pages_to_scan: u64,
    /// What it took ksmd's use of a processor for.
    pub cpu_percent: u64,
}

/// What happened to one process's pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProcessTrace {
    /// Its number; 0 for several together.
    pub pid: i32,
    /// Command name.
    pub comm: String,
    /// It ended while it was traced.
    pub ended: bool,
    /// Address spaces: 1, and one more for each program that it executed.
    pub address_spaces: u64,
    /// Pages merged.
    pub merges: Merges,
    /// Pages that could not be merged.
    pub failed: u64,
}

/// One second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Second {
    /// Which, from 0.
    pub second: u64,
    /// Passes that ended in it.
    pub passes: u64,
    /// Pages merged in it, zero pages apart.
    pub merged: u64,
    /// Pages replaced by the zero page.
    pub zero_pages: u64,
    /// Pages that could not be merged.
    pub failed: u64,
}
