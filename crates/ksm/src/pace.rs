//! How fast ksmd is to be, and what that means in KSM's settings.
use crate::wanted::{Rate, Wanted};

/// How fast ksmd is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As much as is useful: `boost` while much is being merged, `steady` after, nothing once a pass brought nothing.
    Adaptive {
        /// Rate at the start and whenever much new memory has appeared. The kernel's skipping is off meanwhile.
        boost: Rate,
        /// Rate for what remains.
        steady: Rate,
    },
    /// One processor, all the time, no skipping: for measurements.
    FlatOut,
}

/// Settings of a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriveSettings {
    /// How fast.
    pub pace: Pace,
    /// Merge zero-filled pages with the kernel's zero page, which has no limit of sharers.
    pub use_zero_pages: bool,
}

impl Default for DriveSettings {
    fn default() -> Self {
        // Boost: one core at most, with a breath in between. Steady: 200 MiB/s of 4 KiB pages, a few per cent of a core.
        let boost = Rate { pages_to_scan: 4000, sleep_millisecs: 4 };
        let steady = Rate { pages_to_scan: 1000, sleep_millisecs: 20 };
        Self { pace: Pace::Adaptive { boost, steady }, use_zero_pages: true }
    }
}

impl DriveSettings {
    /// For measurements: ksmd as fast as it goes.
    #[must_use]
    pub fn flat_out() -> Self {
        Self { pace: Pace::FlatOut, ..Self::default() }
    }
}

/// What the drive asks of ksmd at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Much to merge.
    Boost,
    /// Little to merge.
    Steady,
    /// Nothing: the administrator's settings are in force.
    Idle,
}

/// What the lease is asked for.
pub(crate) fn wanted(settings: DriveSettings, phase: Phase) -> Wanted {
    let (rate, smart_scan) = match (settings.pace, phase) {
        (_, Phase::Idle) => return Wanted::default(),
        (Pace::FlatOut, _) => (Rate::FLAT_OUT, Some(false)),
        (Pace::Adaptive { boost, .. }, Phase::Boost) => (boost, Some(false)),
        (Pace::Adaptive { steady, .. }, Phase::Steady) => (steady, None),
    };
    Wanted {
        run: Some(true),
        rate: Some(rate),
        smart_scan,
        use_zero_pages: settings.use_zero_pages.then_some(true),
        ..Wanted::default()
    }
}
