//! `bench SCENARIO`: pagefold and its peers, measured in one run.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Result;
use bench::guest::GuestCommand;
use bench::vm::VmCommand;
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
    /// Start guests, or run a program on another kernel.
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Guests without merging, under kernel KSM and under pagefold.
    Vm(VmCommand),
}

impl Scenario {
    fn run(&self) -> Result<ExitCode> {
        match self {
            Self::Guest(command) => command.run(),
            Self::Vm(command) => command.run(),
        }
    }
}

fn main() -> ExitCode {
    Cli::parse().scenario.run().unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::FAILURE
    })
}
