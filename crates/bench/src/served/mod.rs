//! `bench workers`: groups of equal workers that serve requests, merged in every way, one after the other in one run.
//!
//! Each way gets freshly started workers of real programs. What they take is their anonymous memory by proportional
//! shares, in which a page that ksmd has merged is counted once, and what the page store holds. Memory and CPU time of
//! whoever merges are told apart from it. All workers prove at the end that they hold what they must: most of it all
//! hold, which can be merged, and beside it each a fortieth as much that no other holds, so that a page of another worker
//! in its place is found. What that is, workers of the same numbers have said before that nobody merged.

mod compare;
mod findings;
mod group;
mod interrupt;
mod kind;
mod knobs;
mod load;
mod look;
mod measure;
mod postgres;
mod redis;
mod rounds;
mod way;
mod wire;
mod worker;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::programs::pagefold_beside;
use findings::{Findings, Not, say};
use group::{Merging, unmerged, warm_up};
use interrupt::INTERRUPTED;
use kind::Program;
use measure::{Measurement, Outcome, missing, reachable};
use rounds::plain_of;

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
    /// Rounds of all ways, each on fresh workers. After several, a line for each way has means and ranges; ratios are
    /// those of the means.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    pub repeat: u16,
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
    /// Measures and reports. Anything wrong is exit status 1. What was measured is told also when a signal ends this;
    /// the status is 130 then.
    ///
    /// # Errors
    /// When it cannot be measured at all.
    pub fn run(&self) -> Result<ExitCode> {
        interrupt::take_signals()?;
        distinct(&self.programs, "--programs")?;
        distinct(&self.ways, "--ways")?;
        distinct(&self.load, "--load")?;
        let ways = if self.ways.is_empty() { Way::value_variants() } else { &self.ways };
        let ours = ways.iter().any(|way| way.is_ours());
        let pagefold = if ours { pagefold_beside(self.pagefold.as_deref())? } else { PathBuf::new() };
        let mut findings = Findings::new();
        let ended = self.measure_all(ways, &pagefold, &mut findings);
        let interrupted = ended.is_err() && interrupt::go_on().is_err();
        findings.print(self.json, interrupted)?;
        if interrupted {
            return Ok(ExitCode::from(INTERRUPTED));
        }
        ended?;
        Ok(if findings.right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// All programs; one that failed was not right, and the others go on.
    ///
    /// # Errors
    /// That a signal has asked to end.
    fn measure_all(&self, ways: &[Way], pagefold: &Path, findings: &mut Findings) -> Result<()> {
        let programs = if self.programs.is_empty() { Kind::value_variants() } else { &self.programs };
        for kind in programs {
            if let Err(error) = self.measure_program(*kind, ways, pagefold, findings) {
                interrupt::go_on()?;
                findings.not(kind.name(), json!({ "program": kind }), Not::Failed(format!("{error:#}")));
            }
        }
        Ok(())
    }

    /// All loads of one program. It fails if its workers cannot be measured in any way.
    fn measure_program(&self, kind: Kind, ways: &[Way], pagefold: &Path, findings: &mut Findings) -> Result<()> {
        let folder = tempfile::Builder::new().prefix("workers").tempdir().context("create a folder")?;
        let program = match kind.find(folder.path())? {
            Ok(program) => program,
            Err(why) => {
                findings.not(kind.name(), json!({ "program": kind }), Not::Skipped(why));
                return Ok(());
            }
        };
        let first = ways.iter().copied().find(|way| way.is_ours());
        let pagefold = if first.is_some() { reachable(pagefold, &program)? } else { PathBuf::new() };
        let merging = |way| Merging { way, pagefold: pagefold.clone(), options: self.run_options.clone() };
        say(&format!("{}: warms up", kind.name()));
        let expected = unmerged(&program, self.count.into())?;
        warm_up(&program, &merging(first.unwrap_or(Way::Plain)), &expected)?;
        for &load in self.loads() {
            let measurement = |way: Way, round: u16| Measurement {
                merging: merging(way),
                load,
                round,
                count: self.count.into(),
                time: Duration::from_secs(self.seconds),
                scan_time: self.advisor_scan_time,
                expected: expected.clone(),
                folder: folder.path().join(format!("{}-{round}-{way:?}", load.name())),
            };
            let mut outcomes = Vec::new();
            let ended = self.measure_load(&program, load, ways, &measurement, &mut outcomes, findings);
            findings.add(&outcomes, self.repeat)?;
            ended?;
        }
        Ok(())
    }

    /// All rounds of all ways under one load. A way that failed was not right, and the others go on.
    ///
    /// # Errors
    /// That a signal has asked to end.
    fn measure_load(
        &self,
        program: &Program,
        load: Load,
        ways: &[Way],
        measurement: &dyn Fn(Way, u16) -> Measurement,
        outcomes: &mut Vec<Outcome>,
        findings: &mut Findings,
    ) -> Result<()> {
        let (program_name, load_name) = (program.kind.name(), load.name());
        let mut here = Vec::new();
        for &way in ways {
            match missing(way) {
                None => here.push(way),
                Some(why) => {
                    let what = json!({ "program": program.kind, "load": load, "way": way });
                    findings.not(&format!("{program_name} {load_name}: {}", way.name()), what, Not::Skipped(why));
                }
            }
        }
        for round in 1..=self.repeat {
            let of = if self.repeat > 1 { format!(", round {round} of {}", self.repeat) } else { String::new() };
            for &way in &here {
                let name = format!("{program_name} {load_name}{of}: {}", way.name());
                say(&format!("{name}: {} workers", self.count));
                match measurement(way, round).run(program) {
                    Ok(outcome) => {
                        say(&format!("{}{of}", compare::row(&outcome, plain_of(outcomes, round))));
                        outcomes.push(outcome);
                    }
                    Err(error) => {
                        let go_on = interrupt::go_on();
                        let not = if go_on.is_ok() { Not::Failed(format!("{error:#}")) } else { Not::Interrupted };
                        let what = json!({ "program": program.kind, "load": load, "way": way, "round": round });
                        findings.not(&name, what, not);
                        go_on?;
                    }
                }
            }
        }
        Ok(())
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
