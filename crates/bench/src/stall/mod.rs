//! `bench stall`: how long a reader and a writer wait while their pages are being merged.
//!
//! Two threads touch random pages of a range in which everything is equal to something. The writer writes what is there
//! already: the page gets its own copy, stays equal, and is merged again. A wait is an access during which the thread
//! slept, on a frozen page or for the lock of the address space. How long it slept is told too: on a machine without a free
//! CPU it then waits for one, as after every sleep. Beside it, the same threads under ksmd flat out.
//!
//! With `--max-runnable` also what holding back does for them: the broker at its own pace, without and with that limit, and
//! the memory that was saved in the meantime.

use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::{Value, json};

use crate::report::{Better, Machine, Ratio, Report};
use crate::sides::{Scanner, Spread, Store};
use crate::workers::{Access, Fleet, Layout, Touched};

/// Raw samples of a kind in the report.
const RAW: usize = 2000;

/// `bench stall`.
#[derive(Args, Clone, Debug)]
pub struct StallCommand {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub json: bool,
    /// A short form for tests: a second.
    #[arg(long)]
    pub quick: bool,
    /// One spinning process for each CPU besides.
    #[arg(long)]
    pub busy: bool,
    /// Memory that is touched, in MiB.
    #[arg(long, default_value_t = 32)]
    pub size: u64,
    /// For how long, in seconds.
    #[arg(long, default_value_t = 20)]
    pub seconds: u64,
    /// Writes in a second.
    #[arg(long, default_value_t = 40_000)]
    pub writes: u64,
    /// Also measure the broker at its own pace, as `pagefold run --stable 0.1` merges, without a limit and with this one
    /// for the threads that want each CPU.
    #[arg(long, value_name = "THREADS", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_runnable: Option<u64>,
}

/// For how long a page stays unwritten until the broker merges it by itself.
const STABLE: Duration = Duration::from_millis(100);

/// When our side merges.
#[derive(Clone, Copy, Debug)]
enum Pace {
    /// All the time, on request.
    Asked,
    /// By itself, unless so many threads want each CPU.
    Own { max_runnable: u64 },
}

impl StallCommand {
    /// Measures and reports. Wrong content is exit status 1.
    ///
    /// # Errors
    /// When a side cannot be run.
    pub fn run(&self) -> Result<ExitCode> {
        let machine = Machine::here();
        let (size, seconds) = if self.quick { (8, 1) } else { (self.size, self.seconds) };
        let layout = Layout::new((size << 20) / kernel::page_size(), 16, 2, 1);
        let spinners = if self.busy { Spinners::start()? } else { Spinners::default() };
        let store = self.store(layout, seconds, Pace::Asked).context("our side")?;
        let ksmd = self.ksmd(layout, seconds).context("ksmd's side")?;
        let paced = |max_runnable| self.store(layout, seconds, Pace::Own { max_runnable }).context("at its own pace");
        let own_pace = match self.max_runnable {
            Some(limit) => Some([paced(u64::MAX)?, paced(limit)?]),
            None => None,
        };
        drop(spinners);
        let (mut both, mut all) = (store.touched.reads.waits.clone(), ksmd.touched.writes.waits.clone());
        both.extend(&store.touched.writes.waits);
        let mut asleep = store.touched.reads.asleep.clone();
        asleep.extend(&store.touched.writes.asleep);
        let asleep = Spread::of(asleep);
        all.extend(&ksmd.touched.writes.slow);
        let (ours, faults) = (Spread::of(both), Spread::of(all));
        eprintln!("                        {}", Spread::head());
        let mut sides = vec![("store", &store), ("ksmd", &ksmd)];
        if let Some([free, held]) = &own_pace {
            sides.extend([("paced", free), ("held", held)]);
        }
        for &(who, side) in &sides {
            for (what, access) in [("reader", &side.touched.reads), ("writer", &side.touched.writes)] {
                eprintln!("{who:<5} {what} waits      {}", Spread::of(access.waits.clone()).row());
                eprintln!("{who:<5} {what}   asleep   {}", Spread::of(access.asleep.clone()).row());
                eprintln!("{who:<5} {what} slow       {}", Spread::of(access.slow.clone()).row());
            }
        }
        eprintln!("store: all waits        {}", ours.row());
        eprintln!("store: asleep in them   {}", asleep.row());
        eprintln!("ksmd: write faults      {}", faults.row());
        eprintln!(
            "pages merged per second: store {:.0}, ksmd {:.0}; held back {:.3} s; refused {}",
            store.rate, ksmd.rate, store.held_back_seconds, store.refused
        );
        if let Some([free, held]) = &own_pace {
            for (who, side) in [("never at rest", free), ("held back", held)] {
                eprintln!(
                    "at its own pace, {who}: {:.0} pages merged per second, {:.1} MiB saved on the average, at rest for {:.1} of {:.1} s",
                    side.rate,
                    side.saved_mib.unwrap_or_default(),
                    side.held_back_seconds,
                    side.touched.seconds
                );
            }
        }
        if ours.count < 10_000 {
            eprintln!("bench: only {} waits: p99.9 says little", ours.count);
        }
        anyhow::ensure!(ours.count > 0 && faults.count > 0, "nobody waited: nothing was measured");
        let limit = if self.busy { 5000.0 } else { 200.0 };
        let metric =
            if self.busy { "wait on a frozen page, busy, p99.9" } else { "wait on a frozen page, idle, p99.9" };
        let ours_us = ours.p999 as f64 / 1e3;
        let ratios = vec![
            Ratio::new((metric, "us", Better::Less), ours_us, ("the limit", limit), 1.0),
            Ratio::new(
                ("of that asleep, p99.9", "us", Better::Less),
                asleep.p999 as f64 / 1e3,
                ("the limit", limit),
                if self.busy { 1.0 } else { 0.0 },
            ),
            Ratio::new(
                (metric, "us", Better::Less),
                ours_us,
                ("write fault under ksmd", faults.p999 as f64 / 1e3),
                0.0,
            ),
            Ratio::new(
                ("pages merged meanwhile", "pages/s", Better::More),
                store.rate,
                ("at least", 1000.0),
                if self.busy { 1.0 } else { 0.0 },
            ),
        ];
        for ratio in &ratios {
            let met = if ratio.met { "" } else { " missed" };
            eprintln!(
                "{:<40} {:>10.1} against {:>10.1} {} ({}): {:.2}x{met}",
                ratio.metric, ratio.ours, ratio.theirs, ratio.unit, ratio.against, ratio.ratio
            );
        }
        let wrong: u64 = sides.iter().map(|(_, side)| side.wrong_words).sum();
        if wrong > 0 {
            eprintln!("bench: {wrong} words were wrong afterwards");
        }
        if self.json {
            let samples = sides.iter().map(|(who, side)| side.sample(who, self.busy)).collect();
            let report = Report { scenario: "stall", machine, samples, ratios };
            println!("{}", serde_json::to_string(&report)?);
        }
        Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn store(&self, layout: Layout, seconds: u64, pace: Pace) -> Result<Side> {
        let store = match pace {
            Pace::Asked => Store::open()?,
            Pace::Own { max_runnable } => Store::open_scanning(STABLE, max_runnable)?,
        };
        let mut fleet = Fleet::start(layout, |command| store.lead_in(command))?;
        fleet.hand_over()?;
        store.wait_for_members(layout.workers)?;
        let pids: Vec<_> = fleet.pids().collect();
        store.merge(pids.iter().copied())?;
        let (mut refused, mut saved) = (0, Vec::new());
        let before = store.summary()?;
        let touched = fleet.touch(seconds * 1000, self.writes, || {
            if matches!(pace, Pace::Own { .. }) {
                std::thread::sleep(Duration::from_millis(250));
                saved.push(store.summary()?.bytes_saved as f64 / f64::from(1 << 20));
                return Ok(());
            }
            let report = store.merge(pids.iter().copied())?;
            refused += report.pages_refused();
            if report.pages_merged < 64 {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        })?;
        let after = store.summary()?;
        Ok(Side {
            rate: (after.merges + after.retaken - before.merges - before.retaken) as f64 / touched.seconds,
            saved_mib: (!saved.is_empty()).then(|| saved.iter().sum::<f64>() / saved.len() as f64),
            held_back_seconds: after.held_back_seconds - before.held_back_seconds,
            frozen: Some(serde_json::to_value(after.frozen_seconds)?),
            refused,
            wrong_words: fleet.wrong_words()?,
            touched,
        })
    }

    fn ksmd(&self, layout: Layout, seconds: u64) -> Result<Side> {
        let scanner = Scanner::acquire()?;
        scanner.forget_the_dead()?;
        let mut fleet = Fleet::start(layout, |_| ())?;
        fleet.hand_over()?;
        scanner.run_until(layout.saved(), Duration::from_secs(120))?;
        let (mut merged, mut before) = (0, scanner.counters()?.pages_sharing);
        let begun = Instant::now();
        let touched = fleet.touch(seconds * 1000, self.writes, || {
            let now = scanner.counters()?.pages_sharing;
            // Each rise is merges; falls in between hide some of them.
            merged += now.saturating_sub(before);
            before = now;
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        })?;
        let rate = merged as f64 / begun.elapsed().as_secs_f64();
        scanner.rest()?;
        let wrong_words = fleet.wrong_words()?;
        drop(fleet);
        scanner.release()?;
        Ok(Side { rate, saved_mib: None, held_back_seconds: 0.0, frozen: None, refused: 0, wrong_words, touched })
    }
}

/// What one side did to the two threads.
struct Side {
    /// Pages merged in a second.
    rate: f64,
    /// Saved on the average, where that was looked at.
    saved_mib: Option<f64>,
    held_back_seconds: f64,
    frozen: Option<Value>,
    refused: u64,
    wrong_words: u64,
    touched: Touched,
}

impl Side {
    fn sample(&self, who: &str, busy: bool) -> Value {
        let access = |access: &Access| {
            json!({
                "accesses": access.accesses,
                "waits": Spread::of(access.waits.clone()),
                "asleep": Spread::of(access.asleep.clone()),
                "slow": Spread::of(access.slow.clone()),
                "waits_ns": thin(&access.waits),
                "slow_ns": thin(&access.slow),
            })
        };
        json!({
            "who": who,
            "busy": busy,
            "seconds": self.touched.seconds,
            "pages_merged_per_second": self.rate,
            "saved_mib": self.saved_mib,
            "held_back_seconds": self.held_back_seconds,
            "frozen_seconds": self.frozen,
            "refused": self.refused,
            "wrong_words": self.wrong_words,
            "reads": access(&self.touched.reads),
            "writes": access(&self.touched.writes),
        })
    }
}

/// So many of an ordered list, evenly taken from its end on, that a reader of the report can draw it.
fn thin(ascending: &[u64]) -> Vec<u64> {
    let step = ascending.len().div_ceil(RAW).max(1);
    let mut thin: Vec<u64> = ascending.iter().rev().step_by(step).copied().collect();
    thin.reverse();
    thin
}

/// Processes that keep every CPU busy, ended when this goes.
#[derive(Debug, Default)]
struct Spinners(Vec<Child>);

impl Spinners {
    fn start() -> Result<Self> {
        let mut spinners = Self::default();
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            let mut command = Command::new("/proc/self/exe");
            command.arg("spin").stdin(Stdio::piped());
            spinners.0.push(command.spawn().context("cannot start a spinning process")?);
        }
        Ok(spinners)
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        for spinner in &mut self.0 {
            let _ = spinner.kill();
            let _ = spinner.wait();
        }
    }
}
