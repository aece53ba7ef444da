//! What came of an advisor's work.
use std::time::Duration;

use super::goals::{Goals, Look};
use super::law::{Decision, Pace};
use crate::pace::Phase;

/// Since the start. Counters are of the whole host.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Summary {
    /// How long.
    pub elapsed_seconds: f64,
    /// The goal for a pass.
    pub target_scan_time_seconds: f64,
    /// The ceiling, per cent of one processor.
    pub max_cpu_percent: f64,
    /// Passes that ended while the goal was in force from their start to their end.
    pub passes_held: u64,
    /// Of those, the ones within 20 % of the goal.
    pub passes_within_20_percent: u64,
    /// Their mean time; `None` without any.
    pub scan_time_seconds: Option<f64>,
    /// The shortest of them.
    pub scan_time_min_seconds: Option<f64>,
    /// The longest.
    pub scan_time_max_seconds: Option<f64>,
    /// All passes that ended.
    pub passes: u64,
    /// ksmd's processor time; `None` where it cannot be seen.
    pub ksmd_cpu_seconds: Option<f64>,
    /// The same in per cent of one processor, rests included.
    pub ksmd_cpu_percent: Option<f64>,
    /// This process's own processor time.
    pub own_cpu_seconds: f64,
    /// Pages compared; `None` where the kernel does not count them.
    pub pages_scanned: Option<u64>,
    /// Pages merged, each time counted that they were.
    pub merges: u64,
    /// Bytes that merging keeps from being there, at the start...
    pub bytes_saved_at_start: u64,
    /// ...and now.
    pub bytes_saved: u64,
    /// Seconds of boost,
    pub boost_seconds: f64,
    /// of the goal's pace,
    pub steady_seconds: f64,
    /// at rest,
    pub rest_seconds: f64,
    /// and in which the ceiling or somebody else kept the goal from being held.
    pub not_held_seconds: f64,
    /// Processes that KSM may merge, now.
    pub processes: usize,
    #[serde(skip)]
    first: Look,
    #[serde(skip)]
    before: Option<(Duration, Phase, bool)>,
    #[serde(skip)]
    sum_seconds: f64,
}

impl Summary {
    pub(super) fn begin(goals: &Goals, first: &Look) -> Self {
        Self {
            elapsed_seconds: 0.0,
            target_scan_time_seconds: goals.scan_time.as_secs_f64(),
            max_cpu_percent: goals.max_cpu * 100.0,
            passes_held: 0,
            passes_within_20_percent: 0,
            scan_time_seconds: None,
            scan_time_min_seconds: None,
            scan_time_max_seconds: None,
            passes: 0,
            ksmd_cpu_seconds: None,
            ksmd_cpu_percent: None,
            own_cpu_seconds: 0.0,
            pages_scanned: None,
            merges: 0,
            bytes_saved_at_start: first.saved * kernel::page_size(),
            bytes_saved: first.saved * kernel::page_size(),
            boost_seconds: 0.0,
            steady_seconds: 0.0,
            rest_seconds: 0.0,
            not_held_seconds: 0.0,
            processes: 0,
            first: *first,
            before: None,
            sum_seconds: 0.0,
        }
    }

    pub(super) fn add(&mut self, now: &Look, decision: &Decision, merges: u64) {
        let lost = matches!(decision.pace, Pace::Ceiling { .. } | Pace::Overruled { .. });
        if let Some((at, phase, lost)) = self.before.replace((now.at, decision.phase, lost)) {
            let seconds = now.at.saturating_sub(at).as_secs_f64();
            *match phase {
                Phase::Boost => &mut self.boost_seconds,
                Phase::Steady => &mut self.steady_seconds,
                Phase::Idle => &mut self.rest_seconds,
            } += seconds;
            self.not_held_seconds += if lost { seconds } else { 0.0 };
        }
        self.elapsed_seconds = now.at.as_secs_f64();
        let cpu = now.ksmd_cpu.zip(self.first.ksmd_cpu).map(|(now, first)| now.saturating_sub(first).as_secs_f64());
        self.ksmd_cpu_seconds = cpu;
        self.ksmd_cpu_percent = cpu.map(|cpu| cpu / self.elapsed_seconds.max(1e-9) * 100.0);
        self.own_cpu_seconds = kernel::sched::usage(kernel::sched::Whose::Own).cpu().as_secs_f64();
        self.pages_scanned =
            now.pages_scanned.zip(self.first.pages_scanned).map(|(now, first)| now.saturating_sub(first));
        self.merges = merges;
        self.bytes_saved = now.saved * kernel::page_size();
        let Some(pass) = decision.pass else { return };
        self.passes += pass.passes;
        if !pass.held {
            return;
        }
        self.passes_held += pass.passes;
        self.sum_seconds += pass.seconds * pass.passes as f64;
        if (pass.seconds / self.target_scan_time_seconds - 1.0).abs() <= 0.2 {
            self.passes_within_20_percent += pass.passes;
        }
        let or = |known: Option<f64>, choose: fn(f64, f64) -> f64| {
            Some(known.map_or(pass.seconds, |known| choose(known, pass.seconds)))
        };
        self.scan_time_seconds = Some(self.sum_seconds / self.passes_held as f64);
        self.scan_time_min_seconds = or(self.scan_time_min_seconds, f64::min);
        self.scan_time_max_seconds = or(self.scan_time_max_seconds, f64::max);
    }
}
