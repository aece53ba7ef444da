//! `pagefold merge` and `unmerge`.

use clap::Args;

use super::{Backend, range, seconds};

/// `pagefold merge`.
#[derive(Args, Debug)]
pub(crate) struct MergeArgs {
    /// A process whose memory is merged; may be given several times.
    #[arg(long, required = true, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Vec<i32>,
    /// With all that these have started, children's children too.
    #[arg(long)]
    pub(crate) children: bool,
    /// Who merges: for running processes only the kernel's KSM, which has one tree for the whole host.
    #[arg(long, value_enum, default_value_t = Backend::Store)]
    pub(crate) backend: Backend,
    /// Only this range of addresses, in hexadecimal as /proc/PID/maps shows them; may be given several times.
    #[arg(long, value_name = "START-END", value_parser = range)]
    pub(crate) range: Vec<kernel::Range>,
    /// Look for equal pages in these processes only, not among those that KSM shares in others already.
    #[arg(long)]
    pub(crate) within: bool,
    /// Merge also programs that are known to hold secrets (`ksm rules` has the list).
    #[arg(long)]
    pub(crate) never_merge_anyway: bool,
    /// Split huge pages for any page in them; without this, for one in 32 or more.
    #[arg(long)]
    pub(crate) split_huge: bool,
    /// Drive ksmd until every page that can be merged is. Without this pages are only marked for it.
    #[arg(long)]
    pub(crate) wait: bool,
    /// Wait for so many seconds at most.
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, value_parser = seconds, requires = "wait",
        allow_negative_numbers = true)]
    pub(crate) timeout: f64,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Neither progress nor a summary on stderr.
    #[arg(long)]
    pub(crate) quiet: bool,
}

/// `pagefold unmerge`.
#[derive(Args, Debug)]
pub(crate) struct UnmergeArgs {
    /// A process whose merged pages become its own again; may be given several times.
    #[arg(long, required_unless_present = "host", value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Vec<i32>,
    /// With all that these have started, children's children too.
    #[arg(long)]
    pub(crate) children: bool,
    /// Only this range of addresses, in hexadecimal as /proc/PID/maps shows them; may be given several times.
    #[arg(long, value_name = "START-END", value_parser = range)]
    pub(crate) range: Vec<kernel::Range>,
    /// So many MiB of address space at a time, with a look at free memory before each.
    #[arg(long, value_name = "MIB", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) step: u64,
    /// Take back the process-wide switch too (prctl), so that new memory is not marked any more.
    #[arg(long, conflicts_with = "range")]
    pub(crate) all: bool,
    /// Un-merge every process of this machine and stop ksmd, all at once: 2 is written to KSM's `run`.
    #[arg(long, conflicts_with_all = ["pid", "children", "range", "all"])]
    pub(crate) host: bool,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Neither progress nor a summary on stderr.
    #[arg(long)]
    pub(crate) quiet: bool,
}
