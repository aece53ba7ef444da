//! `pagefold enable` and `disable`.

use std::path::PathBuf;

use clap::Args;
use kernel::MappingWord;

use super::limit;

/// Whose memory, and which.
#[derive(Args, Debug)]
pub(crate) struct Whom {
    /// Processes, by number.
    #[arg(value_name = "PID", required_unless_present = "cgroup", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pids: Vec<i32>,
    /// With everything that these have started, and go on starting meanwhile.
    #[arg(long, requires = "pids")]
    pub(crate) children: bool,
    /// All processes of a cgroup and of those below it: its directory, or its path below /sys/fs/cgroup.
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Vec<PathBuf>,
    /// Only these mappings: heap, stack, anon, START-END (hexadecimal), or a name as /proc/PID/maps shows it, with * and ?.
    #[arg(long, value_name = "WORD")]
    pub(crate) vma: Vec<MappingWord>,
    /// All but these mappings, named as for --vma.
    #[arg(long, value_name = "WORD")]
    pub(crate) exclude: Vec<MappingWord>,
    /// How long processes are searched for that start others all the time, and how long one may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, value_parser = limit, allow_negative_numbers = true)]
    pub(crate) timeout: f64,
    /// Un-merge even if the copies could take all memory that there is.
    #[arg(long)]
    pub(crate) force: bool,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing but errors.
    #[arg(long)]
    pub(crate) quiet: bool,
}

/// `pagefold enable`.
#[derive(Args, Debug)]
pub(crate) struct EnableArgs {
    #[command(flatten)]
    pub(crate) whom: Whom,
    /// With --exclude: merge also what is mapped later, the mappings of the excluded names too.
    #[arg(long, requires = "exclude", conflicts_with = "vma")]
    pub(crate) later: bool,
    /// Also processes that hold secrets and are never merged otherwise.
    #[arg(long)]
    pub(crate) ignore_never_merge: bool,
}

/// `pagefold disable`.
#[derive(Args, Debug)]
pub(crate) struct DisableArgs {
    #[command(flatten)]
    pub(crate) whom: Whom,
}
