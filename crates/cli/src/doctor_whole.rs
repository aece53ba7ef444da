//! Part of `pagefold doctor --pid`: what `run --scope all` would leave alone of a process, and why.

use std::fmt::{self, Write as _};

use broker::LeftAlone;
use eval::size;
use kernel::Pid;
use kernel::sched::{Resource, limit};
use serde::Serialize;

use crate::store_run::unmanageable;

/// One process. Sizes in bytes.
#[derive(Serialize)]
pub(crate) struct Whole {
    pid: i32,
    /// Why nothing of it would be managed, or not for now.
    process: Option<&'static str>,
    /// More about that, where there is more to say.
    detail: Option<String>,
    /// Anonymous memory, merged or not.
    anonymous: u64,
    /// What of it is never managed, by reason.
    left_alone: std::collections::BTreeMap<&'static str, u64>,
}

impl Whole {
    /// Looks at each process. One that has ended, or may not be looked at, has a finding of its own and nothing here.
    pub(crate) fn of(pids: &[i32]) -> Vec<Self> {
        let looks = pids.iter().filter_map(|pid| Some((*pid, LeftAlone::of(Pid(*pid)).ok()?)));
        let shown = |(pid, left): (i32, LeftAlone)| {
            let (process, detail) = match by_its_program(Pid(pid)) {
                Some((word, detail)) => (Some(word), Some(detail)),
                None => (left.process.or_else(|| is_limited(Pid(pid)).then_some("limited")), None),
            };
            Self { pid, process, detail, anonymous: left.anonymous.get(), left_alone: left.memory }
        };
        looks.map(shown).collect()
    }

    /// A line for each process, and one for the reasons. Empty where nothing was asked for.
    pub(crate) fn text(all: &[Self]) -> Result<String, fmt::Error> {
        let mut text = String::new();
        if all.is_empty() {
            return Ok(text);
        }
        writeln!(text, "What pagefold run --scope all would leave alone (its code is judged by --proof):")?;
        let width = all.iter().map(|whole| whole.pid.to_string().len()).max().unwrap_or(0);
        for Self { pid, process, detail, anonymous, left_alone } in all {
            let pid = pid.to_string();
            let left: u64 = left_alone.values().sum();
            if let Some(why) = process {
                match detail {
                    Some(detail) => writeln!(text, "  {pid:width$}  all of it, {}: {detail}", words(why))?,
                    None => writeln!(text, "  {pid:width$}  all of it for now: {}", words(why))?,
                }
            } else {
                writeln!(text, "  {pid:width$}  {} of {} anonymous memory", size(left), size(*anonymous))?;
            }
            let mut reasons: Vec<_> = left_alone.iter().collect();
            reasons.sort_by_key(|(why, bytes)| (std::cmp::Reverse(**bytes), **why));
            let reasons: Vec<_> =
                reasons.into_iter().map(|(why, bytes)| format!("{} {}", words(why), size(*bytes))).collect();
            if !reasons.is_empty() {
                writeln!(text, "  {:width$}  {}", "", reasons.join(", "))?;
            }
        }
        writeln!(text)?;
        Ok(text)
    }
}

/// Why a program is never managed, whatever its processes do.
fn by_its_program(pid: Pid) -> Option<(&'static str, String)> {
    let facts = rules::facts(pid, &rules::Users::host());
    if let Some(entry) = facts.as_ref().and_then(rules::never_merge) {
        return Some(("never_merged", format!("{}: {}", entry.name, entry.reason)));
    }
    Some(("no_agent", unmanageable(format!("/proc/{pid}/exe"))?))
}

/// What a helper reserves would be missing to a program that has been given just so much.
fn is_limited(pid: Pid) -> bool {
    let limited = |resource| limit(pid, resource).is_ok_and(|limit| limit.soft.is_some());
    limited(Resource::AddressSpace) || limited(Resource::Data)
}

/// A reason as it is read aloud.
fn words(why: &str) -> String {
    why.replace('_', " ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_largest_comes_first() {
        let one = Whole {
            pid: 7,
            process: None,
            detail: None,
            anonymous: 64 << 20,
            left_alone: [("file", 8192), ("stack", 1 << 20), ("not_dumped", 4096)].into(),
        };
        let none = || Whole { pid: 4711, process: None, detail: None, anonymous: 0, left_alone: [].into() };
        let two = Whole { process: Some("io_uring"), ..none() };
        let three = Whole { process: Some("never_merged"), detail: Some("keys: it has some".to_owned()), ..none() };
        let text = Whole::text(&[one, two, three]).unwrap();
        let lines: Vec<_> = text.lines().skip(1).collect();
        let wanted = [
            "  7     1.0 MiB of 64.0 MiB anonymous memory",
            "        stack 1.0 MiB, file 8.0 KiB, not dumped 4.0 KiB",
            "  4711  all of it for now: io uring",
            "  4711  all of it, never merged: keys: it has some",
            "",
        ];
        assert_eq!(lines, wanted);
    }
}
