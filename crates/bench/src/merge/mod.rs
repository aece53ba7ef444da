//! `bench merge`: from start to merged, and the merge step alone, ours and ksmd flat out.
//!
//! The same contents in the same order, spread over as many processes, are merged by both. Start to merged: the memory
//! is filled and handed over, nothing is known of it; until all that can be merged is merged. Store filled: as many
//! processes again come with the same contents while the first still map theirs.

mod case;

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::report::{Better, Machine, Ratio, Report};
use case::{Case, Outcome};

/// `bench merge`.
#[derive(Args, Clone, Debug)]
pub struct MergeCommand {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub json: bool,
    /// A short form for tests: little memory.
    #[arg(long)]
    pub quick: bool,
    /// Memory of all processes in MiB.
    #[arg(long, default_value_t = 1024)]
    pub size: u64,
    /// Lengths of runs of equal pages.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 16, 1])]
    pub runs: Vec<u64>,
    /// How often each content occurs.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 8])]
    pub copies: Vec<u64>,
    /// Only ours: for looking where the time goes.
    #[arg(long)]
    pub alone: bool,
}

impl MergeCommand {
    /// Measures and reports. Wrong content is exit status 1.
    ///
    /// # Errors
    /// When a side cannot be run.
    pub fn run(&self) -> Result<ExitCode> {
        let size = if self.quick { 16 } else { self.size };
        let mut outcomes = Vec::new();
        let machine = Machine::here();
        eprintln!("{}", Outcome::head());
        for copies in &self.copies {
            for run in &self.runs {
                let case = Case::new(size, *run, *copies);
                let outcome = case.measure(self.alone)?;
                for line in outcome.rows() {
                    eprintln!("{line}");
                }
                outcomes.push(outcome);
            }
        }
        let right = outcomes.iter().all(Outcome::is_right);
        let ratios: Vec<Ratio> = outcomes.iter().flat_map(ratios).collect();
        for ratio in &ratios {
            let goal = if ratio.goal > 0.0 { format!(" goal {:>4.1}", ratio.goal) } else { String::new() };
            let met = if ratio.met { "" } else { " missed" };
            eprintln!(
                "{:<58} {:>10.2} {:>10.2} {:<22} {:>6.2}x{goal}{met}",
                ratio.metric, ratio.ours, ratio.theirs, ratio.unit, ratio.ratio
            );
        }
        if !right {
            eprintln!("bench: some memory was not what it should be, or was not merged");
        }
        if self.json {
            let samples = outcomes.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
            let report = Report { scenario: "merge", machine, samples, ratios };
            println!("{}", serde_json::to_string_pretty(&report)?);
        }
        Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn ratios(outcome: &Outcome) -> Vec<Ratio> {
    // Without anything merged by ksmd there is nothing to compare with.
    let Some(ksmd) = outcome.ksmd.as_ref().filter(|ksmd| ksmd.start.pages_saved > 0) else { return Vec::new() };
    let case = &outcome.case;
    let ours = &outcome.store;
    let pairs = case.layout.copies == 2;
    let of = format!("runs of {}, {} copies", case.layout.run, case.layout.copies);
    // Goals are set for pairs, in long runs and as single pages.
    let goal = |long: f64, single: f64| match case.layout.run {
        256 if pairs => long,
        1 if pairs => single,
        _ => 0.0,
    };
    let against = "ksmd flat out";
    let time = |what: &str, unit, ours: f64, theirs: f64, goal: f64| {
        Ratio::new((format!("{what}, {of}"), unit, Better::Less), ours, (against, theirs), goal)
    };
    let saved = |seconds: f64, pages: u64| seconds * 1e6 / pages.max(1) as f64;
    let per_second =
        |pages: u64, seconds: f64| pages as f64 * kernel::page_size() as f64 / f64::from(1 << 20) / seconds.max(1e-9);
    let (first, theirs) = (&ours.start, &ksmd.start);
    vec![
        time(
            "start to merged, time",
            "us per page saved",
            saved(first.seconds, first.pages_saved),
            saved(theirs.seconds, theirs.pages_saved),
            goal(8.0, 2.0),
        ),
        time(
            "start to merged, CPU",
            "us per page saved",
            saved(first.cpu_seconds, first.pages_saved),
            saved(theirs.cpu_seconds, theirs.pages_saved),
            goal(8.0, 2.0),
        ),
        Ratio::new(
            (format!("start to merged, {of}"), "MiB saved / CPU s", Better::More),
            per_second(first.pages_saved, first.cpu_seconds),
            (against, per_second(theirs.pages_saved, theirs.cpu_seconds)),
            0.0,
        ),
        time(
            "merge step alone, store filled, against ksmd per page",
            "us per page",
            saved(ours.step_seconds, ours.filled.pages_saved),
            saved(theirs.seconds, case.layout.pages),
            goal(15.0, 1.2),
        ),
        time(
            "same contents again, with the scan",
            "us per page",
            saved(ours.filled.seconds, ours.filled.pages_saved),
            saved(ksmd.filled.seconds, ksmd.filled.pages_saved),
            0.0,
        ),
    ]
}
