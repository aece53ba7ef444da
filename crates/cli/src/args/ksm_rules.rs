//! `pagefold ksm rules`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// `pagefold ksm rules`.
#[derive(Args, Debug)]
pub(crate) struct RulesArgs {
    #[command(subcommand)]
    pub(crate) command: RulesCommand,
}

/// What is to be done with a file of rules.
#[derive(Debug, Subcommand)]
pub(crate) enum RulesCommand {
    /// Read a file of rules, say what each rule does and what is wrong with it.
    Check(CheckArgs),
    /// Say what a file of rules would do to whom, and why. Nothing is changed.
    DryRun(DryRunArgs),
    /// Enable and disable processes as a file of rules says, once or for as long as it runs.
    Apply(ApplyArgs),
    /// Disable everything that `apply` has enabled, with what that has started since.
    Undo(UndoArgs),
    /// Print the list of programs that are never merged, with the reasons.
    NeverMerge(NeverMergeArgs),
}

/// `pagefold ksm rules check`.
#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// The file of rules.
    pub(crate) file: PathBuf,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `pagefold ksm rules dry-run`.
#[derive(Args, Debug)]
pub(crate) struct DryRunArgs {
    /// The file of rules.
    pub(crate) file: PathBuf,
    /// Show all processes, those too that nothing would be done to.
    #[arg(long)]
    pub(crate) all: bool,
    /// Print one JSON document to stdout, with all processes.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `pagefold ksm rules apply`.
#[derive(Args, Debug)]
pub(crate) struct ApplyArgs {
    /// The file of rules.
    pub(crate) file: PathBuf,
    /// Go on: look again every so many seconds, also at new processes, and let go of what merging does not pay for. SIGHUP
    /// has the file read again.
    #[arg(long, value_name = "SECS", num_args = 0..=1, default_missing_value = "10", value_parser = interval)]
    pub(crate) watch: Option<f64>,
    /// With --watch: at the end disable everything that was enabled.
    #[arg(long, requires = "watch")]
    pub(crate) undo: bool,
    /// How long one process may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = interval)]
    pub(crate) timeout: f64,
    /// Print one JSON document to stdout, at the end.
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing but errors.
    #[arg(long)]
    pub(crate) quiet: bool,
}

/// `pagefold ksm rules undo`.
#[derive(Args, Debug)]
pub(crate) struct UndoArgs {
    /// How long one process may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = interval)]
    pub(crate) timeout: f64,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing but errors.
    #[arg(long)]
    pub(crate) quiet: bool,
}

/// `pagefold ksm rules never-merge`.
#[derive(Args, Debug)]
pub(crate) struct NeverMergeArgs {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A time between looks.
fn interval(text: &str) -> Result<f64, String> {
    let time: f64 = text.parse().map_err(|error| format!("{error}; must be a number of seconds"))?;
    if (0.1..=1e6).contains(&time) { Ok(time) } else { Err("must be a number of seconds, 0.1 or more".to_owned()) }
}
