//! What `pagefold run` with the store says, and its summary document.

use std::cell::RefCell;
use std::time::Instant;

use broker::{BrokerHandle, Managed, Summary};
use serde::Serialize;

use crate::args::RunArgs;
use crate::outsiders::{Outsider, Outsiders};
use crate::say;
use crate::summary_file::SummaryFile;

/// Different reasons that the end of a run tells; the summary has more.
const REASONS: usize = 3;
/// Different programs that it names.
const NAMES: usize = 3;

/// What is said where no helper has come, and nothing was heard of any that could not.
const NOBODY_MARKED: &str = "nothing was merged: no process marked memory mergeable (madvise MADV_MERGEABLE), or none that \
     did could reach this run, as from a network namespace of its own; --backend ksm merges all memory of any program";
/// With `--scope all`.
const NOBODY_OF_ALL: &str = "nothing was merged: no program lived for a second or asked for 8 MiB, or none that did could \
     reach this run, as from a network namespace of its own; --backend ksm merges all memory of any program";

/// The summary as it is written.
#[derive(Serialize)]
struct Document {
    #[serde(flatten)]
    summary: Summary,
    /// Programs that no agent is at work in, where everything is to be managed.
    no_agent: Vec<Outsider>,
}

/// Tells what a run does.
pub(crate) struct Reporter<'a> {
    pub(crate) broker: Option<&'a BrokerHandle>,
    /// Where everything is managed: those whom the broker does not hear of.
    pub(crate) outsiders: Option<RefCell<Outsiders>>,
    pub(crate) file: Option<&'a SummaryFile>,
    pub(crate) args: &'a RunArgs,
    /// It was said already why nothing can be merged.
    pub(crate) unmanaged: bool,
}

impl Reporter<'_> {
    fn say(&self, text: &str) {
        if !self.args.quiet {
            say::note(text);
        }
    }

    fn summary(&self) -> Summary {
        let live = self.broker.and_then(|broker| broker.summary().ok());
        live.unwrap_or_else(|| Summary {
            partition: self.args.partition.clone(),
            backend: "store",
            check: "none",
            ..Summary::default()
        })
    }

    /// Looks who is not managed; returns when to do so again.
    pub(crate) fn look_for_outsiders(&self) -> Option<Instant> {
        let mut outsiders = self.outsiders.as_ref()?.borrow_mut();
        outsiders.look();
        Some(outsiders.next())
    }

    fn outsiders(&self) -> Vec<Outsider> {
        self.outsiders.as_ref().map(|outsiders| outsiders.borrow().list()).unwrap_or_default()
    }

    /// Rewrites the summary file, if there is to be one.
    pub(crate) fn write(&self) {
        let document = || Document { summary: self.summary(), no_agent: self.outsiders() };
        if let Some(file) = self.file
            && let Err(error) = file.write(&document())
        {
            self.say(&format!("{error:#}"));
        }
    }

    /// The answer to SIGUSR1.
    pub(crate) fn state(&self) {
        match self.broker {
            Some(_) => say::lines(&state(&self.summary())),
            None => say::note("the command runs unmanaged, nothing is merged"),
        }
    }

    /// The last lines.
    pub(crate) fn end(&self) {
        self.write();
        if self.args.quiet || self.broker.is_none() {
            return;
        }
        let summary = self.summary();
        let without = |outsider: Outsider| format!("{} has no agent at work: {}", outsider.program, outsider.reason);
        let reasons: Vec<String> =
            summary.helper_refused.iter().cloned().chain(self.outsiders().into_iter().map(without)).collect();
        for line in left_alone(&reasons) {
            self.say(&line);
        }
        for line in summary.stopped.iter().take(REASONS) {
            self.say(&format!("nothing is merged any more in {line}"));
        }
        if summary.processes_ever > 0 {
            self.say(&format!(
                "{} pages merged in {} processes{}, {} saved at most, {} refused, longest wait {:.1} ms, CPU {:.2} s",
                summary.merges + summary.retaken,
                summary.processes_ever,
                names(&summary.managed),
                mib(summary.bytes_saved_peak),
                summary.refused.total(),
                summary.frozen_seconds.max * 1e3,
                summary.cpu_seconds,
            ));
        } else if reasons.is_empty() && !self.unmanaged {
            self.say(if self.outsiders.is_some() { NOBODY_OF_ALL } else { NOBODY_MARKED });
        }
    }
}

/// The programs that were managed: ` (7 python3.11, 1 redis-server, 2 others)`.
fn names(managed: &[Managed]) -> String {
    let name = |program: &str| program.rsplit('/').next().unwrap_or(program).to_owned();
    let mut names: Vec<String> =
        managed.iter().take(NAMES).map(|one| format!("{} {}", one.processes, name(&one.program))).collect();
    let more: u64 = managed.iter().skip(NAMES).map(|one| one.processes).sum();
    if more > 0 {
        names.push(format!("{more} others"));
    }
    if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) }
}

/// A few lines, whatever the number of processes and reasons.
fn left_alone(reasons: &[String]) -> Vec<String> {
    let mut lines: Vec<String> =
        reasons.iter().take(REASONS).map(|reason| format!("a process was left alone: {reason}")).collect();
    if reasons.len() > REASONS {
        lines.push(format!("and for {} other reasons, which --summary has", reasons.len() - REASONS));
    }
    lines
}

fn state(summary: &Summary) -> String {
    let mut text = format!(
        "pagefold: {} processes, {} managed, {} saved ({} at most), {} shared pages for {} more, {} zero pages, \
         {} diverged, check {}\n",
        summary.processes,
        mib(summary.pages_managed * kernel::page_size()),
        mib(summary.bytes_saved),
        mib(summary.bytes_saved_peak),
        summary.pages_shared,
        summary.pages_sharing,
        summary.zero_pages,
        summary.diverged,
        summary.check,
    );
    for (reason, pages) in &summary.refused.0 {
        text.push_str(&format!("pagefold:   refused {pages}: {reason}\n"));
    }
    text
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_reasons_are_a_few_lines() {
        let reasons: Vec<String> = (0..50).map(|number| format!("reason {number}")).collect();
        assert_eq!(left_alone(&reasons).len(), REASONS + 1);
        assert_eq!(
            left_alone(&reasons[..2]),
            ["a process was left alone: reason 0", "a process was left alone: reason 1"]
        );
    }
}
