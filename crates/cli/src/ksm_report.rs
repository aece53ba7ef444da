//! What `pagefold run --backend ksm` says, and its summary document.

use std::collections::BTreeMap;
use std::time::Instant;

use ksm::Progress;
use serde::Serialize;

use crate::ksm_run::KsmRun;
use crate::say;
use crate::summary_file::SummaryFile;

/// What is told to people and to the summary file.
pub(crate) struct Report<'a> {
    summary: Summary,
    file: Option<&'a SummaryFile>,
    quiet: bool,
    started: Instant,
}

/// The summary document. Pages and bytes are of the command's processes; while they run together with other users of
/// KSM, `pages_shared`, `pages_sharing` and `bytes_saved` are their proportional part.
#[derive(Clone, Debug, Serialize)]
struct Summary {
    partition: Option<String>,
    backend: &'static str,
    layout: &'static str,
    processes: u64,
    processes_peak: u64,
    pages_managed: u64,
    pages_shared: u64,
    pages_sharing: u64,
    zero_pages: u64,
    bytes_saved: u64,
    bytes_saved_peak: u64,
    merges: u64,
    /// Of the whole host: the kernel counts copies of merged pages nowhere else.
    unshared_by_write: u64,
    /// Under KSM every copy of a merged page has diverged until ksmd merges it again.
    diverged: u64,
    refused: BTreeMap<&'static str, u64>,
    frozen_seconds: Frozen,
    /// ksmd's, and this process's own.
    cpu_seconds: f64,
    elapsed_seconds: f64,
    /// KSM's own counters at the last look.
    ksm: Option<Progress>,
}

/// KSM freezes nobody.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Frozen {
    p50: Option<f64>,
    p99: Option<f64>,
    max: Option<f64>,
}

impl<'a> Report<'a> {
    pub(crate) fn new(args: &KsmRun, file: Option<&'a SummaryFile>) -> Self {
        let summary = Summary {
            partition: args.partition.clone(),
            backend: "ksm",
            layout: if args.shared_layout { "shared" } else { "default" },
            processes: 0,
            processes_peak: 0,
            pages_managed: 0,
            pages_shared: 0,
            pages_sharing: 0,
            zero_pages: 0,
            bytes_saved: 0,
            bytes_saved_peak: 0,
            merges: 0,
            unshared_by_write: 0,
            diverged: 0,
            refused: BTreeMap::new(),
            frozen_seconds: Frozen::default(),
            cpu_seconds: 0.0,
            elapsed_seconds: 0.0,
            ksm: None,
        };
        Self { summary, file, quiet: args.quiet, started: Instant::now() }
    }

    pub(crate) fn say(&self, text: &str) {
        if !self.quiet {
            say::note(text);
        }
    }

    /// Something that was asked for and cannot be had.
    pub(crate) fn refuse(&mut self, reason: &'static str, text: &str) {
        *self.summary.refused.entry(reason).or_default() += 1;
        self.say(text);
    }

    pub(crate) fn seen(&mut self, progress: &Progress) {
        self.summary.processes_peak = self.summary.processes_peak.max(progress.tree.processes);
    }

    /// Rewrites the summary file, if there is to be one.
    pub(crate) fn write(&mut self, progress: Option<&Progress>) {
        let summary = &mut self.summary;
        summary.elapsed_seconds = self.started.elapsed().as_secs_f64();
        summary.cpu_seconds = kernel::sched::usage(kernel::sched::Whose::Own).cpu().as_secs_f64();
        if let Some(progress) = progress {
            summary.processes = progress.tree.processes;
            summary.processes_peak = summary.processes_peak.max(progress.tree.processes);
            summary.pages_managed = progress.tree.ksm_rmap_items;
            summary.pages_shared = progress.pages_shared;
            summary.pages_sharing = progress.pages_sharing;
            summary.zero_pages = progress.tree.ksm_zero_pages;
            summary.bytes_saved = progress.bytes_saved;
            summary.bytes_saved_peak = progress.bytes_saved_peak;
            summary.merges = progress.merges;
            summary.unshared_by_write = progress.unshared_by_write;
            summary.diverged = progress.unshared_by_write;
            summary.cpu_seconds += progress.ksmd_cpu_seconds.unwrap_or(0.0);
            summary.ksm = Some(*progress);
        }
        if let Some(file) = self.file
            && let Err(error) = file.write(&self.summary)
        {
            self.say(&format!("{error:#}"));
        }
    }

    /// The answer to SIGUSR1.
    pub(crate) fn state(&self, progress: Option<&Progress>) {
        match progress {
            Some(progress) => say::note(format_args!(
                "{:?}, {} processes, {} saved now, {} at most, {} pages merged, ksmd {:.1} s",
                progress.phase,
                progress.tree.processes,
                mib(progress.bytes_saved),
                mib(progress.bytes_saved_peak),
                progress.tree.ksm_merging_pages + progress.tree.ksm_zero_pages,
                progress.ksmd_cpu_seconds.unwrap_or(0.0),
            )),
            None => say::note("nothing is merged"),
        }
    }

    pub(crate) fn last_line(&self, progress: Option<&Progress>) {
        if let Some(progress) = progress {
            self.say(&format!(
                "KSM saved up to {} in {} processes, for {:.1} s of ksmd in {:.1} s",
                mib(progress.bytes_saved_peak),
                self.summary.processes_peak,
                progress.ksmd_cpu_seconds.unwrap_or(0.0),
                self.started.elapsed().as_secs_f64(),
            ));
        }
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}
