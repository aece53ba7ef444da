//! One run of the workload under one setting.
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use kernel::launch::Launched;
use kernel::sched::{Whose, usage};
use kernel::status;
use serde::Serialize;

use super::SweepError;
use super::setting::{How, Setting};
use super::stage::Stage;
use crate::advise::Advisor;
use crate::knob::Knob;
use crate::ksmd::Counters;

/// Between two samples, at the start; a long run has fewer.
const SAMPLE: Duration = Duration::from_millis(100);
/// Samples that a run keeps at most: then every second one goes and the distance doubles.
const KEPT: usize = 600;
/// After the polite signal.
const GRACE: Duration = Duration::from_secs(5);

/// What one look found. Pages and bytes are those that were added since the run began, on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    /// Since the command was started.
    pub at_seconds: f64,
    /// Bytes that merging keeps from being there.
    pub bytes_saved: u64,
    /// Processor time of ksmd.
    pub ksmd_cpu_seconds: f64,
    /// Passes completed.
    pub full_scans: u64,
    /// Pages compared.
    pub pages_scanned: u64,
    /// Seconds in which some thread waited for memory.
    pub memory_stall_seconds: f64,
    /// Seconds in which some thread waited for a processor.
    pub cpu_stall_seconds: f64,
}

/// What came of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Its number among all, in the order in which they were made, from 0.
    pub number: usize,
    /// From the command's start to its end.
    pub run_seconds: f64,
    /// Processor time of the command and what it waited for.
    pub cpu_seconds: f64,
    /// Its exit status; `None` if a signal ended it.
    pub status: Option<i32>,
    /// That signal.
    pub signal: Option<i32>,
    /// It was ended when its time was over.
    pub ended: bool,
    /// Processes that it left behind, which were ended.
    pub left_behind: u64,
    /// ksmd's processor time.
    pub ksmd_cpu_seconds: f64,
    /// Bytes saved, on average over the run.
    pub bytes_saved_mean: f64,
    /// The most.
    pub bytes_saved_peak: u64,
    /// At the last look before the command's end.
    pub bytes_saved_end: u64,
    /// Passes completed.
    pub passes: u64,
    /// Mean time of a pass; `None` if fewer than two ended.
    pub scan_time_seconds: Option<f64>,
    /// Share of the run in which some thread waited for memory.
    pub memory_pressure: f64,
    /// Share of the run in which some thread waited for a processor.
    pub cpu_pressure: f64,
    /// Somebody else asked for settings of KSM meanwhile: they were not those of this run alone.
    pub disturbed: bool,
    /// A setting that somebody else wrote meanwhile: the run is void, since it was made with other settings.
    pub taken: Option<Knob>,
    /// ksmd had forgotten the runs before this one when it began.
    pub fresh: bool,
    /// What every look found.
    pub samples: Vec<Sample>,
}

impl Run {
    /// It ended as a command should.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.status == Some(0) || (self.ended && self.status.is_none())
    }

    /// Its figures are to be judged by.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.succeeded() && self.taken.is_none()
    }
}

/// The counters when the run began.
struct Base {
    at: Instant,
    counters: Counters,
    ksmd: Duration,
    memory: u64,
    cpu: u64,
    children: Duration,
}

impl Base {
    fn now(stage: &Stage) -> Result<Self, SweepError> {
        Ok(Self {
            at: Instant::now(),
            counters: stage.counters()?,
            ksmd: stage.ksmd_cpu(),
            memory: stalled("memory"),
            cpu: stalled("cpu"),
            children: usage(Whose::Children).cpu(),
        })
    }

    fn sample(&self, stage: &Stage) -> Result<Sample, SweepError> {
        let now = stage.counters()?;
        let since = |then: u64, now: u64| now.saturating_sub(then) as f64 / 1e6;
        Ok(Sample {
            at_seconds: self.at.elapsed().as_secs_f64(),
            bytes_saved: now.pages_saved().saturating_sub(self.counters.pages_saved()) * kernel::page_size(),
            ksmd_cpu_seconds: stage.ksmd_cpu().saturating_sub(self.ksmd).as_secs_f64(),
            full_scans: now.full_scans.saturating_sub(self.counters.full_scans),
            pages_scanned: now.pages_scanned.saturating_sub(self.counters.pages_scanned),
            memory_stall_seconds: since(self.memory, stalled("memory")),
            cpu_stall_seconds: since(self.cpu, stalled("cpu")),
        })
    }
}

/// Microseconds since boot; 0 where the kernel does not measure it.
fn stalled(resource: &str) -> u64 {
    status::pressure(resource).ok().flatten().map_or(0, |pressure| pressure.some_total)
}

/// How a run came to its end.
pub(super) enum End {
    /// By itself, or because its time was over.
    Over(Box<Run>),
    /// It was to be given up.
    Interrupted,
}

/// What is to be run.
pub(super) struct Ahead<'a> {
    pub(super) setting: &'a Setting,
    /// Its number among all.
    pub(super) number: usize,
    /// ksmd has forgotten the runs before.
    pub(super) fresh: bool,
    pub(super) at_most: Option<Duration>,
}

/// Starts the workload by `start`, puts the setting in force by `ask`, and watches it to its end. `interrupted` is asked
/// at every look.
pub(super) fn run(
    stage: &Stage,
    Ahead { setting, number, fresh, at_most }: Ahead<'_>,
    start: &mut dyn FnMut() -> Result<Launched, SweepError>,
    ask: &dyn Fn() -> Result<(), SweepError>,
    interrupted: &mut dyn FnMut() -> bool,
) -> Result<End, SweepError> {
    let mut advisor = match setting.how {
        How::Advised(goals) => Some(Advisor::start_at(stage.path(), stage.sysfs(), goals)?.0),
        _ => None,
    };
    let base = Base::now(stage)?;
    // The command first: a quick ksmd that meets an address space in the middle of an exec finds nothing mergeable in it
    // and drops it from its list, for as long as the program runs.
    let mut command = Command { launched: start()?, told: None };
    ask()?;
    let mut samples = Vec::new();
    let (mut every, mut next_sample, mut next_tick) = (SAMPLE, base.at, base.at);
    let (mut disturbed, mut ended, mut given_up) = (false, false, false);
    let status = loop {
        let now = Instant::now();
        if now >= next_sample {
            samples.push(base.sample(stage)?);
            disturbed |= stage.others()?;
            if samples.len() >= KEPT {
                // The last one stays.
                let mut at = samples.len();
                samples.retain(|_| {
                    at -= 1;
                    at % 2 == 0
                });
                every *= 2;
            }
            next_sample = now + every;
        }
        if let Some(advisor) = advisor.as_mut().filter(|_| now >= next_tick) {
            next_tick = now + advisor.tick()?.1;
        }
        if let Some(status) = command.launched.child.try_wait().map_err(SweepError::Wait)? {
            break status;
        }
        kernel::signals::reap_others(command.launched.pid());
        let over = at_most.is_some_and(|at_most| base.at.elapsed() >= at_most);
        given_up |= interrupted();
        if over || given_up {
            ended |= !given_up;
            command.end();
        }
        let next = if advisor.is_some() { next_sample.min(next_tick) } else { next_sample };
        let wait = next.saturating_duration_since(Instant::now()).min(SAMPLE);
        command.launched.pidfd.wait_exited(wait).map_err(SweepError::Watch)?;
    };
    let run_seconds = base.at.elapsed().as_secs_f64();
    if let Some(advisor) = advisor {
        advisor.stop()?;
    }
    let left_behind = stage.end_left_behind();
    if given_up {
        return Ok(End::Interrupted);
    }
    let cpu_seconds = usage(Whose::Children).cpu().saturating_sub(base.children).as_secs_f64();
    let run = summed(Parts { number, run_seconds, cpu_seconds, status, ended, left_behind, disturbed, fresh, samples });
    Ok(End::Over(Box::new(run)))
}

/// The command, ended with this value: whatever goes wrong, it does not go on alone.
struct Command {
    launched: Launched,
    /// When it was told to end, and whether by force.
    told: Option<(Instant, bool)>,
}

impl Command {
    /// Politely first, by force after a while.
    fn end(&mut self) {
        let signal = match self.told {
            None => kernel::Signal::TERM,
            Some((at, false)) if at.elapsed() >= GRACE => kernel::Signal::KILL,
            Some(_) => return,
        };
        let since = self.told.map_or_else(Instant::now, |(at, _)| at);
        self.told = Some((since, signal == kernel::Signal::KILL));
        // It may have ended already, as the next look will see.
        let _ = self.launched.pidfd.send_signal(signal);
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        if let Ok(None) = self.launched.child.try_wait() {
            let _ = self.launched.child.kill();
            let _ = self.launched.child.wait();
        }
    }
}

struct Parts {
    number: usize,
    run_seconds: f64,
    cpu_seconds: f64,
    status: ExitStatus,
    ended: bool,
    left_behind: u64,
    disturbed: bool,
    fresh: bool,
    samples: Vec<Sample>,
}

fn summed(parts: Parts) -> Run {
    use std::os::unix::process::ExitStatusExt as _;
    let Parts { number, run_seconds, cpu_seconds, status, ended, left_behind, disturbed, fresh, samples } = parts;
    let last = samples.last().copied().unwrap_or_default();
    // Straight lines between looks; what was saved at the last one lasts to the end.
    let between: f64 = samples
        .windows(2)
        .map(|pair| {
            (pair[1].at_seconds - pair[0].at_seconds) * (pair[0].bytes_saved + pair[1].bytes_saved) as f64 / 2.0
        })
        .sum();
    let after = (run_seconds - last.at_seconds).max(0.0) * last.bytes_saved as f64;
    let seconds = run_seconds.max(1e-6);
    Run {
        number,
        run_seconds,
        cpu_seconds,
        status: status.code(),
        signal: status.signal(),
        ended,
        left_behind,
        ksmd_cpu_seconds: last.ksmd_cpu_seconds,
        bytes_saved_mean: (between + after) / seconds,
        bytes_saved_peak: samples.iter().map(|sample| sample.bytes_saved).max().unwrap_or(0),
        bytes_saved_end: last.bytes_saved,
        passes: last.full_scans,
        scan_time_seconds: scan_time(&samples),
        memory_pressure: last.memory_stall_seconds / seconds,
        cpu_pressure: last.cpu_stall_seconds / seconds,
        disturbed,
        taken: None,
        fresh,
        samples,
    }
}

/// From the first end of a pass that was seen to the last.
fn scan_time(samples: &[Sample]) -> Option<f64> {
    let mut ends = samples.windows(2).filter(|pair| pair[1].full_scans > pair[0].full_scans).map(|pair| pair[1]);
    let first = ends.next()?;
    let last = ends.next_back()?;
    Some((last.at_seconds - first.at_seconds) / (last.full_scans - first.full_scans) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    #[test]
    fn sums_of_samples() {
        let sample =
            |at_seconds, bytes_saved, full_scans| Sample { at_seconds, bytes_saved, full_scans, ..Sample::default() };
        let samples = vec![sample(0.0, 0, 0), sample(1.0, 100, 1), sample(2.0, 100, 1), sample(3.0, 0, 3)];
        let run = summed(Parts {
            number: 0,
            run_seconds: 4.0,
            cpu_seconds: 1.0,
            status: ExitStatus::from_raw(9),
            ended: false,
            left_behind: 0,
            disturbed: false,
            fresh: true,
            samples,
        });
        assert!((run.bytes_saved_mean - 50.0).abs() < 1e-9, "{}", run.bytes_saved_mean);
        assert_eq!((run.bytes_saved_peak, run.bytes_saved_end, run.passes), (100, 0, 3));
        assert_eq!(run.scan_time_seconds, Some(1.0));
        assert_eq!((run.status, run.signal, run.succeeded()), (None, Some(9), false));
    }
}
