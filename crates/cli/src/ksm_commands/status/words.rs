//! What the counters mean.

use kernel::KsmCounters;

/// A counter with its unit and its meaning.
pub(super) struct Counter {
    pub(super) name: &'static str,
    pub(super) value: Option<i64>,
    pub(super) unit: &'static str,
    pub(super) meaning: &'static str,
}

/// All of the host's.
pub(super) fn counters(from: &KsmCounters) -> Vec<Counter> {
    let counter = |name, value: Option<u64>, unit, meaning| Counter {
        name,
        value: value.map(|value| i64::try_from(value).unwrap_or(i64::MAX)),
        unit,
        meaning,
    };
    let drifted = from.ksm_zero_pages_drift.is_some();
    let zero_pages = Counter {
        name: "ksm_zero_pages",
        value: from
            .ksm_zero_pages_drift
            .or_else(|| from.ksm_zero_pages.map(|value| i64::try_from(value).unwrap_or(i64::MAX))),
        unit: "pages",
        meaning: match drifted {
            true => "the kernel's counter has drifted below zero: how many there are is unknown",
            false => "replaced by the zero page; in none of the above",
        },
    };
    vec![
        counter("pages_shared", from.pages_shared, "pages", "merged pages that are in memory, copies counted too"),
        counter("pages_sharing", from.pages_sharing, "pages", "their further users: what merging saves"),
        counter("pages_unshared", from.pages_unshared, "pages", "had no equal in this pass so far"),
        counter("pages_volatile", from.pages_volatile, "pages", "changed, new, or passed over by smart scan"),
        zero_pages,
        counter("stable_node_chains", from.stable_node_chains, "", "contents with more users than max_page_sharing"),
        counter("stable_node_dups", from.stable_node_dups, "pages", "their copies"),
        counter("full_scans", from.full_scans, "passes", "completed; begins again at 0 when the host is unmerged"),
        counter("pages_scanned", from.pages_scanned, "pages", "compared since boot"),
        counter("pages_skipped", from.pages_skipped, "pages", "passed over by smart scan since boot"),
        Counter {
            name: "general_profit",
            value: from.general_profit,
            unit: "bytes",
            meaning: match drifted {
                true => "the kernel's sum, with the counter in it that has drifted",
                false => "the kernel's sum; see what is saved, below",
            },
        },
    ]
}
