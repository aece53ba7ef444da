//! `bench vm`: guests that hold the same files, without merging, under kernel KSM and under pagefold.
//!
//! Every way to merge gets fresh guests, started in the same way, that check their memory all the time. Other programs
//! on the host change its `AnonPages` and `Shmem` too; ratios are made of the guests' own share of them, which is what
//! every mapping's pages come to when a page with N users counts as an Nth for each.

mod disturb;
pub(crate) mod host;
mod phase;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::guest::{Kernel, check_initramfs};
use crate::programs::pagefold_beside;
use crate::report::{Better, Machine, Ratio, Report};
use phase::{Guests, Outcome};

pub use phase::Phase;

/// `bench vm`.
#[derive(Args, Clone, Debug)]
pub struct VmCommand {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub json: bool,
    /// A short form: two guests, two phases, about a minute.
    #[arg(long)]
    pub short: bool,
    /// Only these phases, in this order.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub phases: Vec<Phase>,
    /// Kernel series of the guests.
    #[arg(long, default_value = "6.1")]
    pub kernel: String,
    /// How many guests.
    #[arg(long, default_value_t = 3)]
    pub guests: u32,
    /// Memory of each in MiB.
    #[arg(long, default_value_t = 256)]
    pub memory: u32,
    /// Files that each holds and checks, in MiB.
    #[arg(long, default_value_t = 96)]
    pub files: u32,
    /// A disk for each, in MiB, opened past the page cache; 0 for none.
    #[arg(long, default_value_t = 64)]
    pub disk: u64,
    /// How long they are watched once ready, in seconds.
    #[arg(long, default_value_t = 300)]
    pub seconds: u64,
    /// Stop, debug, freeze and balloon the guests meanwhile.
    #[arg(long)]
    pub disturb: bool,
    /// The pagefold binary; by default the one beside this one.
    #[arg(long, value_name = "FILE")]
    pub pagefold: Option<PathBuf>,
    /// Options for `pagefold run`.
    #[arg(last = true, value_name = "OPTIONS")]
    pub run_options: Vec<OsString>,
}

impl VmCommand {
    /// Runs the phases and reports.
    ///
    /// # Errors
    ///
    /// When a phase cannot be run. Wrong guest checks are no error but exit status 1.
    pub fn run(&self) -> Result<ExitCode> {
        let (report, right) = self.measure()?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        }
        Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Runs the phases. The second value says whether every guest check was right.
    ///
    /// # Errors
    ///
    /// As [`VmCommand::run`].
    pub fn measure(&self) -> Result<(Report, bool)> {
        let machine = Machine::here();
        let kernel = Kernel::of_series(&self.kernel)?;
        let folder = tempfile::Builder::new().prefix("vm").tempdir().context("create a folder for the image")?;
        let initramfs = folder.path().join("initramfs");
        check_initramfs(&kernel, &initramfs)?;
        let mut pagefold = vec![pagefold_beside(self.pagefold.as_deref())?.into_os_string(), "run".into()];
        pagefold.extend(self.run_options.iter().cloned());
        let guests = Guests {
            kernel,
            initramfs,
            count: if self.short { 2 } else { self.guests },
            memory_mib: self.memory,
            files_mib: if self.short { self.files.min(48) } else { self.files },
            disk_mib: self.disk,
            time: Duration::from_secs(if self.short { self.seconds.min(25) } else { self.seconds }),
            pagefold,
            disturb: self.disturb,
        };
        let phases = match (self.phases.is_empty(), self.short) {
            (false, _) => self.phases.clone(),
            (true, true) => vec![Phase::Plain, Phase::Pagefold],
            (true, false) => vec![Phase::Plain, Phase::KsmDefault, Phase::KsmFlatOut, Phase::Pagefold],
        };
        let mut outcomes = Vec::new();
        for phase in phases {
            let outcome = guests.run(phase).with_context(|| phase.name())?;
            eprintln!("{}", row(&outcome));
            outcomes.push(outcome);
        }
        let right = outcomes.iter().all(|outcome| outcome.checks_bad == 0);
        let samples = outcomes.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
        Ok((Report { scenario: "vm", machine, samples, ratios: ratios(&outcomes) }, right))
    }
}

/// A line of the table.
fn row(outcome: &Outcome) -> String {
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let mut text = format!(
        "{:<14} settled: host {:.0} MiB, guests {:.0} MiB; {} rounds ok, {} of {} checks wrong; CPU {:.1} s in {:.0} s",
        outcome.phase.name(),
        mib(outcome.settled_host),
        mib(outcome.settled_tree),
        outcome.rounds_ok,
        outcome.checks_bad,
        outcome.checks,
        outcome.cpu_seconds,
        outcome.elapsed_seconds,
    );
    if outcome.summary.is_some() {
        let [p50, p99, p999, max] =
            ["p50", "p99", "p999", "max"].map(|name| outcome.of_summary(&format!("/frozen_seconds/{name}")) * 1e6);
        text.push_str(&format!("; frozen us p50 {p50:.0} p99 {p99:.0} p99.9 {p999:.0} max {max:.0}"));
        for name in ["merges", "retaken", "diverged", "zero_pages", "unshared_by_write"] {
            text.push_str(&format!("; {name} {}", outcome.of_summary(&format!("/{name}"))));
        }
    }
    if let Some(disturbed) = outcome.disturbed {
        text.push_str(&format!("; {disturbed:?}"));
    }
    text
}

fn ratios(outcomes: &[Outcome]) -> Vec<Ratio> {
    let of = |phase: Phase| outcomes.iter().find(|outcome| outcome.phase == phase);
    let Some(ours) = of(Phase::Pagefold) else { return Vec::new() };
    let mut ratios = Vec::new();
    for (phase, goal) in [(Phase::Plain, 1.2), (Phase::KsmDefault, 1.0), (Phase::KsmFlatOut, 1.0)] {
        let Some(theirs) = of(phase) else { continue };
        let memory = ("memory of the guests once settled", "bytes", Better::Less);
        ratios.push(Ratio::new(memory, ours.settled_tree, (phase.name(), theirs.settled_tree), goal));
        let wrong = ("guest checks that were wrong", "checks", Better::Less);
        ratios.push(Ratio::new(wrong, ours.checks_bad as f64, (phase.name(), theirs.checks_bad as f64), 1.0));
    }
    if let Some(plain) = of(Phase::Plain) {
        for phase in [Phase::KsmDefault, Phase::KsmFlatOut] {
            let Some(theirs) = of(phase) else { continue };
            let rate = ("saved for CPU", "MiB/s", Better::More);
            let [ours, theirs] = [ours, theirs].map(|outcome| outcome.saved_per_second(plain.settled_tree));
            ratios.push(Ratio::new(rate, ours, (phase.name(), theirs), 5.0));
        }
    }
    ratios
}
