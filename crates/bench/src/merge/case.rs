//! One layout of memory, merged by both sides.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Serialize, Serializer};

use crate::sides::{Reached, Scanner, Store};
use crate::workers::{Fleet, Layout};

/// Mappings that merging may add to one process, with room to spare: the broker stops at 30,000.
const VMAS: u64 = 27_000;
/// Processes at least.
const WORKERS: u64 = 4;
/// For how long ksmd may try.
const AT_MOST: Duration = Duration::from_secs(180);

/// One layout.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) layout: Layout,
}

/// What our side did.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Ours {
    /// From start to merged.
    pub(super) start: Reached,
    /// The same contents again.
    pub(super) filled: Reached,
    /// Of it, the time in which helpers executed orders.
    pub(super) step_seconds: f64,
    /// CPU seconds of the helpers for both.
    helpers_cpu_seconds: f64,
    /// Pages refused, by reason.
    refused: std::collections::BTreeMap<String, u64>,
    /// How long pages were frozen, in seconds: p50, p99, p99.9, max.
    frozen_seconds: [f64; 4],
    /// Words of both groups that were wrong afterwards.
    wrong_words: u64,
    /// How pages were checked for references.
    check: &'static str,
}

/// What ksmd did.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Theirs {
    pub(super) start: Reached,
    pub(super) filled: Reached,
    wrong_words: u64,
}

/// Both.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    #[serde(serialize_with = "layout")]
    pub(super) case: Case,
    pub(super) store: Ours,
    pub(super) ksmd: Option<Theirs>,
}

fn layout<S: Serializer>(case: &Case, serializer: S) -> Result<S::Ok, S::Error> {
    use serde::ser::SerializeStruct as _;
    let layout = case.layout;
    let mut fields = serializer.serialize_struct("case", 4)?;
    fields.serialize_field("pages", &layout.pages)?;
    fields.serialize_field("run", &layout.run)?;
    fields.serialize_field("copies", &layout.copies)?;
    fields.serialize_field("processes", &layout.workers)?;
    fields.end()
}

impl Case {
    /// So many MiB in as many processes as the budget of mappings asks for.
    pub(super) fn new(mebibytes: u64, run: u64, copies: u64) -> Self {
        let pages = (mebibytes << 20) / kernel::page_size();
        let workers = (pages / run).div_ceil(VMAS).max(WORKERS);
        Self { layout: Layout::new(pages, run, copies, workers) }
    }

    pub(super) fn measure(self, alone: bool) -> Result<Outcome> {
        let store = self.store().context("our side")?;
        let ksmd = if alone { None } else { Some(self.ksmd().context("ksmd's side")?) };
        Ok(Outcome { case: self, store, ksmd })
    }

    fn store(self) -> Result<Ours> {
        let store = Store::open()?;
        let mut ours = Ours::default();
        let mut fleets = Vec::new();
        for second in [false, true] {
            let mut fleet = Fleet::start(self.layout, |command| store.lead_in(command))?;
            fleet.hand_over()?;
            store.wait_for_members(self.layout.workers * if second { 2 } else { 1 })?;
            let (cpu, helpers) = (store.cpu()?, Store::helpers_cpu()?);
            let before = store.summary()?;
            let begun = Instant::now();
            let report = store.merge(fleet.pids())?;
            let seconds = begun.elapsed().as_secs_f64();
            let cpu_seconds = store.cpu()?.saturating_sub(cpu).as_secs_f64();
            let after = store.summary()?;
            let reached = Reached {
                seconds,
                cpu_seconds,
                pages_saved: after.pages_sharing.saturating_sub(before.pages_sharing),
                pages_scanned: report.pages_scanned,
            };
            ours.helpers_cpu_seconds += Store::helpers_cpu()?.saturating_sub(helpers).as_secs_f64();
            if second {
                ours.filled = reached;
                ours.step_seconds = after.helpers_busy_seconds - before.helpers_busy_seconds;
            } else {
                ours.start = reached;
            }
            for (reason, pages) in report.refused {
                *ours.refused.entry(reason).or_default() += pages;
            }
            let frozen = after.frozen_seconds;
            ours.frozen_seconds = [frozen.p50, frozen.p99, frozen.p999, frozen.max];
            ours.check = after.check;
            fleets.push(fleet);
        }
        for fleet in &mut fleets {
            ours.wrong_words += fleet.wrong_words()?;
        }
        Ok(ours)
    }

    fn ksmd(self) -> Result<Theirs> {
        let scanner = Scanner::acquire()?;
        scanner.forget_the_dead()?;
        let mut theirs = Theirs::default();
        let mut fleets = Vec::new();
        for second in [false, true] {
            let mut fleet = Fleet::start(self.layout, |_| ())?;
            fleet.hand_over()?;
            if second {
                theirs.filled = scanner.run_until(self.layout.pages, AT_MOST)?;
            } else {
                theirs.start = scanner.run_until(self.layout.saved(), AT_MOST)?;
            }
            scanner.rest()?;
            fleets.push(fleet);
        }
        for fleet in &mut fleets {
            theirs.wrong_words += fleet.wrong_words()?;
        }
        drop(fleets);
        scanner.release()?;
        Ok(theirs)
    }
}

impl Outcome {
    /// No wrong byte, and nothing that can be merged was left.
    pub(super) fn is_right(&self) -> bool {
        let layout = self.case.layout;
        let whole = |reached: &Reached, pages: u64| reached.pages_saved as f64 >= pages as f64 * 0.98;
        let wrong = self.store.wrong_words + self.ksmd.as_ref().map_or(0, |ksmd| ksmd.wrong_words);
        wrong == 0 && whole(&self.store.start, layout.saved()) && whole(&self.store.filled, layout.pages)
    }

    pub(super) fn head() -> &'static str {
        "runs copies processes | who   what      |   saved pages    seconds        CPU us/saved  wrong"
    }

    pub(super) fn rows(&self) -> Vec<String> {
        let layout = self.case.layout;
        let row = |who: &str, what: &str, reached: &Reached, wrong: u64| {
            format!(
                "{:>4} {:>6} {:>9} | {who:<5} {what:<9} | {:>13} {:>10.3} {:>10.3} {:>8.2} {wrong:>6}",
                layout.run,
                layout.copies,
                layout.workers,
                reached.pages_saved,
                reached.seconds,
                reached.cpu_seconds,
                reached.seconds * 1e6 / reached.pages_saved.max(1) as f64,
            )
        };
        let mut rows = vec![
            row("store", "start", &self.store.start, self.store.wrong_words),
            row("store", "again", &self.store.filled, self.store.wrong_words),
            format!(
                "                      |       step      |               {:>10.3} {:>10.3}   helpers alone; refused {:?}",
                self.store.step_seconds, self.store.helpers_cpu_seconds, self.store.refused
            ),
        ];
        if let Some(ksmd) = &self.ksmd {
            rows.push(row("ksmd", "start", &ksmd.start, ksmd.wrong_words));
            rows.push(row("ksmd", "again", &ksmd.filled, ksmd.wrong_words));
        }
        rows
    }
}
