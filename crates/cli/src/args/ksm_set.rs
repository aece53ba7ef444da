//! `pagefold ksm set` and `restore`.

use clap::Args;
use ksm::Knob;

/// `pagefold ksm set`.
#[derive(Args, Debug)]
pub(crate) struct SetArgs {
    /// Settings by the kernel's names, as in sleep_millisecs=20ms. Without any, they are listed with what they take.
    #[arg(value_name = "NAME=VALUE", value_parser = ksm::set::parse)]
    pub(crate) settings: Vec<(Knob, u64)>,
    /// Yes, unmerge every process of the whole host: needed with run=2.
    #[arg(long)]
    pub(crate) unmerge_host: bool,
    /// Unmerge the host whatever memory there is.
    #[arg(long, requires = "unmerge_host")]
    pub(crate) force: bool,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `pagefold ksm restore`.
#[derive(Args, Debug)]
pub(crate) struct RestoreArgs {
    /// Put back settings too that somebody else wrote since.
    #[arg(long)]
    pub(crate) force: bool,
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub(crate) json: bool,
}
