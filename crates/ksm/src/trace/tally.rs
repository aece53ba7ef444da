//! Counting events.

use std::collections::{BTreeMap, HashMap, HashSet};

use rustix::time::{ClockId, clock_gettime};

use super::decode::{Event, How, Mm};
use super::names::{Name, Names};
use super::report::{Advised, Bucket, Failures, Merges, Passes, ProcessTrace, Second, TraceReport};

/// Seconds and runs of the advisor that are kept.
const KEPT: usize = 3600;

/// Counts of what was seen so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// The instance's clock at the begin, ns.
    begun: u64,
    pass_begun: Option<u64>,
    /// How long passes took, ns.
    passes: Vec<u64>,
    last_event: u64,
    rmap_entries: Option<u64>,
    failures: BTreeMap<String, u64>,
    ksm_pages_removed: u64,
    entered: u64,
    exited: u64,
    advisor: Vec<Advised>,
    spaces: HashMap<Mm, Counts>,
    /// Those that have gone, by the name that they had.
    gone: Vec<(Option<Name>, Counts)>,
    /// Spaces with events whose name is not known, since it was last asked.
    nameless: HashSet<Mm>,
    seconds: BTreeMap<u64, Second>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    merges: Merges,
    failed: u64,
}

impl Tally {
    /// From now on.
    pub(super) fn begin(&mut self) {
        let now = clock_gettime(ClockId::Monotonic);
        let part = |value: i64| u64::try_from(value).unwrap_or(0);
        self.begun = part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec);
    }

    /// True if events came that nobody is known for, since it was last asked.
    pub(super) fn has_nameless(&self) -> bool {
        !self.nameless.is_empty()
    }

    pub(super) fn asked(&mut self) {
        self.nameless.clear();
    }

    /// Counts an event, in the order of time; false if it is none of KSM's.
    pub(super) fn take(&mut self, time: u64, event: &Event, names: &mut Names) -> bool {
        match *event {
            Event::Mark { .. } | Event::Locked { .. } => return false,
            Event::Start { rmap_entries } => {
                self.pass_begun = Some(time);
                self.rmap_entries = Some(rmap_entries);
            }
            Event::Stop => {
                // The pass that was under way at the begin has no begin.
                if let Some(begun) = self.pass_begun.take() {
                    self.passes.push(time.saturating_sub(begun));
                }
                self.second(time).passes += 1;
            }
            Event::Enter { mm } => {
                self.entered += 1;
                // The place of one that has gone without a word: ksmd had dropped it before.
                self.ended(mm, names);
                self.nameless.insert(mm);
            }
            Event::Exit { mm } => {
                self.exited += 1;
                self.ended(mm, names);
                self.nameless.remove(&mm);
            }
            Event::Merge { mm, how, error } => self.merge(time, mm, how, error, names),
            Event::RemovePage => self.ksm_pages_removed += 1,
            Event::RemoveItem => {}
            Event::Advisor { seconds, pages_to_scan, cpu_percent } => {
                if self.advisor.len() == KEPT {
                    self.advisor.remove(0);
                }
                self.advisor.push(Advised { scan_time: seconds, pages_to_scan, cpu_percent });
            }
        }
        self.last_event = self.last_event.max(time);
        true
    }

    fn merge(&mut self, time: u64, mm: Mm, how: How, error: i64, names: &Names) {
        if names.of(mm).is_none() {
            self.nameless.insert(mm);
        }
        let counts = self.spaces.entry(mm).or_default();
        if error != 0 {
            counts.failed += 1;
            *self.failures.entry(word(error)).or_default() += 1;
            self.second(time).failed += 1;
            return;
        }
        match how {
            How::Joined => counts.merges.joined += 1,
            How::Promoted => counts.merges.promoted += 1,
            How::Zero => counts.merges.zero_pages += 1,
        }
        let second = self.second(time);
        match how {
            How::Zero => second.zero_pages += 1,
            How::Joined | How::Promoted => second.merged += 1,
        }
    }

    fn ended(&mut self, mm: Mm, names: &mut Names) {
        let name = names.forget(mm);
        if let Some(counts) = self.spaces.remove(&mm) {
            self.gone.push((name, counts));
        }
    }

    fn second(&mut self, time: u64) -> &mut Second {
        let second = time.saturating_sub(self.begun) / 1_000_000_000;
        while self.seconds.len() > KEPT {
            self.seconds.pop_first();
        }
        self.seconds.entry(second).or_insert(Second { second, ..Second::default() })
    }

    /// The second before the one that the last event came in, or the clock is in.
    pub(super) fn last_second(&self) -> Option<Second> {
        let now = clock_gettime(ClockId::Monotonic);
        let now = u64::try_from(now.tv_sec).ok()? * 1_000_000_000 + u64::try_from(now.tv_nsec).ok()?;
        // Counted from the beginning, as the events are.
        let second = (now.saturating_sub(self.begun) / 1_000_000_000).checked_sub(1)?;
        Some(self.seconds.get(&second).copied().unwrap_or(Second { second, ..Second::default() }))
    }

    /// Everything so far.
    pub(super) fn report(&self, names: &Names) -> TraceReport {
        let mut processes: BTreeMap<(i32, u64), ProcessTrace> = BTreeMap::new();
        let mut unattributed = ProcessTrace::default();
        let mut merges = Merges::default();
        let living = self.spaces.iter().map(|(mm, counts)| (names.of(*mm), counts, false));
        let gone = self.gone.iter().map(|(name, counts)| (name.as_ref(), counts, true));
        for (name, counts, ended) in gone.chain(living) {
            add(&mut merges, counts.merges);
            let of = match name {
                Some(name) => {
                    let of = processes.entry((name.process.pid, name.process.start_time)).or_default();
                    (of.pid, of.ended) = (name.process.pid, ended);
                    of.comm.clone_from(&name.comm);
                    of
                }
                None => &mut unattributed,
            };
            of.address_spaces += 1;
            of.failed += counts.failed;
            add(&mut of.merges, counts.merges);
        }
        let mut processes: Vec<ProcessTrace> = processes.into_values().collect();
        processes.sort_by_key(|process| std::cmp::Reverse((all(process.merges), process.failed)));
        TraceReport {
            passes: self.passes(),
            merges,
            failures: Failures(self.failures.clone()),
            ksm_pages_removed: self.ksm_pages_removed,
            entered: self.entered,
            exited: self.exited,
            advisor: self.advisor.clone(),
            processes,
            unattributed,
            can_attribute: names.can_tell(),
            timeline: self.seconds.values().copied().collect(),
            ..TraceReport::default()
        }
    }

    fn passes(&self) -> Passes {
        let mut times = self.passes.clone();
        times.sort_unstable();
        let seconds = |time: &u64| *time as f64 / 1e9;
        let mut bars: BTreeMap<u32, u64> = BTreeMap::new();
        for time in &times {
            // The number of the first power of two of a millisecond above it.
            *bars.entry((time / 1_000_000).checked_ilog2().map_or(0, |log| log + 1)).or_default() += 1;
        }
        let bucket =
            |(power, passes): (u32, u64)| Bucket { below_seconds: 2_f64.powi(power.cast_signed()) / 1e3, passes };
        Passes {
            completed: times.len() as u64,
            shortest_seconds: times.first().map(seconds),
            median_seconds: times.get(times.len() / 2).map(seconds),
            longest_seconds: times.last().map(seconds),
            under_way_seconds: self.pass_begun.map(|begun| seconds(&self.last_event.saturating_sub(begun))),
            rmap_entries: self.rmap_entries,
            histogram: bars.into_iter().map(bucket).collect(),
        }
    }
}

fn add(sum: &mut Merges, other: Merges) {
    sum.joined += other.joined;
    sum.promoted += other.promoted;
    sum.zero_pages += other.zero_pages;
}

fn all(merges: Merges) -> u64 {
    merges.joined + merges.promoted + merges.zero_pages
}

/// The kernel's error by its name.
fn word(error: i64) -> String {
    match -error {
        11 => "EAGAIN".to_owned(),
        12 => "ENOMEM".to_owned(),
        14 => "EFAULT".to_owned(),
        16 => "EBUSY".to_owned(),
        number => format!("error {number}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::proc_stat::ProcessId;

    fn name(pid: i32) -> Name {
        Name { process: ProcessId { pid, start_time: 1 }, comm: format!("p{pid}") }
    }

    fn merge(mm: u64, how: How, error: i64) -> Event {
        Event::Merge { mm: Mm(mm), how, error }
    }

    #[test]
    fn merges_are_counted_by_process_and_a_place_that_is_given_on_is_another() {
        let mut names = Names::with([(Mm(1), name(10)), (Mm(2), name(20))]);
        let mut tally = Tally::default();
        let mut take = |events: &[Event], names: &mut Names| {
            events.iter().enumerate().for_each(|(time, event)| {
                tally.take(time as u64 * 400_000_000, event, names);
            });
            tally.report(names)
        };
        let report = take(
            &[
                merge(1, How::Promoted, 0),
                merge(2, How::Joined, 0),
                merge(2, How::Joined, -14),
                merge(1, How::Zero, 0),
                Event::Exit { mm: Mm(1) },
                Event::Enter { mm: Mm(1) },
                merge(1, How::Joined, 0),
            ],
            &mut names,
        );
        assert_eq!(report.merges, Merges { joined: 2, promoted: 1, zero_pages: 1 });
        assert_eq!(report.failures.0["EFAULT"], 1);
        let of = |pid: i32| report.processes.iter().find(|process| process.pid == pid).unwrap();
        assert_eq!((of(10).merges, of(10).ended), (Merges { joined: 0, promoted: 1, zero_pages: 1 }, true));
        assert_eq!((of(20).merges.joined, of(20).failed, of(20).ended), (1, 1, false));
        assert_eq!((report.unattributed.merges.joined, report.unattributed.address_spaces), (1, 1), "not pid 10's");
        assert_eq!(report.timeline[0], Second { second: 0, passes: 0, merged: 2, zero_pages: 0, failed: 1 });
        assert_eq!((report.timeline[1].zero_pages, report.timeline[2].merged), (1, 1));
    }

    #[test]
    fn passes_are_timed_from_begin_to_end_only() {
        let (mut names, mut tally) = (Names::default(), Tally::default());
        let ms = 1_000_000;
        for (time, event) in [
            (ms, Event::Stop),
            (2 * ms, Event::Start { rmap_entries: 7 }),
            (2 * ms + 400_000, Event::Stop),
            (3 * ms, Event::Start { rmap_entries: 8 }),
            (6 * ms, Event::Stop),
            (7 * ms, Event::Start { rmap_entries: 9 }),
            (11 * ms, Event::Stop),
            (12 * ms, Event::Start { rmap_entries: 9 }),
            (13 * ms, Event::RemovePage),
        ] {
            tally.take(time, &event, &mut names);
        }
        let passes = tally.report(&names).passes;
        let bars: Vec<(f64, u64)> = passes.histogram.iter().map(|bar| (bar.below_seconds, bar.passes)).collect();
        assert_eq!(bars, [(0.001, 1), (0.004, 1), (0.008, 1)]);
        assert_eq!((passes.completed, passes.median_seconds, passes.longest_seconds), (3, Some(0.003), Some(0.004)));
        assert_eq!((passes.under_way_seconds, passes.rmap_entries), (Some(0.001), Some(9)));
    }
}
