//! `pagefold ksm rules never-merge`.

use std::process::ExitCode;

use rules::{NEVER_MERGE, never_merge_list};
use serde::Serialize;

use crate::args::ksm_rules::NeverMergeArgs;
use crate::say;

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    never_merge: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Entry<'a> {
    name: Option<&'a str>,
    reason: Option<&'a str>,
    /// `disable`, or `ignore` for what is only never enabled.
    action: &'static str,
    /// Patterns of the paths of programs.
    exe: Vec<&'a str>,
    /// Patterns of what an interpreter runs.
    script: Vec<&'a str>,
    setuid: Option<bool>,
}

/// The list as it is shipped, which is a file of rules with its comments.
pub(super) fn never_merge(args: &NeverMergeArgs) -> anyhow::Result<ExitCode> {
    if !args.json {
        say::answer(NEVER_MERGE)?;
        return Ok(ExitCode::SUCCESS);
    }
    let entry = |rule: &'static rules::Rule| Entry {
        name: rule.name.as_deref(),
        reason: rule.reason.as_deref(),
        action: rule.action.word(),
        exe: rule.conditions.exe.iter().map(rules::Glob::text).collect(),
        script: rule.conditions.script.iter().map(rules::Glob::text).collect(),
        setuid: rule.conditions.setuid,
    };
    let document = Document { never_merge: never_merge_list().rules.iter().map(entry).collect() };
    say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    Ok(ExitCode::SUCCESS)
}
