//! `bench workers`: groups of equal workers that serve requests, merged in every way, one after the other in one run.
//!
//! Each way gets freshly started workers of real programs. What they take is their anonymous memory by proportional
//! shares, in which a page that ksmd has merged is counted once, and what the page store holds. Memory and CPU time of
//! whoever merges are told apart from it. All workers prove at the end that they hold what they must: most of it all
//! hold, which can be merged, and beside it each an eighth as much that no other holds, so that a page of another worker
//! in its place is found. What that is, workers of the same numbers have said before that nobody merged.

mod compare;
mod group;
mod interrupt;
mod kind;
mod load;
mod look;
mod measure;
mod postgres;
mod redis;
mod way;
mod wire;
mod worker;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::programs::pagefold_beside;
use crate::report::{Machine, Report};
use group::{Merging, unmerged, warm_up};
use measure::{Measurement, Outcome, missing, reachable};

use kind::Program;

pub use kind::Kind;
pub use load::Load;
pub use way::Way;

/// `bench workers`.
#[derive(Args, Clone, Debug)]
pub struct ServedCommand {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub json: bool,
    /// Only these programs, in this order.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub programs: Vec<Kind>,
    /// Only these ways, in this order. Savings and slowdowns need `plain` among them.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub ways: Vec<Way>,
    /// Only these loads; both have workers, and a `plain`, of their own.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub load: Vec<Load>,
    /// Workers in a group.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(2..=256))]
    pub count: u16,
    /// How long they serve in each way, in seconds; memory is that of the last third.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// The pass time, in seconds, that the kernel's advisor is given as its goal; the kernel's own default is 200.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    pub advisor_scan_time: u32,
    /// The pagefold binary; by default the one beside this one.
    #[arg(long, value_name = "FILE")]
    pub pagefold: Option<PathBuf>,
    /// More options for `pagefold run`.
    #[arg(last = true, value_name = "OPTIONS")]
    pub run_options: Vec<OsString>,
}

impl ServedCommand {
    /// Measures and reports. Anything wrong is exit status 1.
    ///
    /// # Errors
    /// When it cannot be measured at all, or is interrupted.
    pub fn run(&self) -> Result<ExitCode> {
        interrupt::take_signals()?;
        let machine = Machine::here();
        distinct(&self.programs, "--programs")?;
        distinct(&self.ways, "--ways")?;
        distinct(&self.load, "--load")?;
        let ways = if self.ways.is_empty() { Way::value_variants() } else { &self.ways };
        let ours = ways.iter().any(|way| way.is_ours());
        let pagefold = if ours { pagefold_beside(self.pagefold.as_deref())? } else { PathBuf::new() };
        let mut report = Report { scenario: "workers", machine, samples: Vec::new(), ratios: Vec::new() };
        let mut right = true;
        let programs = if self.programs.is_empty() { Kind::value_variants() } else { &self.programs };
        for kind in programs {
            let folder = tempfile::Builder::new().prefix("workers").tempdir().context("create a folder")?;
            let program = match kind.find(folder.path()).with_context(|| kind.name())? {
                Ok(program) => program,
                Err(why) => {
                    eprintln!("{}: skipped: {why}", kind.name());
                    report.samples.push(json!({ "program": kind, "skipped": why }));
                    continue;
                }
            };
            let pagefold = if ours { reachable(&pagefold, &program)? } else { PathBuf::new() };
            let merging = |way| Merging { way, pagefold: pagefold.clone(), options: self.run_options.clone() };
            let first = ways.iter().copied().find(|way| way.is_ours()).unwrap_or(Way::Plain);
            eprintln!("{}: warms up", kind.name());
            let expected = unmerged(&program, self.count.into());
            let ready = expected.and_then(|all| warm_up(&program, &merging(first), &all).map(|()| all));
            let expected = match ready {
                Ok(expected) => expected,
                Err(error) => {
                    interrupt::go_on()?;
                    eprintln!("{}: failed: {error:#}", kind.name());
                    report.samples.push(json!({ "program": kind, "failed": format!("{error:#}") }));
                    right = false;
                    continue;
                }
            };
            for load in self.loads() {
                let measurement = |way: Way, number: usize| Measurement {
                    merging: merging(way),
                    load: *load,
                    count: self.count.into(),
                    time: Duration::from_secs(self.seconds),
                    scan_time: self.advisor_scan_time,
                    expected: expected.clone(),
                    folder: folder.path().join(format!("{}-{number}", load.name())),
                };
                right &= self.measure(&program, *load, ways, &measurement, &mut report)?;
            }
        }
        for ratio in report.ratios.iter().filter(|ratio| !ratio.met) {
            eprintln!(
                "missed: {}: {:.3} {} against {:.3} ({}), ratio {:.3}, goal {:.2}",
                ratio.metric, ratio.ours, ratio.unit, ratio.theirs, ratio.against, ratio.ratio, ratio.goal
            );
        }
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        }
        Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// All ways under one load. Whether everything was right; a way that failed was not, and the others go on.
    fn measure(
        &self,
        program: &Program,
        load: Load,
        ways: &[Way],
        measurement: &dyn Fn(Way, usize) -> Measurement,
        report: &mut Report,
    ) -> Result<bool> {
        let mut outcomes: Vec<Outcome> = Vec::new();
        let mut right = true;
        for (number, &way) in ways.iter().enumerate() {
            let name = format!("{} {}: {}", program.kind.name(), load.name(), way.name());
            let mut told = |word: &str, why: String| {
                eprintln!("{name}: {word}: {why}");
                report.samples.push(json!({ "program": program.kind, "load": load, "way": way, word: why }));
            };
            if let Some(why) = missing(way) {
                told("skipped", why);
                continue;
            }
            eprintln!("{name}: {} workers", self.count);
            match measurement(way, number).run(program) {
                Ok(outcome) => {
                    let plain = outcomes.iter().find(|outcome| outcome.way == Way::Plain);
                    eprintln!("{}", compare::row(&outcome, plain));
                    right &= outcome.right();
                    outcomes.push(outcome);
                }
                Err(error) => {
                    interrupt::go_on()?;
                    told("failed", format!("{error:#}"));
                    right = false;
                }
            }
        }
        let plain = outcomes.iter().find(|outcome| outcome.way == Way::Plain);
        for outcome in &outcomes {
            report.samples.push(compare::sample(outcome, plain)?);
        }
        report.ratios.extend(compare::ratios(&outcomes));
        Ok(right)
    }

    fn loads(&self) -> &[Load] {
        if self.load.is_empty() { Load::value_variants() } else { &self.load }
    }
}

/// What is named twice would be measured twice and told as one.
fn distinct<T: ValueEnum>(named: &[T], option: &str) -> Result<()> {
    let names: Vec<_> = named.iter().filter_map(ValueEnum::to_possible_value).collect();
    for (number, name) in names.iter().enumerate() {
        ensure!(!names[..number].contains(name), "{option} names {} twice", name.get_name());
    }
    Ok(())
}
