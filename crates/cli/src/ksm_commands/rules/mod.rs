//! `pagefold ksm rules`: who is merged, who is not, who never.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use rules::{Rules, RulesError};

use crate::args::ksm_rules::{RulesArgs, RulesCommand};
use crate::say;
use crate::text_file::text_of;

mod apply;
mod check;
mod dry_run;
mod never_merge;
mod words;

pub(crate) fn rules(args: &RulesArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        RulesCommand::Check(args) => check::check(args),
        RulesCommand::DryRun(args) => dry_run::dry_run(args),
        RulesCommand::Apply(args) => apply::apply(args),
        RulesCommand::Undo(args) => apply::undo(args),
        RulesCommand::NeverMerge(args) => never_merge::never_merge(args),
    }
}

/// What is in a file.
fn read(file: &Path) -> anyhow::Result<Result<Rules, RulesError>> {
    let text = text_of(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(Rules::parse(&text))
}

/// The rules of a file; `None` if there are mistakes in it, which are told.
fn read_right(file: &Path) -> anyhow::Result<Option<Rules>> {
    Ok(read(file)?.map_err(|error| tell_mistakes(file, &error)).ok())
}

/// Each on a line of its own, as compilers write them.
fn tell_mistakes(file: &Path, error: &RulesError) {
    let line = |problem| format!("{}:{problem}\n", file.display());
    say::lines(&error.problems.iter().map(line).collect::<String>());
}
