//! `bench SCENARIO`: pagefold and its peers, measured in one run.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Result;
use bench::advisor::AdvisorCommand;
use bench::cow::CowCommand;
use bench::eval::EvalCommand;
use bench::guest::GuestCommand;
use bench::inside::InsideCommand;
use bench::ksm_merge::KsmMergeCommand;
use bench::merge::MergeCommand;
use bench::predict::PredictCommand;
use bench::served::ServedCommand;
use bench::sides::{GuardianCommand, KsmGuardianCommand};
use bench::soak::SoakArgs;
use bench::stall::StallCommand;
use bench::start::StartCommand;
use bench::vm::VmCommand;
use bench::workers::{SpinCommand, WorkerCommand};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    scenario: Scenario,
}

/// One line for each scenario.
#[derive(Debug, Subcommand)]
enum Scenario {
    /// Our advisor of ksmd beside the kernel's own, for a quick goal and a slow one.
    Advisor(AdvisorCommand),
    /// Start guests, or run a program on another kernel.
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Guests without merging, under kernel KSM and under pagefold.
    Vm(VmCommand),
    /// Equal pages from start to merged, and the merge step alone, beside ksmd flat out.
    Merge(MergeCommand),
    /// Merging on request with the kernel's KSM, beside ksmd alone with everything marked.
    KsmMerge(KsmMergeCommand),
    /// How long a write takes that gives a merged page its own copy again.
    Cow(CowCommand),
    /// How fast an evaluation is beside reading alone, and what it costs.
    Eval(EvalCommand),
    /// What an evaluation says that kernel KSM will reach, and what it reaches, on real programs.
    Predict(PredictCommand),
    /// How long a reader and a writer wait while their pages are merged.
    Stall(StallCommand),
    /// What a program pays for being managed whole: at its start, for its helper, in private memory.
    Start(StartCommand),
    /// Workers of real programs that serve requests: without merging, under kernel KSM and under pagefold.
    ///
    /// Every program, load, way and round takes --seconds and the time for loading: about an hour and a half if nothing is
    /// left out. It takes root for KSM's settings; the report has them as they were in force. What is not installed, or what
    /// this kernel lacks, is said and left out. Beside what all workers hold, each holds a fortieth as much that no other
    /// holds: a page of another in its place is found.
    ///
    /// The status is 1 if any answer or any worker's memory was wrong, or if a worker ended. After Ctrl-C, what was measured
    /// until then is told, everything that was started is ended, KSM's settings are put back, and the status is 130; a
    /// second Ctrl-C ends at once and tells nothing.
    Workers(ServedCommand),
    /// Torture managed memory while helper, broker and guardian are killed, and check every byte.
    Soak(SoakArgs),
    #[command(subcommand, hide = true)]
    Inside(InsideCommand),
    #[command(hide = true)]
    Worker(WorkerCommand),
    #[command(hide = true)]
    Spin(SpinCommand),
    #[command(hide = true)]
    Guardian(GuardianCommand),
    #[command(hide = true)]
    KsmGuardian(KsmGuardianCommand),
}

impl Scenario {
    fn run(&self) -> Result<ExitCode> {
        match self {
            Self::Advisor(command) => command.run(),
            Self::Guest(command) => command.run(),
            Self::Vm(command) => command.run(),
            Self::Merge(command) => command.run(),
            Self::KsmMerge(command) => command.run(),
            Self::Cow(command) => command.run(),
            Self::Eval(command) => command.run(),
            Self::Predict(command) => command.run(),
            Self::Stall(command) => command.run(),
            Self::Soak(args) => args.command(),
            Self::Start(command) => command.run(),
            Self::Workers(command) => command.run(),
            Self::Inside(command) => command.run(),
            Self::Worker(command) => command.run(),
            Self::Spin(command) => command.run(),
            Self::Guardian(command) => command.run(),
            Self::KsmGuardian(command) => command.run(),
        }
    }
}

fn main() -> ExitCode {
    Cli::parse().scenario.run().unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::FAILURE
    })
}
