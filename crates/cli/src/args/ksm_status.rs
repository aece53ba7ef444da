//! `pagefold ksm status`.

use std::path::PathBuf;

use clap::Args;

/// `pagefold ksm status`.
#[derive(Args, Debug)]
pub(crate) struct StatusArgs {
    /// Look at this process; may be given several times. Its page tables are walked.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Vec<i32>,
    /// Look at all processes of a cgroup and of those below it, and add them up: its directory, or its path below
    /// /sys/fs/cgroup.
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Vec<PathBuf>,
    /// List all processes; without this, and without --pid and --cgroup, those that ksmd scans.
    #[arg(long)]
    pub(crate) all: bool,
    /// List the mappings of each process that are mergeable or have merged pages.
    #[arg(long)]
    pub(crate) vmas: bool,
    /// Look again every so many seconds, 2 if not said, until interrupted.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
        value_parser = crate::args::interval, allow_negative_numbers = true)]
    pub(crate) watch: Option<f64>,
    /// Print one JSON document to stdout; with --watch, one to a line for each look.
    #[arg(long)]
    pub(crate) json: bool,
}
