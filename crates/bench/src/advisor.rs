//! `bench advisor`: our advisor beside the kernel's own, on the same processes, for a quick goal and a slow one.
//!
//! Workers hold pages of which half are duplicates and write to some of them all the time. Each advisor gets the goals,
//! a while to find its pace, and is then watched from outside: ends of passes and ksmd's processor time. Both run
//! without the kernel's skipping, under which passes differ in length by nature. The kernel's own is helped over its
//! start, which would cost it minutes.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use ksm::advise::{Advisor, Goals};
use ksm::{KsmSysfs, StatePath, Wanted};
use serde::Serialize;

use crate::report::{Better, Machine, Ratio, Report};
use crate::sides::Scanner;
use crate::workers::{Fleet, Layout};

/// How often the counters are looked at.
const LOOK: Duration = Duration::from_millis(10);
/// How often each worker writes, and to how many pages.
const WRITE: Duration = Duration::from_millis(500);
const WRITTEN: u64 = 100;
/// Passes that an advisor has for finding its pace, and for how long that is waited for.
const SETTLED_PASSES: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(60);
/// Each is watched for so long at least.
const WATCHED: Duration = Duration::from_secs(12);
/// How far a pass may be from its goal.
const WITHIN: f64 = 0.2;

/// `bench advisor`.
#[derive(Args, Clone, Debug)]
pub struct AdvisorCommand {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub json: bool,
    /// A short form for tests: one quick goal, a few seconds.
    #[arg(long)]
    pub quick: bool,
    /// Memory of all workers, in MiB.
    #[arg(long, default_value_t = 512)]
    pub size: u64,
    /// The quick goal: seconds for a pass, and per cent of a CPU.
    #[arg(long, num_args = 2, value_names = ["SECONDS", "PERCENT"], default_values_t = [1.0, 40.0])]
    pub fast: Vec<f64>,
    /// The slow goal.
    #[arg(long, num_args = 2, value_names = ["SECONDS", "PERCENT"], default_values_t = [20.0, 2.0])]
    pub slow: Vec<f64>,
    /// Passes of the goal's length that each advisor is watched for, after two for finding its pace.
    #[arg(long, default_value_t = 3)]
    pub passes: u32,
    /// How often everything is measured.
    #[arg(long, default_value_t = 3)]
    pub repeat: u32,
}

/// Who advises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Who {
    Ours,
    Kernel,
}

/// What is to be held.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Goal {
    scan_time_seconds: f64,
    max_cpu_percent: f64,
}

/// One advisor at one goal.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    who: Who,
    goal: Goal,
    /// How long it was watched.
    seconds: f64,
    /// Times of passes that began and ended in that time; empty if none did.
    scan_times: Vec<f64>,
    /// Of ksmd, while it was watched.
    cpu_percent: f64,
    /// Of this process, in which our advisor runs; the watching is in it too.
    own_cpu_percent: f64,
    pages_to_scan: u32,
    sleep_millisecs: u32,
    pages_scanned: u64,
}

impl Sample {
    fn scan_time(&self) -> f64 {
        match self.scan_times.len() {
            // None ended: it takes at least as long as was watched.
            0 => self.seconds,
            count => self.scan_times.iter().sum::<f64>() / count as f64,
        }
    }

    /// The pass that is farthest from the goal, as a share of it.
    fn worst(&self) -> f64 {
        let off = |seconds: f64| (seconds / self.goal.scan_time_seconds - 1.0).abs();
        self.scan_times.iter().copied().map(off).fold(off(self.scan_time()), f64::max)
    }

    fn held(&self) -> bool {
        !self.scan_times.is_empty() && self.worst() <= WITHIN && self.cpu_percent <= self.goal.max_cpu_percent
    }
}

impl AdvisorCommand {
    /// Measures and reports. A goal that ours did not hold is exit status 1.
    ///
    /// # Errors
    /// When KSM cannot be driven or a worker not be started.
    pub fn run(&self) -> Result<ExitCode> {
        let machine = Machine::here();
        let goal = |goal: &[f64]| Goal { scan_time_seconds: goal[0], max_cpu_percent: goal[1] };
        let goals = if self.quick { vec![goal(&[1.0, 30.0])] } else { vec![goal(&self.fast), goal(&self.slow)] };
        let (size, repeat) = if self.quick { (64, 1) } else { (self.size, self.repeat) };
        let layout = Layout::new((size << 20) / kernel::page_size(), 4, 2, 4);
        let mut samples = Vec::new();
        for round in 0..repeat {
            for &goal in &goals {
                // Who comes first changes.
                let order = if round % 2 == 0 { [Who::Kernel, Who::Ours] } else { [Who::Ours, Who::Kernel] };
                for who in order {
                    let sample = self.measure(who, goal, layout).with_context(|| format!("{who:?} at {goal:?}"))?;
                    eprintln!("{}", row(&sample));
                    samples.push(sample);
                }
            }
        }
        let ratios: Vec<Ratio> = goals.iter().flat_map(|goal| ratios(*goal, &samples)).collect();
        eprintln!("\n{:<40} {:>9} {:>9}  goal", "mean of all rounds", "ours", "kernel");
        for ratio in &ratios {
            let met = if ratio.met { "" } else { "  missed" };
            eprintln!("{:<40} {:>9.2} {:>9.2} {}{met}", ratio.metric, ratio.ours, ratio.theirs, ratio.unit);
        }
        let held = samples.iter().filter(|sample| sample.who == Who::Ours).all(Sample::held);
        if self.json {
            let samples = samples.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
            println!("{}", serde_json::to_string(&Report { scenario: "advisor", machine, samples, ratios })?);
        }
        Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// With its own lock, so that others get their turn between two.
    fn measure(&self, who: Who, goal: Goal, layout: Layout) -> Result<Sample> {
        let scanner = Scanner::acquire()?;
        scanner.forget_the_dead()?;
        if who == Who::Kernel {
            prime(&scanner, kernels(goal), || Ok(()))?;
        }
        let mut fleet = Fleet::start(layout, |_| ())?;
        fleet.hand_over()?;
        if who == Who::Ours {
            // What there is to merge is merged first: the goals are of steady work. The kernel's does it at its start.
            scanner.run_until(layout.saved(), Duration::from_secs(60))?;
            scanner.rest()?;
        }
        let advisor = match who {
            Who::Ours => Some(Advisor::start_at(&StatePath::for_this_user(), &KsmSysfs::host(), ours(goal))?.0),
            Who::Kernel => None,
        };
        let sample = self.watch(who, goal, &scanner, advisor, &mut fleet)?;
        scanner.rest()?;
        anyhow::ensure!(fleet.wrong_words()? == 0, "a worker's memory is not what it was");
        drop(fleet);
        scanner.release()?;
        Ok(sample)
    }

    fn watch(
        &self,
        who: Who,
        goal: Goal,
        scanner: &Scanner,
        mut advisor: Option<Advisor>,
        fleet: &mut Fleet,
    ) -> Result<Sample> {
        let begun = Instant::now();
        let pass = Duration::from_secs_f64(goal.scan_time_seconds);
        let settled = pass * 2 + Duration::from_secs(3);
        // One pass more than is wanted: the first and the last are cut.
        let watched = (pass * (self.passes + 1) + pass / 4).max(WATCHED);
        let mut end = None;
        let (mut tick, mut write) = (begun, begun);
        let mut from: Option<Edge> = None;
        let (mut scans, mut passed): (u64, Option<Instant>) = (scanner.counters()?.full_scans, None);
        let (mut scan_times, mut early) = (Vec::new(), 0);
        loop {
            let now = Instant::now();
            if let Some(advisor) = advisor.as_mut().filter(|_| now >= tick) {
                tick = now + advisor.tick()?.1;
            }
            if now >= write {
                fleet.write(WRITTEN)?;
                write = now + WRITE;
            }
            let counters = scanner.counters()?;
            let ended = counters.full_scans - scans;
            scans = counters.full_scans;
            early += ended;
            let pace_found = early >= SETTLED_PASSES || begun.elapsed() >= PATIENCE;
            if from.is_none() && begun.elapsed() >= settled && pace_found {
                from = Some(Edge::here(scanner, counters.pages_scanned));
                (passed, end) = (None, Some(now + watched));
            }
            if ended > 0 {
                if let (Some(_), Some(before)) = (&from, passed) {
                    scan_times.extend((0..ended).map(|_| (now - before).as_secs_f64() / ended as f64));
                }
                passed = Some(now);
            }
            if end.is_some_and(|end| now >= end) {
                let from = from.context("it was watched after it had settled")?;
                let to = Edge::here(scanner, counters.pages_scanned);
                let seconds = (to.at - from.at).as_secs_f64();
                let percent = |to: Duration, from: Duration| to.saturating_sub(from).as_secs_f64() / seconds * 100.0;
                let knob = |name| -> Result<u32> {
                    Ok(u32::try_from(KsmSysfs::host().number(name)?.context("no such knob")?)?)
                };
                let sample = Sample {
                    who,
                    goal,
                    seconds,
                    scan_times,
                    cpu_percent: percent(to.cpu, from.cpu),
                    own_cpu_percent: percent(to.own, from.own),
                    pages_to_scan: knob("pages_to_scan")?,
                    sleep_millisecs: knob("sleep_millisecs")?,
                    pages_scanned: to.scanned - from.scanned,
                };
                if let Some(advisor) = advisor {
                    advisor.stop()?;
                }
                return Ok(sample);
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// Lets the kernel's advisor end some passes over a little memory. Its first one after it was chosen is charged with all
/// that ksmd has used since boot, so that it scans 10 to 70 pages in a batch during the whole next one: over the real
/// workers that takes minutes in which nothing could be compared. `go_on` fails if it is to be left.
pub(crate) fn prime(scanner: &Scanner, wanted: Wanted, go_on: impl Fn() -> Result<()>) -> Result<()> {
    let mut few = Fleet::start(Layout::new(512, 4, 2, 2), |_| ())?;
    few.hand_over()?;
    let before = scanner.counters()?.full_scans;
    scanner.ask(wanted)?;
    let deadline = Instant::now() + PATIENCE;
    while scanner.counters()?.full_scans < before + 6 && Instant::now() < deadline {
        go_on()?;
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// One end of the time that is watched.
struct Edge {
    at: Instant,
    cpu: Duration,
    own: Duration,
    scanned: u64,
}

impl Edge {
    fn here(scanner: &Scanner, scanned: u64) -> Self {
        let own = kernel::sched::usage(kernel::sched::Whose::Own).cpu();
        Self { at: Instant::now(), cpu: scanner.cpu(), own, scanned }
    }
}

/// Nothing but the pass time and the ceiling: what else ours looks at would change the pace.
fn ours(goal: Goal) -> Goals {
    Goals {
        scan_time: Duration::from_secs_f64(goal.scan_time_seconds),
        max_cpu: goal.max_cpu_percent / 100.0,
        boost: None,
        memory_pressure: None,
        cpu_pressure: None,
        rest: false,
        keep_smart_scan: false,
    }
}

/// The same of the kernel's advisor, in its whole numbers.
fn kernels(goal: Goal) -> Wanted {
    Wanted {
        run: Some(true),
        smart_scan: Some(false),
        advisor: Some(ksm::Advisor {
            target_scan_time: (goal.scan_time_seconds.round() as u32).max(1),
            max_cpu: (goal.max_cpu_percent.round() as u32).max(1),
            min_pages_to_scan: 500,
            max_pages_to_scan: 30_000,
        }),
        ..Wanted::default()
    }
}

fn row(sample: &Sample) -> String {
    let times: Vec<String> = sample.scan_times.iter().take(8).map(|seconds| format!("{seconds:.2}")).collect();
    format!(
        "{:<7} goal {:>5.1} s, {:>4.1} %: passes of {:>6.2} s, farthest {:>5.1} % off; ksmd {:>5.2} % of a CPU; {} pages every {} ms [{}]",
        format!("{:?}", sample.who),
        sample.goal.scan_time_seconds,
        sample.goal.max_cpu_percent,
        sample.scan_time(),
        sample.worst() * 100.0,
        sample.cpu_percent,
        sample.pages_to_scan,
        sample.sleep_millisecs,
        times.join(" ")
    )
}

/// Means of all rounds at one goal. A pass that is off by 20 %, and all of the ceiling, are the limits.
fn ratios(goal: Goal, samples: &[Sample]) -> Vec<Ratio> {
    let mean = |who: Who, what: fn(&Sample) -> f64| {
        let of: Vec<f64> = samples.iter().filter(|sample| sample.who == who && sample.goal == goal).map(what).collect();
        of.iter().sum::<f64>() / of.len().max(1) as f64
    };
    let slow = goal.scan_time_seconds > 5.0;
    let off = if slow { "slow goal: farthest pass off by" } else { "quick goal: farthest pass off by" };
    let cpu = if slow { "slow goal: ksmd's share of its ceiling" } else { "quick goal: ksmd's share of its ceiling" };
    let time = if slow { "slow goal: mean pass" } else { "quick goal: mean pass" };
    let ours = (mean(Who::Ours, Sample::worst), mean(Who::Ours, |s| s.cpu_percent / s.goal.max_cpu_percent));
    let theirs = (mean(Who::Kernel, Sample::worst), mean(Who::Kernel, |s| s.cpu_percent / s.goal.max_cpu_percent));
    let limit = |metric, ours: f64, theirs: f64, limit: f64| {
        let ratio = Ratio::new((metric, "share", Better::Less), ours, ("the kernel's advisor", theirs), 0.0);
        Ratio { goal: theirs / limit, met: ours <= limit, ..ratio }
    };
    vec![
        Ratio::new(
            (time, "s", Better::Less),
            mean(Who::Ours, Sample::scan_time),
            ("the kernel's advisor", mean(Who::Kernel, Sample::scan_time)),
            0.0,
        ),
        limit(off, ours.0, theirs.0, WITHIN),
        limit(cpu, ours.1, theirs.1, 1.0),
    ]
}
