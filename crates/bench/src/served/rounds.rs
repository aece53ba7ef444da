//! All rounds of one way, of one program under one load, taken together.

use super::measure::Outcome;
use super::way::Way;

/// A number of several rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Range {
    pub(super) mean: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// The rounds in which a way was measured, each with the `plain` of the same round: what else the machine did is more
/// alike within a round than across them.
#[derive(Clone, Debug)]
pub(super) struct Rounds<'a> {
    pub(super) way: Way,
    pub(super) first: &'a Outcome,
    measured: Vec<(&'a Outcome, Option<&'a Outcome>)>,
}

/// The outcome without merging that another one is compared with.
pub(super) fn plain_of(outcomes: &[Outcome], round: u16) -> Option<&Outcome> {
    outcomes.iter().find(|outcome| outcome.way == Way::Plain && outcome.round == round)
}

impl Range {
    /// `None` of nothing.
    fn of(numbers: impl Iterator<Item = f64>) -> Option<Self> {
        let numbers: Vec<f64> = numbers.collect();
        let (low, high) = (numbers.iter().copied().reduce(f64::min)?, numbers.iter().copied().reduce(f64::max)?);
        Some(Self { mean: numbers.iter().sum::<f64>() / numbers.len() as f64, low, high })
    }

    /// The mean with the range, in a unit that many times smaller.
    fn text(self, times: f64, digits: usize) -> String {
        let [mean, low, high] = [self.mean, self.low, self.high].map(|number| number * times);
        format!("{mean:.digits$} ({low:.digits$} to {high:.digits$})")
    }
}

impl<'a> Rounds<'a> {
    /// The rounds of a way; `None` if it was measured in none.
    pub(super) fn of(outcomes: &'a [Outcome], way: Way) -> Option<Self> {
        let of_way = outcomes.iter().filter(|outcome| outcome.way == way);
        let measured: Vec<_> = of_way.map(|outcome| (outcome, plain_of(outcomes, outcome.round))).collect();
        let (first, _) = measured.first().copied()?;
        Some(Self { way, first, measured })
    }

    /// Of each way that was measured, in the order in which they were first.
    pub(super) fn of_all(outcomes: &'a [Outcome]) -> Vec<Self> {
        let mut ways: Vec<Way> = Vec::new();
        for outcome in outcomes {
            if !ways.contains(&outcome.way) {
                ways.push(outcome.way);
            }
        }
        ways.into_iter().filter_map(|way| Self::of(outcomes, way)).collect()
    }

    /// A number of the way.
    pub(super) fn range(&self, number: impl Fn(&Outcome) -> f64) -> Range {
        Range::of(self.measured.iter().map(|(outcome, _)| number(outcome))).unwrap_or_default()
    }

    /// A number of the way beside `plain`; `None` without any round that has both.
    pub(super) fn beside_plain(&self, number: impl Fn(&Outcome, &Outcome) -> f64) -> Option<Range> {
        Range::of(self.measured.iter().filter_map(|(outcome, plain)| Some(number(outcome, (*plain)?))))
    }

    /// In each round [`Outcome::is_settled`].
    pub(super) fn are_settled(&self) -> bool {
        self.measured.iter().all(|(outcome, _)| outcome.is_settled())
    }

    /// A line of the table that ends several rounds.
    pub(super) fn row(&self, rounds: u16) -> String {
        let mib = 1.0 / f64::from(1 << 20);
        let (program, load) = (self.first.program.name(), self.first.load.name());
        let mut text = format!(
            "{program:<10} {load:<4} {:<30} {} of {rounds} rounds: {} MiB",
            self.way.name(),
            self.measured.len(),
            self.range(|outcome| outcome.private_bytes).text(mib, 1),
        );
        if self.way != Way::Plain {
            let parts = [
                (", saved ", self.beside_plain(Outcome::saved_mib), 1.0, 1, " MiB"),
                (" = ", self.beside_plain(Outcome::saved_share), 100.0, 1, " %"),
                (", ", self.beside_plain(Outcome::saved_mib_per_cpu_second), 1.0, 0, " MiB for a CPU second"),
                (", ", self.beside_plain(Outcome::slowdown), 100.0, 1, " % CPU more for a request"),
                (" = ", self.beside_plain(Outcome::added_cpu), 100.0, 2, " % of a CPU"),
            ];
            for (before, range, times, digits, after) in parts {
                let Some(range) = range else { continue };
                text.push_str(&format!("{before}{}{after}", range.text(times, digits)));
            }
        }
        let wrong: u64 = self.measured.iter().map(|(outcome, _)| outcome.wrong_answers + outcome.wrong_workers).sum();
        text.push_str(&format!(
            "; CPU {} s; {} requests/s, {} for a CPU second; ms p50 {} p99 {} max {}, all data {} then {}; wrong {wrong}",
            self.range(|outcome| outcome.cpu_seconds).text(1.0, 2),
            self.range(|outcome| outcome.requests_per_second).text(1.0, 1),
            self.range(|outcome| outcome.requests_per_cpu_second).text(1.0, 0),
            self.range(|outcome| outcome.latency.p50).text(1e3, 2),
            self.range(|outcome| outcome.latency.p99).text(1e3, 2),
            self.range(|outcome| outcome.latency.max).text(1e3, 2),
            self.range(|outcome| outcome.read_all_first_seconds).text(1e3, 2),
            self.range(|outcome| outcome.read_all_again_seconds).text(1e3, 2),
        ));
        if !self.are_settled() {
            text.push_str("; too few passes");
        }
        text
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::served::kind::Kind;
    use crate::served::load::{Latency, Load};

    /// Workers that have so many MiB.
    pub(in crate::served) fn outcome(way: Way, round: u16, mib: f64) -> Outcome {
        Outcome {
            program: Kind::Python,
            load: Load::Busy,
            way,
            round,
            workers: 2,
            loading_seconds: 1.0,
            seconds: 10.0,
            looks: Vec::new(),
            private_bytes: mib * f64::from(1 << 20),
            store_bytes: 0.0,
            managers_bytes: 0.0,
            private_checked_bytes: 0,
            cpu_seconds: 2.0,
            ksmd_passes: None,
            digests: Vec::new(),
            workers_cpu_seconds: 1.0,
            requests: 10,
            requests_per_second: 1.0,
            requests_per_cpu_second: 10.0,
            settled_requests_per_cpu_second: 10.0,
            latency: Latency::default(),
            settled_latency: Latency::default(),
            read_all_first_seconds: 0.1,
            read_all_again_seconds: 0.1,
            wrong_answers: 0,
            wrong_workers: 0,
            ksm: None,
            ksm_settings: None,
            summary: None,
        }
    }

    /// Seen to fail: with one round's `plain` for all.
    #[test]
    fn rounds_have_a_mean_and_a_range_and_are_compared_with_their_own_plain() {
        let outcomes = [
            outcome(Way::Plain, 1, 100.0),
            outcome(Way::Pagefold, 1, 60.0),
            outcome(Way::Plain, 2, 200.0),
            outcome(Way::Pagefold, 2, 80.0),
            // This one's plain has failed.
            outcome(Way::Pagefold, 3, 10.0),
        ];
        let all = Rounds::of_all(&outcomes);
        assert_eq!(all.iter().map(|rounds| rounds.way).collect::<Vec<_>>(), [Way::Plain, Way::Pagefold]);
        let mib = |outcome: &Outcome| outcome.private_bytes / f64::from(1 << 20);
        assert_eq!(all[1].range(mib), Range { mean: 50.0, low: 10.0, high: 80.0 });
        let saved = all[1].beside_plain(Outcome::saved_mib);
        assert_eq!(saved, Some(Range { mean: 80.0, low: 40.0, high: 120.0 }));
        let row = all[1].row(3);
        assert!(row.contains("3 of 3 rounds: 50.0 (10.0 to 80.0) MiB, saved 80.0 (40.0 to 120.0) MiB = "), "{row}");
        assert!(all[0].row(3).contains("2 of 3 rounds: 150.0 (100.0 to 200.0) MiB; CPU"), "{}", all[0].row(3));
        assert!(Rounds::of(&outcomes, Way::Ksm).is_none());
        assert!(Rounds::of(&outcomes[4..], Way::Pagefold).unwrap().beside_plain(Outcome::saved_mib).is_none());
    }
}
