//! `pagefold run`: which backend runs the command.

use std::process::ExitCode;

use crate::args::{Backend, LayoutArg, RunArgs, Scope};
use crate::ksm_run::{self, KsmRun};
use crate::say;
use crate::store_run;

/// Runs the command.
pub(crate) fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    if !(0.0..=3600.0).contains(&args.stable) {
        say::note("--stable takes 0 to 3600 seconds");
        return Ok(ExitCode::from(crate::USAGE));
    }
    if args.trust.is_some() && (args.scope != Scope::All || args.backend != Backend::Store) {
        say::note("--trust is for --scope all with the store: nothing else asks what code may do");
        return Ok(ExitCode::from(crate::USAGE));
    }
    match args.backend {
        Backend::Store => store_run::run(&args),
        Backend::Ksm => ksm_run::run(KsmRun {
            partition: args.partition,
            shared_layout: args.layout == LayoutArg::Shared,
            stack: ksm::StackLimit::PutBack,
            summary: args.summary,
            quiet: args.quiet,
            command: args.command,
        }),
    }
}
