//! `pagefold ksm`.

use clap::{Args, Subcommand};

use super::ksm_advise::AdviseArgs;
use super::ksm_rules::RulesArgs;
use super::ksm_set::{RestoreArgs, SetArgs};
use super::ksm_status::StatusArgs;
use super::ksm_sweep::SweepArgs;
use super::ksm_trace::TraceArgs;
use super::ksm_unit::UnitArgs;

/// `pagefold ksm`.
#[derive(Args, Debug)]
pub(crate) struct KsmArgs {
    #[command(subcommand)]
    pub(crate) command: KsmCommand,
}

/// What is to be done with kernel KSM.
#[derive(Debug, Subcommand)]
pub(crate) enum KsmCommand {
    /// Show what KSM does, on the host, in processes, mappings and cgroups.
    Status(StatusArgs),
    /// Change settings of KSM, so that they can be taken back.
    Set(SetArgs),
    /// Take back what `ksm set` changed.
    Restore(RestoreArgs),
    /// Hold goals: the time of a pass, a ceiling of CPU, memory pressure.
    Advise(AdviseArgs),
    /// Show passes and merges as they happen, from the kernel's tracepoints.
    Trace(TraceArgs),
    /// Run a workload under a list of settings and say which is best.
    Sweep(SweepArgs),
    /// Print a systemd drop-in with which a service is merged, or check whether it is.
    Unit(UnitArgs),
    /// Check or apply a file of rules: who is merged, who is not, who never.
    Rules(RulesArgs),
}
