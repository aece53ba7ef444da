//! `pagefold ksm rules check`.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use eval::printable;
use rules::{Explained, Problem, ProfitRules, Rules, Users, VERSION};
use serde::Serialize;

use super::{read, tell_mistakes};
use crate::args::ksm_rules::CheckArgs;
use crate::say;

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    file: &'a Path,
    version: u32,
    /// No mistake was found.
    valid: bool,
    problems: Vec<Problem>,
    /// What is allowed and probably not meant.
    doubts: Vec<Problem>,
    default_action: Option<&'static str>,
    profit: Option<Profit>,
    rules: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Profit {
    passes: u64,
    loss: u64,
    retry_seconds: f64,
    retry_most_seconds: f64,
}

#[derive(Serialize)]
struct Entry<'a> {
    number: usize,
    line: usize,
    name: Option<&'a str>,
    reason: Option<&'a str>,
    action: &'static str,
    /// The conditions as a file has them.
    r#match: String,
    explanation: String,
}

pub(super) fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let (rules, problems) = match read(&args.file)? {
        Ok(rules) => (Some(rules), Vec::new()),
        Err(error) => {
            tell_mistakes(&args.file, &error);
            (None, error.problems)
        }
    };
    let doubts = rules.as_ref().map(|rules| rules.doubts(&Users::host())).unwrap_or_default();
    let valid = rules.is_some();
    let status = if valid { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if args.json {
        let document = document(&args.file, rules.as_ref(), problems, doubts);
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
        return Ok(status);
    }
    if let Some(rules) = rules {
        say::answer(&explained(&args.file, &rules, &doubts)?)?;
    }
    Ok(status)
}

fn explained(file: &Path, rules: &Rules, doubts: &[Problem]) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    writeln!(text, "{}: {} rules, the first that fits a process decides", file.display(), rules.rules.len())?;
    writeln!(text, "   0  the never-merge list disables what holds secrets (pagefold ksm rules never-merge)")?;
    for (at, rule) in rules.rules.iter().enumerate() {
        let name = rule.name.as_deref().map_or_else(String::new, |name| format!("{}: ", printable(name)));
        writeln!(text, "{:4}  {name}{} (line {})", at + 1, printable(&Explained(rule).to_string()), rule.line)?;
        if let Some(reason) = &rule.reason {
            writeln!(text, "      {}", printable(reason))?;
        }
    }
    writeln!(text, "   -  everybody else: {}", rules.defaults.action.word())?;
    let ProfitRules { passes, loss, retry, .. } = &rules.profit;
    match passes {
        0 => writeln!(text, "   -  nobody is let go for want of profit")?,
        _ => writeln!(
            text,
            "   -  with --watch: let go what loses more than {} over {passes} passes of ksmd, for {} s the first time",
            eval::size(loss.get()),
            retry.as_secs_f64()
        )?,
    }
    for doubt in doubts {
        writeln!(text, "{}:{}: doubtful: {}", file.display(), doubt.line, printable(&doubt.message))?;
    }
    Ok(text)
}

fn document<'a>(
    file: &'a Path,
    rules: Option<&'a Rules>,
    problems: Vec<Problem>,
    doubts: Vec<Problem>,
) -> Document<'a> {
    let entry = |(at, rule): (usize, &'a rules::Rule)| Entry {
        number: at + 1,
        line: rule.line,
        name: rule.name.as_deref(),
        reason: rule.reason.as_deref(),
        action: rule.action.word(),
        r#match: rule.conditions.to_string(),
        explanation: Explained(rule).to_string(),
    };
    Document {
        file,
        version: VERSION,
        valid: rules.is_some(),
        problems,
        doubts,
        default_action: rules.map(|rules| rules.defaults.action.word()),
        profit: rules.map(|rules| Profit {
            passes: rules.profit.passes,
            loss: rules.profit.loss.get(),
            retry_seconds: rules.profit.retry.as_secs_f64(),
            retry_most_seconds: rules.profit.retry_most.as_secs_f64(),
        }),
        rules: rules.map(|rules| rules.rules.iter().enumerate().map(entry).collect()).unwrap_or_default(),
    }
}
