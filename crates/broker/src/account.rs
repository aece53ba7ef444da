//! What was merged, as the kernel shows it, and the summary of a run.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use abi::control::Control;
use abi::frozen::{BUCKETS, upper_bound};
use abi::place::Outcome;
use kernel::page_size;
use serde::Serialize;
use store::Partition;

use crate::member::Member;
use crate::roll::Managed;
use crate::sample::Sample;

/// Pages left as they were, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Refusals(pub BTreeMap<&'static str, u64>);

impl Refusals {
    /// Counts one page.
    pub fn count(&mut self, outcome: Outcome) {
        if let Some((_, word)) = Outcome::REFUSALS.iter().find(|(refusal, _)| *refusal == outcome) {
            *self.0.entry(word).or_default() += 1;
        }
    }

    /// Counts pages by another word.
    pub fn add(&mut self, word: &'static str, pages: u64) {
        if pages > 0 {
            *self.0.entry(word).or_default() += pages;
        }
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

/// How long pages were frozen, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct FrozenSeconds {
    /// Half of the batches took at most this.
    pub p50: f64,
    /// 99 % of the batches took at most this.
    pub p99: f64,
    /// 99.9 % of the batches took at most this.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

/// The state of a partition. Page counters are the last sample before the members' end.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// Label, or `null`.
    pub partition: Option<String>,
    /// `store`.
    pub backend: &'static str,
    /// The check in use: `bpf`, `collapse`, `vouch`.
    pub check: &'static str,
    /// Members at this moment, or at the last sample.
    pub processes: u64,
    /// Members ever.
    pub processes_ever: u64,
    /// Who they were, by program, those with the most merged pages first.
    pub managed: Vec<Managed>,
    /// Pages under management.
    pub pages_managed: u64,
    /// Pages of ranges that were handed over and cannot be managed.
    pub pages_unfit: u64,
    /// Anonymous memory in bytes that is never managed, by reason, where programs are managed whole.
    pub left_alone: BTreeMap<&'static str, u64>,
    /// Store pages that are mapped somewhere.
    pub pages_shared: u64,
    /// Mappings of store pages beyond the first of each: pages saved.
    pub pages_sharing: u64,
    /// Zero pages dropped and still not there.
    pub zero_pages: u64,
    /// Bytes saved after bookkeeping, never below 0.
    pub bytes_saved: u64,
    /// The most that was saved at any time.
    pub bytes_saved_peak: u64,
    /// Pages merged, ever.
    pub merges: u64,
    /// Merged pages that were written, ever.
    pub unshared_by_write: u64,
    /// Pages that diverged and have not been taken again.
    pub diverged: u64,
    /// Pages taken out of nearly dead segments, ever.
    pub moved: u64,
    /// Diverged pages taken again, ever.
    pub retaken: u64,
    /// Pages refused, ever, by reason.
    pub refused: Refusals,
    /// How long pages were frozen.
    pub frozen_seconds: FrozenSeconds,
    /// Batches.
    pub batches: u64,
    /// Pages of the store, mapped or not.
    pub store_pages: u64,
    /// Segments of the store.
    pub store_segments: u64,
    /// Time in which nothing was merged because too many threads wanted a CPU.
    pub held_back_seconds: f64,
    /// CPU time of broker and helpers.
    pub cpu_seconds: f64,
    /// Time that helpers took for what they were ordered, each of them counted.
    pub helpers_busy_seconds: f64,
    /// Time since the start.
    pub elapsed_seconds: f64,
    /// Why helpers were not taken in, a line each.
    pub helper_refused: Vec<String>,
    /// Programs that were taken in and have done something that ends merging in them, a line each.
    pub stopped: Vec<String>,
}

/// Counters that only rise, for the whole partition.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) merges: u64,
    pub(crate) retaken: u64,
    pub(crate) zero: u64,
    pub(crate) unshared: u64,
    pub(crate) moved: u64,
    pub(crate) refused: Refusals,
    /// Time in which nothing was merged because too many threads wanted a CPU.
    pub(crate) held_back: Duration,
    /// Time that helpers of members that are gone took for their orders.
    pub(crate) busy: Duration,
    /// Of members that are gone.
    frozen: Vec<u64>,
    frozen_max_ns: u64,
    helper_cpu_ns: u64,
    batches: u64,
}

impl Totals {
    /// Keeps a leaving member's counters.
    pub(crate) fn keep(&mut self, control: &Control) {
        add_frozen(&mut self.frozen, control);
        self.frozen_max_ns = self.frozen_max_ns.max(control.counters.frozen_max_ns.load(SeqCst));
        self.helper_cpu_ns = self.helper_cpu_ns.saturating_add(control.counters.helper_cpu_ns.load(SeqCst));
        self.batches = self.batches.saturating_add(control.counters.batches.load(SeqCst));
    }
}

fn add_frozen(sum: &mut Vec<u64>, control: &Control) {
    sum.resize(BUCKETS, 0);
    for (bucket, count) in sum.iter_mut().zip(&control.counters.frozen) {
        *bucket = bucket.saturating_add(count.load(SeqCst));
    }
}

/// Everything together.
pub(crate) struct Books<'a> {
    pub(crate) label: Option<String>,
    pub(crate) check: &'static str,
    pub(crate) totals: &'a Totals,
    pub(crate) members: &'a [Member],
    pub(crate) members_ever: u64,
    /// Of the members that are there.
    pub(crate) busy: Duration,
    pub(crate) partition: &'a Partition,
    pub(crate) index_entries: u64,
    pub(crate) started: Instant,
    pub(crate) peak: u64,
}

impl Books<'_> {
    /// The summary for a sample.
    pub(crate) fn summary(&self, sample: &Sample) -> Summary {
        let store = self.partition.counters();
        let sharing = sample.mapped.saturating_sub(sample.shared);
        // Pages of the store that nobody maps any more are memory too.
        let idle = store.pages_shared.saturating_sub(sample.shared);
        let books = page::profit::StoreBooks {
            pages_saved: sharing.saturating_sub(idle),
            zero_pages: sample.zero,
            vmas_added: sample.vmas,
            managed_pages: sample.managed,
            index_entries: self.index_entries,
            pages_shared: store.pages_shared,
            segments: store.segments,
        };
        let saved = u64::try_from(books.profit(page_size())).unwrap_or(0);
        let mut frozen = self.totals.frozen.clone();
        let (mut max, mut cpu, mut batches) =
            (self.totals.frozen_max_ns, self.totals.helper_cpu_ns, self.totals.batches);
        for member in self.members {
            let counters = &member.control().counters;
            add_frozen(&mut frozen, member.control());
            max = max.max(counters.frozen_max_ns.load(SeqCst));
            cpu = cpu.saturating_add(counters.helper_cpu_ns.load(SeqCst));
            batches = batches.saturating_add(counters.batches.load(SeqCst));
        }
        let own = kernel::sched::usage(kernel::sched::Whose::Own).cpu().as_secs_f64();
        Summary {
            partition: self.label.clone(),
            backend: "store",
            check: self.check,
            processes: sample.processes,
            processes_ever: self.members_ever,
            managed: Vec::new(),
            pages_managed: sample.managed,
            pages_unfit: sample.unfit,
            left_alone: sample.left_alone.clone(),
            pages_shared: sample.shared,
            pages_sharing: sharing,
            zero_pages: sample.zero,
            bytes_saved: saved,
            bytes_saved_peak: saved.max(self.peak),
            merges: self.totals.merges,
            unshared_by_write: self.totals.unshared,
            diverged: sample.diverged,
            moved: self.totals.moved,
            retaken: self.totals.retaken,
            refused: self.totals.refused.clone(),
            frozen_seconds: FrozenSeconds {
                p50: quantile(&frozen, 0.5),
                p99: quantile(&frozen, 0.99),
                p999: quantile(&frozen, 0.999),
                max: max as f64 / 1e9,
            },
            batches,
            store_pages: store.pages_shared,
            store_segments: store.segments,
            held_back_seconds: self.totals.held_back.as_secs_f64(),
            cpu_seconds: own + cpu as f64 / 1e9,
            helpers_busy_seconds: (self.totals.busy + self.busy).as_secs_f64(),
            elapsed_seconds: self.started.elapsed().as_secs_f64(),
            helper_refused: Vec::new(),
            stopped: Vec::new(),
        }
    }
}

fn quantile(buckets: &[u64], share: f64) -> f64 {
    // Members write these: their sum may be anything.
    let total = buckets.iter().fold(0_u64, |sum, count| sum.saturating_add(*count));
    let mut left = (total as f64 * share).ceil() as u64;
    for (index, count) in buckets.iter().enumerate() {
        if left <= *count && total > 0 {
            return upper_bound(index) as f64 / 1e9;
        }
        left -= (*count).min(left);
    }
    0.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn counters_of_a_hostile_member_overflow_nothing() {
        assert!(quantile(&[u64::MAX; BUCKETS], 0.999) > 0.0);
        assert_eq!(quantile(&[0; BUCKETS], 0.5), 0.0);
    }
}
