//! Which settings are worth what they cost.

use std::time::Duration;

use super::capture::Capture;
use super::scan::Model;
use super::settings::{Advisor, Costs, ScanTime, Settings};
use super::state::State;

/// What settings should reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// Share of [`Reachable::pages`](super::Reachable::pages), 0 to 1.
    pub share: f64,
    /// Time for it, from the start of ksmd.
    pub within: Duration,
}

/// When a goal was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// Time, to one part in 200 of the goal's.
    pub at: Duration,
    /// ksmd's processor time until then.
    pub cpu: Duration,
}

/// What came of one choice of settings.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The choice.
    pub settings: Settings,
    /// When it first saved what the goal asks; `None` if not in time.
    pub reached: Option<Reached>,
    /// The state over the goal's time, at 200 equal steps.
    pub states: Vec<State>,
}

/// Steps of the goal's time.
const STEPS: u32 = 200;

impl Trial {
    /// The state when the goal's time is over.
    pub fn end(&self) -> State {
        self.states.last().copied().unwrap_or_default()
    }
}

/// Runs the capture under each of `settings` for the goal's time.
pub fn compare(capture: &Capture, settings: &[Settings], costs: Costs, goal: Goal) -> Vec<Trial> {
    let wanted = capture.reachable().pages() as f64 * goal.share;
    let trial = |&settings: &Settings| {
        let states = Model::with_costs(capture, settings, costs).timeline(goal.within, goal.within / STEPS);
        let enough = |state: &&State| state.pages_saved() as f64 >= wanted;
        let reached = states.iter().find(enough).map(|state| Reached { at: state.at, cpu: state.cpu });
        Trial { settings, reached, states }
    };
    settings.iter().map(trial).collect()
}

/// Of the trials that reached their goal, the one whose ksmd used the least processor time over the whole of the
/// goal's time: ksmd does not stop when it has merged what there is. `None` if none reached it.
pub fn recommend(trials: &[Trial]) -> Option<&Trial> {
    trials.iter().filter(|trial| trial.reached.is_some()).min_by_key(|trial| trial.end().cpu)
}

/// Settings to compare where nobody names any: the kernel's own, the advisor with several targets, and batches from
/// slow to flat out, each with and without smart scan. Other settings are those of `like`.
pub fn ladder(like: Settings) -> Vec<Settings> {
    const BATCHES: [u32; 8] = [100, 300, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000];
    const TARGETS: [u32; 4] = [200, 100, 50, 20];
    let mut all = Vec::new();
    for smart_scan in [true, false] {
        let base = Settings { smart_scan, sleep_millisecs: 20, advisor: Advisor::None, ..like };
        all.extend(BATCHES.map(|pages_to_scan| Settings { pages_to_scan, ..base }));
        all.extend(TARGETS.map(|target_scan_time| {
            let advisor = Advisor::ScanTime(ScanTime { target_scan_time, ..ScanTime::default() });
            Settings { pages_to_scan: Settings::default().pages_to_scan, advisor, ..base }
        }));
    }
    all
}
