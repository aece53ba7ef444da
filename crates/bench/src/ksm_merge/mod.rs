//! `bench ksm-merge`: merging on request with the kernel's KSM, beside ksmd alone flat out with marks on everything.
//!
//! Memory of which half are duplicates, in long runs. Ours: nothing is marked and nothing is known; until the request
//! returns. Theirs: everything is marked by the processes themselves, which costs nothing here; until ksmd has merged all
//! that can be merged.

use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use kernel::Pid;
use ksm::request::{self, End, Request};
use ksm::{Counters, KsmSysfs, StatePath};
use serde::Serialize;

use crate::report::{Better, Machine, Ratio, Report};
use crate::sides::{Reached, Scanner};
use crate::workers::{Fleet, Layout};

/// `bench ksm-merge`.
#[derive(Args, Clone, Debug)]
pub struct KsmMergeCommand {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub json: bool,
    /// A short form for tests: little memory.
    #[arg(long)]
    pub quick: bool,
    /// Memory of all processes in MiB.
    #[arg(long, default_value_t = 1024)]
    pub size: u64,
    /// Pages of a run.
    #[arg(long, default_value_t = 256)]
    pub run: u64,
    /// Rounds; each measures both.
    #[arg(long, default_value_t = 3)]
    pub rounds: u32,
}

/// Processes of each half.
const WORKERS: u64 = 2;
/// For how long either may try.
const AT_MOST: Duration = Duration::from_secs(300);

/// One round.
#[derive(Clone, Debug, Serialize)]
struct Round {
    ours: Ours,
    theirs: Reached,
    wrong_words: u64,
}

/// What a request came to.
#[derive(Clone, Debug, Serialize)]
struct Ours {
    seconds: f64,
    /// Of ksmd and of this process.
    cpu_seconds: f64,
    pages_saved: u64,
    report: request::Report,
}

impl KsmMergeCommand {
    /// Measures and reports. Wrong content, or pages that were not merged, are exit status 1.
    ///
    /// # Errors
    /// When a side cannot be run.
    pub fn run(&self) -> Result<ExitCode> {
        let machine = Machine::here();
        let size = if self.quick { 16 } else { self.size };
        let half = (size << 20) / kernel::page_size() / 2;
        let doubles = Layout::new(half, self.run, 2, WORKERS);
        let singles = Layout::new(half, self.run, 1, WORKERS);
        let mut rounds = Vec::new();
        for _ in 0..if self.quick { 1 } else { self.rounds } {
            let round = Round::measure(doubles, singles)?;
            eprintln!(
                "ours {:.2} s, {:.2} s of CPU, {} pages saved, stopped {:.2} ms; ksmd {:.2} s, {:.2} s of CPU, {} pages saved; {} wrong words",
                round.ours.seconds,
                round.ours.cpu_seconds,
                round.ours.pages_saved,
                round.ours.report.processes.iter().map(|process| process.stopped_seconds).fold(0.0, f64::max) * 1e3,
                round.theirs.seconds,
                round.theirs.cpu_seconds,
                round.theirs.pages_saved,
                round.wrong_words
            );
            rounds.push(round);
        }
        let right = rounds.iter().all(|round| round.is_right(doubles.saved()));
        let mean = |of: &dyn Fn(&Round) -> f64| rounds.iter().map(of).sum::<f64>() / rounds.len().max(1) as f64;
        let against = "ksmd flat out, all marked";
        let ratios = vec![
            Ratio::new(
                ("start to merged, half of the pages are duplicates, time", "s", Better::Less),
                mean(&|round| round.ours.seconds),
                (against, mean(&|round| round.theirs.seconds)),
                1.0,
            ),
            Ratio::new(
                ("start to merged, half of the pages are duplicates, CPU", "s", Better::Less),
                mean(&|round| round.ours.cpu_seconds),
                (against, mean(&|round| round.theirs.cpu_seconds)),
                1.0,
            ),
        ];
        for ratio in &ratios {
            eprintln!(
                "{:<58} {:>8.2} {:>8.2} {} {:>6.2}x",
                ratio.metric, ratio.ours, ratio.theirs, ratio.unit, ratio.ratio
            );
        }
        if !right {
            eprintln!("bench: some memory was not what it should be, or was not merged");
        }
        if self.json {
            let samples = rounds.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
            let report = Report { scenario: "ksm-merge", machine, samples, ratios };
            println!("{}", serde_json::to_string_pretty(&report)?);
        }
        Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Round {
    fn measure(doubles: Layout, singles: Layout) -> Result<Self> {
        let scanner = Scanner::acquire()?;
        scanner.forget_the_dead()?;
        let mut fleets = [Fleet::start(doubles, |_| ())?, Fleet::start(singles, |_| ())?];
        let pids: Vec<Pid> = fleets.iter().flat_map(Fleet::pids).collect();
        let ours = Ours::measure(&scanner, pids).context("our side")?;
        let mut wrong_words = wrong(&mut fleets)?;
        drop(fleets);
        scanner.forget_the_dead()?;
        let mut fleets = [Fleet::start(doubles, |_| ())?, Fleet::start(singles, |_| ())?];
        for fleet in &mut fleets {
            fleet.hand_over()?;
        }
        let theirs = scanner.run_until(doubles.saved(), AT_MOST).context("ksmd's side")?;
        scanner.rest()?;
        wrong_words += wrong(&mut fleets)?;
        drop(fleets);
        scanner.release()?;
        Ok(Self { ours, theirs, wrong_words })
    }

    fn is_right(&self, saved: u64) -> bool {
        let whole = |pages: u64| pages as f64 >= saved as f64 * 0.98;
        self.wrong_words == 0 && self.ours.report.end == End::Done && whole(self.ours.pages_saved)
    }
}

fn wrong(fleets: &mut [Fleet]) -> Result<u64> {
    fleets.iter_mut().try_fold(0, |sum, fleet| Ok(sum + fleet.wrong_words()?))
}

impl Ours {
    fn measure(scanner: &Scanner, processes: Vec<Pid>) -> Result<Self> {
        let sysfs = KsmSysfs::host();
        let own_cpu = || kernel::sched::usage(kernel::sched::Whose::Own).cpu();
        let before = Counters::read(&sysfs)?;
        let cpu = scanner.cpu() + own_cpu();
        let begun = Instant::now();
        let request = Request { processes, wait: Some(AT_MOST), ..Request::default() };
        let go_on = &mut |_| ControlFlow::Continue(());
        let report = request::merge(&request, &sysfs, &StatePath::for_this_user(), go_on)?;
        let seconds = begun.elapsed().as_secs_f64();
        let cpu_seconds = (scanner.cpu() + own_cpu()).saturating_sub(cpu).as_secs_f64();
        let pages_saved = Counters::read(&sysfs)?.pages_saved().saturating_sub(before.pages_saved());
        Ok(Self { seconds, cpu_seconds, pages_saved, report })
    }
}
