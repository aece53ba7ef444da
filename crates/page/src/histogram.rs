//! Durations in logarithmic buckets: eight to an octave, so any figure read from it is at most an eighth too high.

use std::time::Duration;

/// Sub-buckets of an octave, as a power of two.
const SUB_BITS: u32 = 3;
/// Durations below 2^6 ns (64 ns) are not told apart: no wait on a page is shorter.
const FIRST_OCTAVE: u32 = 6;
/// The last octave ends at 2^37 ns (137 s).
const OCTAVES: u32 = 31;
const BUCKETS: usize = 1 + ((OCTAVES as usize) << SUB_BITS);

/// Counts of durations from 64 ns to 137 s in buckets of an eighth of an octave. What lies outside is counted in the
/// first or last bucket; the longest is kept exactly.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    count: u64,
    sum_ns: u128,
    max_ns: u64,
}

/// One bucket of a [`Histogram`] and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Shortest duration that falls into it.
    pub from: Duration,
    /// Shortest duration that falls into the next.
    pub to: Duration,
    /// Durations counted.
    pub count: u64,
}

impl Histogram {
    /// An empty one.
    pub fn new() -> Self {
        Self { counts: Box::new([0; BUCKETS]), count: 0, sum_ns: 0, max_ns: 0 }
    }

    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket_of(ns)] += 1;
        self.count += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// Adds all that `other` counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts.iter()) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The exact mean, zero where nothing was counted.
    pub fn mean(&self) -> Duration {
        let mean = self.sum_ns.checked_div(u128::from(self.count)).unwrap_or(0);
        Duration::from_nanos(u64::try_from(mean).unwrap_or(u64::MAX))
    }

    /// The longest, exactly; zero where nothing was counted.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max_ns)
    }

    /// The duration that a share `quantile` (0 to 1) of all counted did not exceed: the upper edge of the bucket in
    /// which it lies, never more than [`max`](Self::max). Zero where nothing was counted.
    pub fn quantile(&self, quantile: f64) -> Duration {
        let wanted = ((self.count as f64 * quantile).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                // The last bucket also holds what lies beyond it.
                let edge = if bucket + 1 == BUCKETS { self.max_ns } else { lower_edge(bucket + 1) };
                return Duration::from_nanos(edge.min(self.max_ns));
            }
        }
        Duration::ZERO
    }

    /// The median.
    pub fn p50(&self) -> Duration {
        self.quantile(0.5)
    }

    /// What one in a hundred exceeds.
    pub fn p99(&self) -> Duration {
        self.quantile(0.99)
    }

    /// What one in a thousand exceeds.
    pub fn p999(&self) -> Duration {
        self.quantile(0.999)
    }

    /// The buckets that hold something, shortest first.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> + '_ {
        self.counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(bucket, count)| Bucket {
            from: Duration::from_nanos(lower_edge(bucket)),
            to: Duration::from_nanos(lower_edge(bucket + 1)),
            count: *count,
        })
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Histogram")
            .field("count", &self.count)
            .field("p50", &self.p50())
            .field("p99", &self.p99())
            .field("p999", &self.p999())
            .field("max", &self.max())
            .finish()
    }
}

fn bucket_of(ns: u64) -> usize {
    if ns < 1 << FIRST_OCTAVE {
        return 0;
    }
    let octave = ns.ilog2();
    let sub = (ns >> (octave - SUB_BITS)) as usize & ((1 << SUB_BITS) - 1);
    let bucket = 1 + (((octave - FIRST_OCTAVE) as usize) << SUB_BITS) + sub;
    bucket.min(BUCKETS - 1)
}

fn lower_edge(bucket: usize) -> u64 {
    let Some(above) = bucket.checked_sub(1) else { return 0 };
    let octave = FIRST_OCTAVE + (above >> SUB_BITS) as u32;
    let sub = (above & ((1 << SUB_BITS) - 1)) as u64;
    ((1 << SUB_BITS) + sub) << (octave - SUB_BITS)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn edges_and_buckets_agree_everywhere() {
        for bucket in 0..BUCKETS {
            assert_eq!(bucket_of(lower_edge(bucket)), bucket);
            assert_eq!(bucket_of(lower_edge(bucket + 1) - 1), bucket);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert!(lower_edge(BUCKETS) > 100_000_000_000, "100 s are inside");
    }

    #[test]
    fn an_empty_one_says_zero() {
        let empty = Histogram::new();
        assert_eq!(
            (empty.p999(), empty.max(), empty.mean(), empty.count()),
            (Duration::ZERO, Duration::ZERO, Duration::ZERO, 0)
        );
    }

    #[test]
    fn beyond_the_last_bucket_the_longest_is_still_exact() {
        let mut histogram = Histogram::new();
        histogram.record(Duration::from_secs(3600));
        assert_eq!(histogram.p50(), Duration::from_secs(3600));
    }

    proptest! {
        /// Against the sorted list: never below the true quantile and at most an eighth above it; merging two equals
        /// counting everything in one.
        #[test]
        fn quantiles_are_an_eighth_off_at_most(
            left in proptest::collection::vec(64_u64..100_000_000_000, 1..200),
            right in proptest::collection::vec(64_u64..10_000_000, 0..200),
            quantile in 0.0_f64..=1.0,
        ) {
            let mut all = Histogram::new();
            let (mut a, mut b) = (Histogram::new(), Histogram::new());
            for ns in &left { a.record(Duration::from_nanos(*ns)); all.record(Duration::from_nanos(*ns)); }
            for ns in &right { b.record(Duration::from_nanos(*ns)); all.record(Duration::from_nanos(*ns)); }
            a.merge(&b);
            prop_assert!(a == all);
            let mut sorted: Vec<u64> = left.iter().chain(&right).copied().collect();
            sorted.sort_unstable();
            let rank = ((sorted.len() as f64 * quantile).ceil() as usize).clamp(1, sorted.len());
            let truth = sorted[rank - 1];
            let told = u64::try_from(all.quantile(quantile).as_nanos()).unwrap();
            prop_assert!(told >= truth && told <= truth + truth / 8 + 1, "{told} for {truth}");
            prop_assert_eq!(all.max(), Duration::from_nanos(*sorted.last().unwrap()));
            prop_assert_eq!(all.count(), sorted.len() as u64);
        }
    }
}
