//! `pagefold ksm`: the kernel's KSM, seen and driven.

use std::process::ExitCode;

use crate::args::ksm::{KsmArgs, KsmCommand};

mod advise;
mod advise_table;
mod refused;
mod restore;
mod rules;
mod set;
mod status;
mod sweep;
mod sweep_table;
mod trace;
pub(crate) mod unit;

pub(crate) use unit::UnitName;

/// Does what was asked.
pub(crate) fn ksm(args: KsmArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        KsmCommand::Status(args) => status::status(&args),
        KsmCommand::Set(args) => set::set(&args),
        KsmCommand::Restore(args) => restore::restore(&args),
        KsmCommand::Advise(args) => advise::advise(&args),
        KsmCommand::Trace(args) => trace::trace(&args),
        KsmCommand::Sweep(args) => sweep::sweep(&args),
        KsmCommand::Unit(args) => unit::unit(&args),
        KsmCommand::Rules(args) => rules::rules(&args),
    }
}
