//! `pagefold ksm trace`.

use clap::Args;

/// `pagefold ksm trace`.
#[derive(Args, Debug)]
pub(crate) struct TraceArgs {
    /// Trace for so many seconds; until interrupted, if not said.
    #[arg(long = "for", value_name = "SECONDS", value_parser = crate::args::interval, allow_negative_numbers = true)]
    pub(crate) duration: Option<f64>,
    /// Show only this process in the table; may be given several times. The host's sums are of all.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Vec<i32>,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// No line on stderr for each second.
    #[arg(long)]
    pub(crate) quiet: bool,
}
