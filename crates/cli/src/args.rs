//! The words of the command line, exactly as typed. Names are a contract.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) mod enable;
pub(crate) mod ksm;
pub(crate) mod ksm_advise;
pub(crate) mod ksm_rules;
pub(crate) mod ksm_set;
pub(crate) mod ksm_status;
pub(crate) mod ksm_sweep;
pub(crate) mod ksm_trace;
pub(crate) mod ksm_unit;
pub(crate) mod merge;

/// Merge equal pages of memory across processes: on request, inside partitions, on stock Linux kernels.
#[derive(Debug, Parser)]
#[command(name = "pagefold", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What can be asked for.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show on real processes of this machine what merging saves, and that nothing they hold has changed.
    Demo(DemoArgs),
    /// Run a command and merge what its processes mark mergeable (store) or hold at all (ksm).
    Run(RunArgs),
    /// Say why nothing is merging, or so little, and which kernel features are there.
    Doctor(DoctorArgs),
    /// Tell what merging would save, where and why, before anything is changed.
    Eval(EvalArgs),
    /// Merge equal pages of running processes now, with the kernel's KSM.
    Merge(merge::MergeArgs),
    /// Give merged pages of running processes back to each, in steps, as far as memory allows.
    Unmerge(merge::UnmergeArgs),
    /// Take a running process out of its partition (not built yet).
    #[command(disable_help_flag = true)]
    Leave(Later),
    /// Enable kernel KSM on running processes.
    Enable(enable::EnableArgs),
    /// Disable kernel KSM on running processes, and give merged pages their own copies back.
    Disable(enable::DisableArgs),
    /// Show, set and tune kernel KSM, see what it does, find its best settings.
    Ksm(ksm::KsmArgs),
    /// Manage named partitions (not built yet).
    #[command(disable_help_flag = true)]
    Partition(Later),
    /// Show partitions and members (not built yet).
    #[command(disable_help_flag = true)]
    Status(Later),
    /// Show them live (not built yet).
    #[command(disable_help_flag = true)]
    Top(Later),
    /// Serve named partitions (not built yet).
    #[command(disable_help_flag = true)]
    Daemon(Later),
    /// Patch text of running programs, shared (not built yet).
    #[command(disable_help_flag = true)]
    Text(Later),
}

impl Command {
    /// The word for it.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Demo(_) => "demo",
            Self::Run(_) => "run",
            Self::Doctor(_) => "doctor",
            Self::Eval(_) => "eval",
            Self::Merge(_) => "merge",
            Self::Unmerge(_) => "unmerge",
            Self::Leave(_) => "leave",
            Self::Enable(_) => "enable",
            Self::Disable(_) => "disable",
            Self::Ksm(_) => "ksm",
            Self::Partition(_) => "partition",
            Self::Status(_) => "status",
            Self::Top(_) => "top",
            Self::Daemon(_) => "daemon",
            Self::Text(_) => "text",
        }
    }
}

/// Anything, for a command that is not built yet.
#[derive(Args, Debug)]
pub(crate) struct Later {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<OsString>,
}

/// `pagefold demo`.
#[derive(Args, Debug)]
pub(crate) struct DemoArgs {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Only one part: `store` (the library), `ksm` (kernel KSM with one layout) or `whole` (workers that mark nothing, by
    /// the store).
    #[arg(long, value_enum)]
    pub(crate) part: Option<DemoPart>,
    /// Worker processes in each part.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(2..=64))]
    pub(crate) workers: u16,
    /// Megabytes that each worker of the store part loads.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) size: u32,
}

/// A part of the demonstration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DemoPart {
    /// Eight workers merged through the library.
    Store,
    /// Eight Python workers under kernel KSM, with one layout and without.
    Ksm,
    /// The same, managed whole by the store.
    Whole,
}

/// `pagefold eval`.
#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    /// A process, with all that it has started.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Vec<i32>,
    /// Only the processes named by --pid, not what they have started.
    #[arg(long)]
    pub(crate) no_children: bool,
    /// All processes of a cgroup and of those below it: its directory, or its path below /sys/fs/cgroup.
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Vec<PathBuf>,
    /// All processes of this name, as /proc/PID/comm shows it.
    #[arg(long, value_name = "NAME")]
    pub(crate) comm: Vec<String>,
    /// All processes.
    #[arg(long)]
    pub(crate) all: bool,
    /// Only pages of this range of addresses, in hexadecimal as /proc/PID/maps shows them.
    #[arg(long, value_name = "START-END", value_parser = range)]
    pub(crate) range: Vec<kernel::Range>,
    /// By what processes are taken together in the answer.
    #[arg(long, value_enum, default_value_t = GroupByArg::Command)]
    pub(crate) group_by: GroupByArg,
    /// Look again after so many seconds, and tell what lasts from what does not.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    pub(crate) watch: Option<f64>,
    /// Looks, with --watch: the later ones may differ from the first in any page.
    #[arg(long, value_name = "N", default_value_t = 2, requires = "watch", value_parser = clap::value_parser!(u16).range(2..=1000))]
    pub(crate) looks: u16,
    /// Write what was read to a Parquet file: hashes of pages, under a key that is not kept.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sample", "sample_hash", "sample_pages"])]
    pub(crate) capture: Option<PathBuf>,
    /// Evaluate a file that --capture wrote instead of processes.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["pid", "cgroup", "comm", "all", "range", "watch", "near",
        "sample", "sample_hash", "sample_pages", "capture", "limit_rate"])]
    pub(crate) from: Option<PathBuf>,
    /// Say what ksmd would save over time with the settings of this machine and with others, and recommend some.
    #[arg(long, conflicts_with_all = ["sample", "sample_hash", "sample_pages"])]
    pub(crate) model: bool,
    /// What --model is to reach: a share of what there is to save...
    #[arg(long, value_name = "F", default_value_t = 0.95, value_parser = fraction)]
    pub(crate) model_share: f64,
    /// ...within so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, value_parser = seconds)]
    pub(crate) model_within: f64,
    /// Look for nearly equal pages, and say why they differ and what a remedy would be worth.
    #[arg(long)]
    pub(crate) near: bool,
    /// Estimate from a share of everything, above 0 and at most 1; the answer says by which method.
    #[arg(long, value_name = "F", value_parser = fraction, conflicts_with_all = ["sample_hash", "sample_pages"])]
    pub(crate) sample: Option<f64>,
    /// Read all pages and keep a share F of all contents, each with all its pages: a smaller index.
    #[arg(long, value_name = "F", value_parser = fraction, conflicts_with = "sample_pages")]
    pub(crate) sample_hash: Option<f64>,
    /// Read a share F of all pages, and estimate the duplicates that were not seen: less reading.
    #[arg(long, value_name = "F", value_parser = fraction)]
    pub(crate) sample_pages: Option<f64>,
    /// Read no more than so many MiB a second.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub(crate) limit_rate: Option<u64>,
    /// Threads that read; as many as there are CPUs, if not said.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the report to this file too, as one HTML page with drawings that needs nothing else.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// No progress on stderr.
    #[arg(long)]
    pub(crate) quiet: bool,
}

/// By what processes are taken together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GroupByArg {
    /// Command name.
    Command,
    /// Cgroup.
    Cgroup,
    /// Effective user.
    User,
}

/// A range of pages.
fn range(text: &str) -> Result<kernel::Range, String> {
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).map(kernel::Vaddr);
    let parts = text.split_once('-').and_then(|(start, end)| number(start).ok().zip(number(end).ok()));
    let (start, end) = parts.ok_or("must be START-END, two hexadecimal numbers")?;
    let range = kernel::Range::new(start, end).map_err(|error| error.to_string())?;
    if range.is_empty() { Err("holds no page".to_owned()) } else { Ok(range) }
}

/// A share.
fn fraction(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if share > 0.0 && share <= 1.0 { Ok(share) } else { Err("must be above 0 and at most 1".to_owned()) }
}

/// A time.
pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    let time: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.0..=1e9).contains(&time) { Ok(time) } else { Err("must be a number of seconds, 0 or more".to_owned()) }
}

/// How long something may take.
fn limit(text: &str) -> Result<f64, String> {
    let time = seconds(text).map_err(|_no_time| "must be a number of seconds, more than 0".to_owned())?;
    if time > 0.0 { Ok(time) } else { Err("must be more than 0 seconds".to_owned()) }
}

/// A time between two looks.
fn interval(text: &str) -> Result<f64, String> {
    let time: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.1..=86_400.0).contains(&time) { Ok(time) } else { Err("must be from 0.1 to 86400 seconds".to_owned()) }
}

/// `pagefold doctor`.
#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// Look at this process too; may be given several times.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) pid: Vec<i32>,
    /// Judge instead whether a gate in libc and the loader can be complete for a process or a program: whether other
    /// code of it, its libraries or what it compiles could change mappings by itself.
    #[arg(long, value_name = "PID|FILE", conflicts_with = "pid")]
    pub(crate) proof: Option<String>,
    /// Trust the files that are listed here by build-id and name, one a line, as --proof prints them.
    #[arg(long, value_name = "FILE", requires = "proof")]
    pub(crate) trust: Option<PathBuf>,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `pagefold run`.
#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// Name of the partition in reports.
    #[arg(long, value_name = "LABEL")]
    pub(crate) partition: Option<String>,
    /// Members do not trust each other: every run of pages in a file of its own.
    #[arg(long)]
    pub(crate) strict: bool,
    /// Who merges: our own page store, or the kernel's KSM.
    #[arg(long, value_enum, default_value_t = Backend::Store)]
    pub(crate) backend: Backend,
    /// Address-space layout of the members: one for all, drawn for each run, or as the kernel gives it.
    #[arg(long, value_enum, default_value_t = LayoutArg::Default)]
    pub(crate) layout: LayoutArg,
    /// What is merged: ranges that programs mark mergeable (madvise), or everything eligible of programs that are proven
    /// safe.
    #[arg(long, value_enum, default_value_t = Scope::Marked)]
    pub(crate) scope: Scope,
    /// With --scope all: trust the files that are listed here, as `pagefold doctor --proof` prints them.
    #[arg(long, value_name = "FILE")]
    pub(crate) trust: Option<PathBuf>,
    /// How references to a page are checked before it is replaced. `vouch`: not at all; you say that nobody holds any.
    #[arg(long, value_enum, default_value_t = Check::Auto)]
    pub(crate) check: Check,
    /// Merge what has stayed unwritten for so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, allow_negative_numbers = true)]
    pub(crate) stable: f64,
    /// Most MiB that the page store may take.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(..=u64::MAX >> 20))]
    pub(crate) store_limit: Option<u64>,
    /// Merge nothing new while more threads than this want each CPU of the machine, on the average.
    #[arg(long, value_name = "THREADS", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) max_runnable: u64,
    /// Rewrite a JSON summary here every 10 seconds and at the end.
    #[arg(long, value_name = "FILE")]
    pub(crate) summary: Option<PathBuf>,
    /// Say nothing on stderr.
    #[arg(long)]
    pub(crate) quiet: bool,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

/// Who merges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// pagefold's own page store.
    Store,
    /// Kernel KSM, driven while the command runs. One tree for the whole host: partitions are not enforced.
    Ksm,
}

/// How members are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayoutArg {
    /// One layout for all members.
    Shared,
    /// The kernel's.
    Default,
}

/// What is merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scope {
    /// What programs mark with madvise(MADV_MERGEABLE).
    Marked,
    /// Every eligible range of programs that are proven safe, see `pagefold doctor --proof`.
    All,
}

/// Reference checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Check {
    /// Exact counts where possible, else the collapse oracle.
    Auto,
    /// Exact counts by BPF.
    Bpf,
    /// MADV_COLLAPSE as an oracle.
    Collapse,
    /// None.
    Vouch,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_words_are_consistent() {
        Cli::command().debug_assert();
    }
}
