//! What came of all runs.
use serde::Serialize;

use super::judge::{Aim, Verdict};
use super::run::Run;
use super::setting::{How, Setting};

/// The middle one and the ends of what was measured several times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one; of two the mean.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// Where the middle one of ever so many runs is to be looked for: nine times in ten it lies above this...
    pub low: f64,
    /// ...and below this. The ends of what was measured, where that is little.
    pub high: f64,
}

impl Spread {
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else { return Self::default() };
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        // How many lie below the true middle varies by half the root of their number: so many of each end are left out.
        let count = values.len() as f64;
        let left_out = ((count - 1.645 * count.sqrt()) / 2.0).max(0.0) as usize;
        Self { median, min, max, low: values[left_out], high: values[values.len() - 1 - left_out] }
    }

    /// The runs do not tell which of the two is larger.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.low <= other.high && other.low <= self.high
    }

    pub(super) fn negated(self) -> Self {
        Self { median: -self.median, min: -self.max, max: -self.min, low: -self.high, high: -self.low }
    }
}

/// A setting with its runs.
#[derive(Clone, Debug, Serialize)]
pub struct Tried {
    /// The setting.
    #[serde(flatten)]
    pub setting: Setting,
    /// ksmd was stopped.
    #[serde(skip)]
    pub off: bool,
    /// Runs that [count](Run::counts); the figures are theirs.
    pub good: usize,
    /// From start to end.
    pub run_seconds: Spread,
    /// Of the command.
    pub cpu_seconds: Spread,
    /// Of ksmd.
    pub ksmd_cpu_seconds: Spread,
    /// On average over a run.
    pub bytes_saved_mean: Spread,
    /// The most of a run.
    pub bytes_saved_peak: Spread,
    /// MiB saved on average for a second of ksmd; `None` where ksmd did not work.
    pub mib_per_cpu_second: Option<Spread>,
    /// A pass; `None` where too few ended.
    pub scan_time_seconds: Option<Spread>,
    /// Share of time in which some thread waited for memory.
    pub memory_pressure: Spread,
    /// Share of time in which some thread waited for a processor.
    pub cpu_pressure: Spread,
    /// Every run.
    pub runs: Vec<Run>,
}

impl Tried {
    pub(super) fn of(setting: Setting, runs: Vec<Run>) -> Self {
        let good: Vec<&Run> = runs.iter().filter(|run| run.counts()).collect();
        let spread = |what: fn(&Run) -> f64| Spread::of(good.iter().map(|run| what(run)));
        let some = |values: Vec<f64>| (!values.is_empty()).then(|| Spread::of(values));
        let mib = |run: &&Run| {
            let seconds = run.ksmd_cpu_seconds;
            (seconds > 1e-3).then(|| run.bytes_saved_mean / f64::from(1 << 20) / seconds)
        };
        Self {
            off: setting.how == How::Off,
            good: good.len(),
            run_seconds: spread(|run| run.run_seconds),
            cpu_seconds: spread(|run| run.cpu_seconds),
            ksmd_cpu_seconds: spread(|run| run.ksmd_cpu_seconds),
            bytes_saved_mean: spread(|run| run.bytes_saved_mean),
            bytes_saved_peak: spread(|run| run.bytes_saved_peak as f64),
            mib_per_cpu_second: some(good.iter().filter_map(mib).collect()),
            scan_time_seconds: some(good.iter().filter_map(|run| run.scan_time_seconds).collect()),
            memory_pressure: spread(|run| run.memory_pressure),
            cpu_pressure: spread(|run| run.cpu_pressure),
            setting,
            runs,
        }
    }

    /// There is something to judge by.
    pub(super) fn counts(&self) -> bool {
        self.good > 0
    }
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The command.
    pub command: Vec<String>,
    /// Every run that was planned came to its end.
    pub complete: bool,
    /// How often each setting was to be run.
    pub repeat: u32,
    /// What was wanted.
    pub goal: Aim,
    /// The best setting's name; `None` if the runs do not tell.
    pub best: Option<String>,
    /// Names of those that may be the best, as the runs do not tell; there is none then.
    pub ties: Vec<String>,
    /// Why, in words.
    pub why: String,
    /// Kernel release.
    pub kernel: String,
    /// Processors.
    pub cpus: usize,
    /// Whether ksmd could be seen; without, its time reads 0.
    pub ksmd_seen: bool,
    /// What readers should know: runs that failed, were disturbed or did not begin afresh.
    pub notes: Vec<String>,
    /// The settings, in their order.
    pub settings: Vec<Tried>,
}

impl Report {
    pub(super) fn new(
        command: Vec<String>,
        (goal, repeat, complete, ksmd_seen): (Aim, u32, bool, bool),
        tried: Vec<Tried>,
    ) -> Self {
        let Verdict { best, ties, why } = goal.judge(&tried);
        let name = |at: usize| tried[at].setting.name.clone();
        Self {
            command,
            complete,
            repeat,
            goal,
            best: best.map(name),
            ties: ties.into_iter().map(name).collect(),
            why,
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            ksmd_seen,
            notes: notes(&tried, complete, ksmd_seen),
            settings: tried,
        }
    }
}

fn notes(tried: &[Tried], complete: bool, ksmd_seen: bool) -> Vec<String> {
    let count = |what: fn(&Run) -> bool| tried.iter().flat_map(|tried| &tried.runs).filter(|run| what(run)).count();
    let mut notes = Vec::new();
    let mut note = |number: usize, text: &str| {
        if number > 0 {
            notes.push(format!("{number} {text}"));
        }
    };
    note(count(|run| !run.succeeded()), "runs failed (another status than 0, or a signal): their figures do not count");
    note(count(|run| run.taken.is_some()), "runs are void: somebody else wrote a setting of KSM while they were made");
    note(count(|run| run.disturbed), "runs were disturbed: somebody else asked for settings of KSM meanwhile");
    note(count(|run| !run.fresh), "runs began while ksmd still knew of other processes that changed");
    note(count(|run| run.left_behind > 0), "runs left processes behind, which were ended");
    if !ksmd_seen {
        notes.push("ksmd cannot be seen here: its processor time is not known".to_owned());
    }
    if !complete {
        notes.push("the sweep did not come to its end: not every run is in it".to_owned());
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        let three = Spread { median: 2.0, min: 1.0, max: 3.0, low: 1.0, high: 3.0 };
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), three);
        assert_eq!(Spread::of([1.0, 2.0]).median, 1.5);
        assert_eq!(Spread::of([]), Spread::default());
        let at = |min, max| Spread { median: min, min, max, low: min, high: max };
        assert!(at(1.0, 2.0).overlaps(at(2.0, 3.0)) && !at(1.0, 2.0).overlaps(at(2.1, 3.0)));
        assert!(at(1.0, 2.0).negated().overlaps(at(-1.5, 0.0)));
    }

    /// Seen to fail: the more runs there were, the further apart were the ends, and the less they told.
    #[test]
    fn more_runs_tell_more() {
        let runs = |middle: f64, count: u32| {
            // From 10 below to 10 above the middle, most of them near it.
            let at = move |place: u32| f64::from(2 * place) / f64::from(count - 1) - 1.0;
            Spread::of((0..count).map(move |place| middle + 10.0 * at(place).powi(3)))
        };
        for (count, told) in [(3, false), (10, true), (40, true)] {
            assert_eq!(!runs(100.0, count).overlaps(runs(105.0, count)), told, "{count} runs");
        }
        let twenty = Spread::of((1..=20).map(f64::from));
        assert_eq!((twenty.low, twenty.high, twenty.min, twenty.max), (7.0, 14.0, 1.0, 20.0));
    }
}
