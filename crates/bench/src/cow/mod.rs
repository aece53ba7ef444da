//! `bench cow`: how long a write takes that gives a merged page its own copy again, ours and ksmd's.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::json;

use crate::report::{Better, Machine, Ratio, Report};
use crate::sides::{Scanner, Spread, Store};
use crate::workers::{Fleet, Layout};

/// `bench cow`.
#[derive(Args, Clone, Debug)]
pub struct CowCommand {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub json: bool,
    /// A short form for tests: few writes.
    #[arg(long)]
    pub quick: bool,
    /// Writes of each side.
    #[arg(long, default_value_t = 20_000)]
    pub writes: u64,
}

/// The latencies of one side.
struct Side {
    nanoseconds: Vec<u64>,
    wrong_words: u64,
}

impl CowCommand {
    /// Measures and reports. Wrong content is exit status 1.
    ///
    /// # Errors
    /// When a side cannot be run.
    pub fn run(&self) -> Result<ExitCode> {
        let machine = Machine::here();
        let writes = if self.quick { 1000 } else { self.writes };
        // Pairs in runs of 16, both in one process: all of its pages are merged, and each is written once.
        let layout = Layout::new(writes.next_multiple_of(64), 16, 2, 1);
        let store = store(layout).context("our side")?;
        let ksmd = ksmd(layout).context("ksmd's side")?;
        let spread = |side: &Side| Spread::of(side.nanoseconds.clone());
        let (ours, theirs) = (spread(&store), spread(&ksmd));
        eprintln!("write to a merged page  {}", Spread::head());
        eprintln!("store                   {}", ours.row());
        eprintln!("ksmd                    {}", theirs.row());
        let ratio = |metric, ours: u64, theirs: u64| {
            Ratio::new((metric, "us", Better::Less), ours as f64 / 1e3, ("ksmd", theirs as f64 / 1e3), 0.0)
        };
        let ratios = vec![
            ratio("un-sharing write, p50", ours.p50, theirs.p50),
            ratio("un-sharing write, p99", ours.p99, theirs.p99),
            ratio("un-sharing write, p99.9", ours.p999, theirs.p999),
            ratio("un-sharing write, max", ours.max, theirs.max),
        ];
        let right = store.wrong_words == 0 && ksmd.wrong_words == 0;
        if !right {
            eprintln!("bench: {} and {} words were wrong afterwards", store.wrong_words, ksmd.wrong_words);
        }
        if self.json {
            let sample = |who: &str, side: &Side, spread: Spread| json!({ "who": who, "spread_ns": spread, "nanoseconds": side.nanoseconds, "wrong_words": side.wrong_words });
            let samples = vec![sample("store", &store, ours), sample("ksmd", &ksmd, theirs)];
            let report = Report { scenario: "cow", machine, samples, ratios };
            println!("{}", serde_json::to_string(&report)?);
        }
        Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn store(layout: Layout) -> Result<Side> {
    let store = Store::open()?;
    let mut fleet = Fleet::start(layout, |command| store.lead_in(command))?;
    fleet.hand_over()?;
    store.wait_for_members(layout.workers)?;
    store.merge(fleet.pids())?;
    let merged = store.summary()?.pages_sharing;
    ensure!(merged * 10 >= layout.saved() * 9, "only {merged} of {} pages were merged", layout.saved());
    let nanoseconds = fleet.write(layout.pages)?;
    Ok(Side { nanoseconds, wrong_words: fleet.wrong_words()? })
}

fn ksmd(layout: Layout) -> Result<Side> {
    let scanner = Scanner::acquire()?;
    scanner.forget_the_dead()?;
    let mut fleet = Fleet::start(layout, |_| ())?;
    fleet.hand_over()?;
    let reached = scanner.run_until(layout.saved(), Duration::from_secs(60))?;
    // Only the write is measured, not whoever scans meanwhile.
    scanner.rest()?;
    ensure!(reached.pages_saved * 10 >= layout.saved() * 9, "ksmd merged only {} pages", reached.pages_saved);
    let nanoseconds = fleet.write(layout.pages)?;
    let side = Side { nanoseconds, wrong_words: fleet.wrong_words()? };
    drop(fleet);
    scanner.release()?;
    Ok(side)
}
