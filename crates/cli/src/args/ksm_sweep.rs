//! `pagefold ksm sweep`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// `pagefold ksm sweep`.
#[derive(Args, Debug)]
pub(crate) struct SweepArgs {
    /// A file of settings to try, one a line: words like pages_to_scan=1000, or `off`, a name and a colon before them
    /// if wanted.
    #[arg(long, value_name = "FILE", conflicts_with = "grid")]
    pub(crate) settings: Option<PathBuf>,
    /// Values of one of KSM's files to try; several times: all combinations, and off.
    #[arg(long, value_name = "KEY=VALUE,VALUE...")]
    pub(crate) grid: Vec<String>,
    /// Runs of each setting, in turns.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) repeat: u32,
    /// End the command after so many seconds, as a server must be; without, its own end is waited for.
    #[arg(long = "for", value_name = "SECONDS", value_parser = above_nothing, allow_negative_numbers = true)]
    pub(crate) duration: Option<f64>,
    /// Most seconds before each run that ksmd may take to forget the run before.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = super::seconds, allow_negative_numbers = true)]
    pub(crate) settle: f64,
    /// No run before all others that fills caches and does not count.
    #[arg(long)]
    pub(crate) no_warm_up: bool,
    /// What is wanted most.
    #[arg(long, value_enum, default_value_t = AimArg::Balanced)]
    pub(crate) goal: AimArg,
    /// Write sweep.json and sweep.html to this folder, which is made if it is not there; rewritten after each run.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Print one JSON document to stdout; what the command prints there goes to stderr then.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the report to this file too, as one HTML page with drawings that needs nothing else.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// No progress on stderr.
    #[arg(long)]
    pub(crate) quiet: bool,
    /// The command and its arguments. Each run reads the same stdin: a file is read from the same place again, and instead
    /// of a pipe or a terminal it is /dev/null.
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

/// What is wanted most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AimArg {
    /// Nine tenths of the most that can be saved at the least CPU of ksmd, the command slowed by 5 % at most.
    Balanced,
    /// The most bytes saved, on average over a run.
    Saved,
    /// The most saved for a second of ksmd, with half of the most saved.
    Efficiency,
    /// The shortest run, with half of the most saved.
    RunTime,
}

fn above_nothing(text: &str) -> Result<f64, String> {
    super::seconds(text).and_then(|seconds| if seconds > 0.0 { Ok(seconds) } else { Err("must be above 0".to_owned()) })
}
