//! How fast ksmd goes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use kernel::ksm_sysfs::KsmSysfs;
use serde::Serialize;

use crate::error::KsmError;
use crate::ksmd::Ksmd;

/// Tells, look by look, what ksmd did since the last one.
#[derive(Debug)]
pub struct Meter {
    ksmd: Option<Ksmd>,
    last: Sample,
    /// When ends of passes were seen, and how many passes there had been.
    ends: VecDeque<(Instant, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    scanned: Option<u64>,
    skipped: Option<u64>,
    full_scans: u64,
    cpu: Option<Duration>,
}

/// Ends of passes that are kept: the time of a pass is the mean over these.
const ENDS: usize = 16;

/// How long a pass over everything takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum PassTime {
    /// Passes ended while we looked.
    Measured {
        /// Seconds, the mean.
        seconds: f64,
    },
    /// None ended: the records that there are at the rate that was seen.
    Estimated {
        /// Seconds.
        seconds: f64,
    },
}

impl PassTime {
    /// Seconds.
    #[must_use]
    pub fn seconds(self) -> f64 {
        match self {
            Self::Measured { seconds } | Self::Estimated { seconds } => seconds,
        }
    }
}

/// What ksmd did since the last look.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Now {
    /// How long that was.
    pub seconds: f64,
    /// `None` where the kernel does not count them (before 6.6).
    pub pages_scanned_per_second: Option<f64>,
    /// Pages that smart scan passed over; `None` where there is none.
    pub pages_skipped_per_second: Option<f64>,
    /// Of one processor; `None` where ksmd cannot be seen.
    pub ksmd_cpu_percent: Option<f64>,
    /// `None` while ksmd does not run or sleeps because nobody has mergeable memory.
    pub pass: Option<PassTime>,
}

impl Meter {
    /// Begins to look.
    ///
    /// # Errors
    /// [`KsmError::Sysfs`].
    pub fn new(sysfs: &KsmSysfs) -> Result<Self, KsmError> {
        let ksmd = Ksmd::find();
        Ok(Self { ksmd, last: Sample::take(sysfs, ksmd)?, ends: VecDeque::new() })
    }

    /// What happened since the last look. `rmap_items`: what a pass goes over.
    pub(crate) fn look(&mut self, sysfs: &KsmSysfs, rmap_items: u64) -> Result<Now, KsmError> {
        let sample = Sample::take(sysfs, self.ksmd)?;
        let now = self.between(sample, rmap_items);
        self.last = sample;
        Ok(now)
    }

    fn between(&mut self, sample: Sample, rmap_items: u64) -> Now {
        let before = self.last;
        let seconds = sample.at.duration_since(before.at).as_secs_f64().max(1e-6);
        let rate = |after: Option<u64>, before: Option<u64>| Some(after?.saturating_sub(before?) as f64 / seconds);
        let scanned = rate(sample.scanned, before.scanned);
        let skipped = rate(sample.skipped, before.skipped);
        let cpu = sample.cpu.zip(before.cpu).map(|(after, before)| after.saturating_sub(before).as_secs_f64());
        if sample.full_scans < before.full_scans {
            // Somebody unmerged the host.
            self.ends.clear();
        } else if sample.full_scans > before.full_scans {
            self.ends.push_back((sample.at, sample.full_scans));
            if self.ends.len() > ENDS {
                self.ends.pop_front();
            }
        }
        let going = scanned.unwrap_or(0.0) + skipped.unwrap_or(0.0);
        let passes = sample.full_scans.saturating_sub(before.full_scans);
        let pass = match self.measured() {
            Some(seconds) if going > 0.0 => Some(PassTime::Measured { seconds }),
            // The ends lie anywhere in the look, so it takes several to tell.
            None if passes > 1 => Some(PassTime::Measured { seconds: seconds / passes as f64 }),
            _ if going > 0.0 => Some(PassTime::Estimated { seconds: rmap_items as f64 / going }),
            _ => None,
        };
        Now {
            seconds,
            pages_scanned_per_second: scanned,
            pages_skipped_per_second: skipped,
            ksmd_cpu_percent: cpu.map(|cpu| cpu / seconds * 100.0),
            pass,
        }
    }

    /// The mean between the first and the last end that were seen.
    fn measured(&self) -> Option<f64> {
        let ((first, from), (last, to)) = (self.ends.front()?, self.ends.back()?);
        (to > from).then(|| last.duration_since(*first).as_secs_f64() / (to - from) as f64)
    }
}

impl Sample {
    fn take(sysfs: &KsmSysfs, ksmd: Option<Ksmd>) -> Result<Self, KsmError> {
        let counters = sysfs.counters()?;
        Ok(Self {
            at: Instant::now(),
            scanned: counters.pages_scanned,
            skipped: counters.pages_skipped,
            full_scans: counters.full_scans.unwrap_or(0),
            cpu: ksmd.and_then(|ksmd| ksmd.cpu_time()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(start: Instant, seconds: u64, scanned: u64, full_scans: u64) -> Sample {
        let at = start + Duration::from_secs(seconds);
        Sample {
            at,
            scanned: Some(scanned),
            skipped: Some(0),
            full_scans,
            cpu: Some(Duration::from_millis(seconds * 250)),
        }
    }

    fn looks(samples: &[(u64, u64, u64)], rmap_items: u64) -> Vec<Now> {
        let start = Instant::now();
        let mut meter = Meter { ksmd: None, last: sample(start, 0, 0, 5), ends: VecDeque::new() };
        let look = |(seconds, scanned, full_scans): &(u64, u64, u64)| {
            let sample = sample(start, *seconds, *scanned, *full_scans);
            let now = meter.between(sample, rmap_items);
            meter.last = sample;
            now
        };
        samples.iter().map(look).collect()
    }

    #[test]
    fn a_pass_is_estimated_until_two_ends_were_seen() {
        let seen = looks(&[(1, 100, 5), (2, 200, 6), (4, 400, 6), (8, 800, 7)], 1000);
        assert_eq!(seen[0].pass, Some(PassTime::Estimated { seconds: 10.0 }));
        assert_eq!(seen[1].pass, Some(PassTime::Estimated { seconds: 10.0 }), "one end tells no time");
        assert_eq!(seen[3].pass, Some(PassTime::Measured { seconds: 6.0 }));
        assert_eq!((seen[0].pages_scanned_per_second, seen[0].ksmd_cpu_percent), (Some(100.0), Some(25.0)));
    }

    #[test]
    fn several_passes_in_one_look_are_measured_at_once() {
        assert_eq!(looks(&[(2, 9000, 13)], 1000)[0].pass, Some(PassTime::Measured { seconds: 0.25 }));
    }

    #[test]
    fn unmerging_the_host_begins_anew_and_a_stopped_ksmd_has_no_pass() {
        let seen = looks(&[(1, 100, 6), (2, 200, 7), (3, 200, 0), (4, 200, 0)], 1000);
        assert_eq!(seen[1].pass, Some(PassTime::Measured { seconds: 1.0 }));
        assert_eq!((seen[2].pass, seen[3].pass), (None, None));
    }
}
