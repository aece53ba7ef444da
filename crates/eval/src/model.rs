//! What ksmd would make of a snapshot under different settings: [`page::ksmd`] run on what was read.

use std::time::Duration;

use kernel::{KsmSysfs, page_size};
use page::ksmd::{Advisor, CaptureError, Costs, Goal, ScanTime, Settings, State, Trial, compare, ladder, recommend};
use serde::Serialize;
use thiserror::Error;

use crate::snapshot::Snapshot;

/// Points of a curve.
const POINTS: usize = 60;

/// Why there is no model.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The snapshot has kept no contents, or only of a sample.
    #[error("the model of ksmd needs all pages, not a sample")]
    NotRecorded,
    /// The looks do not fit together.
    #[error(transparent)]
    Capture(#[from] CaptureError),
}

/// What ksmd would do.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// What there is to save, as [`page::ksmd::Capture::reachable`] has it, in bytes.
    pub bytes_reachable: u64,
    /// What was asked for: a share of that...
    pub goal_share: f64,
    /// ...within so many seconds.
    pub goal_seconds: f64,
    /// Choices of settings, this machine's own first, where they are known.
    pub trials: Vec<TrialReport>,
    /// Place of the recommended one: the least CPU among those that reach the goal.
    pub recommended: Option<usize>,
}

/// One choice of settings.
#[derive(Clone, Debug, Serialize)]
pub struct TrialReport {
    /// These are set on this machine now.
    pub now: bool,
    /// `pages_to_scan` at the start.
    pub pages_to_scan: u32,
    /// `sleep_millisecs`.
    pub sleep_millisecs: u32,
    /// `smart_scan`.
    pub smart_scan: bool,
    /// `use_zero_pages`.
    pub use_zero_pages: bool,
    /// `advisor_target_scan_time` where `advisor_mode` is scan-time.
    pub advisor_target_scan_time: Option<u32>,
    /// Seconds until the goal was reached; none if it was not.
    pub reached_seconds: Option<f64>,
    /// CPU seconds of ksmd until then.
    pub reached_cpu_seconds: Option<f64>,
    /// Saved when the goal's time is over, before bookkeeping.
    pub bytes_saved: u64,
    /// The same after the kernel's bookkeeping.
    pub general_profit: i64,
    /// CPU seconds of ksmd when the goal's time is over.
    pub cpu_seconds: f64,
    /// Passes by then.
    pub full_scans: u64,
    /// Seconds, and bytes saved at them.
    pub series: Vec<(f64, u64)>,
}

impl Snapshot {
    /// Runs the model on what was read, with several settings.
    ///
    /// # Errors
    /// [`ModelError`].
    pub fn model(&self, share: f64, within: Duration) -> Result<ModelReport, ModelError> {
        let record = self.record.as_ref().ok_or(ModelError::NotRecorded)?;
        let mut taken = vec![false; self.walk.pages as usize];
        for span in &self.walk.spans {
            let takes = self.walk.mappings[span.mapping as usize].ksm_refuses.is_none();
            taken[span.first as usize..(span.first + span.pages) as usize].fill(takes);
        }
        let capture = record.for_ksmd(&taken)?;
        let now = settings_of(&KsmSysfs::host());
        let mut settings: Vec<Settings> = now.into_iter().collect();
        let others = ladder(now.unwrap_or_default());
        settings.extend(others.into_iter().filter(|other| Some(*other) != now));
        let goal = Goal { share, within };
        let trials = compare(&capture, &settings, Costs::default(), goal);
        let recommended = recommend(&trials).and_then(|best| trials.iter().position(|trial| std::ptr::eq(trial, best)));
        Ok(ModelReport {
            bytes_reachable: capture.reachable().pages() * page_size(),
            goal_share: share,
            goal_seconds: within.as_secs_f64(),
            recommended,
            trials: trials.iter().enumerate().map(|(at, trial)| report(trial, at == 0 && now.is_some())).collect(),
        })
    }
}

fn report(trial: &Trial, now: bool) -> TrialReport {
    let settings = trial.settings;
    let end = trial.end();
    let saved = |state: &State| state.pages_saved() * page_size();
    let step = trial.states.len().div_ceil(POINTS).max(1);
    TrialReport {
        now,
        pages_to_scan: settings.pages_to_scan,
        sleep_millisecs: settings.sleep_millisecs,
        smart_scan: settings.smart_scan,
        use_zero_pages: settings.use_zero_pages,
        advisor_target_scan_time: match settings.advisor {
            Advisor::None => None,
            Advisor::ScanTime(advisor) => Some(advisor.target_scan_time),
        },
        reached_seconds: trial.reached.map(|reached| reached.at.as_secs_f64()),
        reached_cpu_seconds: trial.reached.map(|reached| reached.cpu.as_secs_f64()),
        bytes_saved: saved(&end),
        general_profit: end.general_profit(page_size()),
        cpu_seconds: end.cpu.as_secs_f64(),
        full_scans: end.full_scans,
        series: trial.states.iter().step_by(step).map(|state| (state.at.as_secs_f64(), saved(state))).collect(),
    }
}

/// This machine's settings; `None` where there is no KSM.
fn settings_of(sysfs: &KsmSysfs) -> Option<Settings> {
    let number = |name: &str| sysfs.number(name).ok().flatten().and_then(|value| u32::try_from(value).ok());
    let like = Settings::default();
    let advisor = ScanTime::default();
    let advised = sysfs.knob("advisor_mode").ok().flatten().is_some_and(|mode| mode == "scan-time");
    Some(Settings {
        pages_to_scan: number("pages_to_scan")?,
        sleep_millisecs: number("sleep_millisecs")?,
        smart_scan: number("smart_scan").is_some_and(|on| on != 0),
        use_zero_pages: number("use_zero_pages").is_some_and(|on| on != 0),
        max_page_sharing: number("max_page_sharing").unwrap_or(like.max_page_sharing),
        advisor: if advised {
            Advisor::ScanTime(ScanTime {
                max_cpu: number("advisor_max_cpu").unwrap_or(advisor.max_cpu),
                min_pages_to_scan: number("advisor_min_pages_to_scan").unwrap_or(advisor.min_pages_to_scan),
                max_pages_to_scan: number("advisor_max_pages_to_scan").unwrap_or(advisor.max_pages_to_scan),
                target_scan_time: number("advisor_target_scan_time").unwrap_or(advisor.target_scan_time),
            })
        } else {
            Advisor::None
        },
    })
}
