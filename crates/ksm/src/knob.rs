//! The settings in `/sys/kernel/mm/ksm` and the order in which the kernel takes them.
use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::wanted::Rate;

/// A writable file of `/sys/kernel/mm/ksm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Knob {
    /// 0 stop, 1 merge, 2 stop and unmerge the whole host. A lease never writes 2.
    Run,
    /// Pages in one batch. EINVAL while an advisor is on, and reset by every change of `advisor_mode`.
    PagesToScan,
    /// Pause between batches.
    SleepMillisecs,
    /// Skip pages that failed to merge before (from 6.7).
    SmartScan,
    /// Merge zero-filled pages with the kernel's zero page.
    UseZeroPages,
    /// Mappings of one page, at least 2. EBUSY while pages are merged.
    MaxPageSharing,
    /// 0 keeps a tree for each NUMA node. EBUSY while pages are merged.
    MergeAcrossNodes,
    /// Between two full walks of the copies of one content.
    StableNodeChainsPruneMillisecs,
    /// `none` or `scan-time` (from 6.8).
    AdvisorMode,
    /// Per cent of one processor.
    AdvisorMaxCpu,
    /// Where the advisor starts.
    AdvisorMinPagesToScan,
    /// Where the advisor ends.
    AdvisorMaxPagesToScan,
    /// Seconds for a full pass.
    AdvisorTargetScanTime,
}

impl Knob {
    /// Every knob that is leased.
    pub const ALL: [Self; 13] = [
        Self::Run,
        Self::PagesToScan,
        Self::SleepMillisecs,
        Self::SmartScan,
        Self::UseZeroPages,
        Self::MaxPageSharing,
        Self::MergeAcrossNodes,
        Self::StableNodeChainsPruneMillisecs,
        Self::AdvisorMode,
        Self::AdvisorMaxCpu,
        Self::AdvisorMinPagesToScan,
        Self::AdvisorMaxPagesToScan,
        Self::AdvisorTargetScanTime,
    ];

    /// The name of the file.
    #[must_use]
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::PagesToScan => "pages_to_scan",
            Self::SleepMillisecs => "sleep_millisecs",
            Self::SmartScan => "smart_scan",
            Self::UseZeroPages => "use_zero_pages",
            Self::MaxPageSharing => "max_page_sharing",
            Self::MergeAcrossNodes => "merge_across_nodes",
            Self::StableNodeChainsPruneMillisecs => "stable_node_chains_prune_millisecs",
            Self::AdvisorMode => "advisor_mode",
            Self::AdvisorMaxCpu => "advisor_max_cpu",
            Self::AdvisorMinPagesToScan => "advisor_min_pages_to_scan",
            Self::AdvisorMaxPagesToScan => "advisor_max_pages_to_scan",
            Self::AdvisorTargetScanTime => "advisor_target_scan_time",
        }
    }
}

impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.file_name())
    }
}

/// Who sets `pages_to_scan`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdvisorMode {
    /// Whoever writes it.
    None,
    /// The kernel, from the time of the last pass.
    ScanTime,
}

impl AdvisorMode {
    /// The word that the kernel takes.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::ScanTime => "scan-time",
        }
    }
}

impl From<AdvisorMode> for u64 {
    fn from(mode: AdvisorMode) -> Self {
        match mode {
            AdvisorMode::None => 0,
            AdvisorMode::ScanTime => 1,
        }
    }
}

/// Values of knobs. `advisor_mode` is held as a number, 0 for `none` and 1 for `scan-time`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Values(BTreeMap<Knob, u64>);

impl Values {
    /// The value of one knob, if it is known.
    #[must_use]
    pub fn get(&self, knob: Knob) -> Option<u64> {
        self.0.get(&knob).copied()
    }

    /// Whether a value of this knob is known.
    #[must_use]
    pub fn contains(&self, knob: Knob) -> bool {
        self.0.contains_key(&knob)
    }

    /// All known values, in the order of [`Knob::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Knob, u64)> + '_ {
        self.0.iter().map(|(&knob, &value)| (knob, value))
    }

    /// `pages_to_scan` and `sleep_millisecs` together.
    #[must_use]
    pub fn rate(&self) -> Option<Rate> {
        let clamp = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Some(Rate {
            pages_to_scan: clamp(self.get(Knob::PagesToScan)?),
            sleep_millisecs: clamp(self.get(Knob::SleepMillisecs)?),
        })
    }

    /// Gives a knob a value.
    pub fn set(&mut self, knob: Knob, value: u64) {
        self.0.insert(knob, value);
    }

    pub(crate) fn remove(&mut self, knob: Knob) -> Option<u64> {
        self.0.remove(&knob)
    }

    /// True if no value is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The order in which a change from `current` to `target` is written.
///
/// A stop comes first and a start last, so that ksmd never runs on half of the settings. Leaving the advisor comes
/// before `pages_to_scan`, which is refused until then; entering it comes after its numbers, of which it reads
/// `advisor_min_pages_to_scan` on entry.
pub(crate) fn write_order(target: &Values) -> Vec<Knob> {
    let stops = target.get(Knob::Run) == Some(0);
    let leaves_advisor = target.get(Knob::AdvisorMode) == Some(AdvisorMode::None.into());
    let mut order: Vec<Knob> = Knob::ALL.to_vec();
    order.sort_by_key(|knob| match knob {
        Knob::Run if stops => 0,
        Knob::AdvisorMode if leaves_advisor => 1,
        Knob::AdvisorMode => 3,
        Knob::Run => 4,
        _ => 2,
    });
    order.retain(|&knob| target.contains(knob));
    order
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_order_stops_first_and_starts_last() {
        let mut target = Values::default();
        for knob in Knob::ALL {
            target.set(knob, 0);
        }
        let order = write_order(&target);
        assert_eq!(order[..2], [Knob::Run, Knob::AdvisorMode]);
        target.set(Knob::Run, 1);
        target.set(Knob::AdvisorMode, 1);
        let order = write_order(&target);
        assert_eq!(order[11..], [Knob::AdvisorMode, Knob::Run]);
    }

    #[test]
    fn names_in_the_state_file_are_the_kernels() {
        for knob in Knob::ALL {
            assert_eq!(serde_json::to_string(&knob).unwrap(), format!("\"{}\"", knob.file_name()));
        }
    }
}
