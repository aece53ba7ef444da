//! `pagefold ksm unit`.

use clap::Args;

use crate::ksm_commands::UnitName;

/// `pagefold ksm unit`.
#[derive(Args, Debug)]
pub(crate) struct UnitArgs {
    /// The unit: a service, or with its type a .socket, .mount or .swap.
    pub(crate) name: UnitName,
    /// A unit of the user's own manager, not of the system.
    #[arg(long)]
    pub(crate) user: bool,
    /// Look whether the unit's processes are merged, and if not, why.
    #[arg(long)]
    pub(crate) check: bool,
    /// Print what systemd before 254 can do, which has no MemoryKSM=: it is chosen by itself where such a systemd is found.
    #[arg(long, conflicts_with = "check")]
    pub(crate) older: bool,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
}
