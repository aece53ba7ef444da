//! Merging live and the way back, and which checks of references work here.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use kernel::refcheck::OwnCounts;
use kernel::{BpfCheck, OwnedMemory, PageCount, Vaddr, collapse_oracle_works};
use pagefold::{Flags, Partition};
use serde::Serialize;

use super::pages::{Pages, fill, wrong};

/// Pages of each of two areas that hold the same.
const PAGES: usize = 512;
/// The page tables' reach, in which the helper's own counts must stay.
const TABLE: u64 = 2 << 20;

/// What was seen.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Whether exact counts by BPF can be read, or why not.
    pub bpf: String,
    /// Whether a helper can be given a program for counting its own pages, or why not.
    pub own_counts: String,
    /// Whether the collapse oracle works.
    pub collapse: bool,
    /// The check that the partition chose.
    pub check: String,
    /// Pages merged at the first request.
    pub merged: u64,
    /// Pages that are the store's then, by the kernel's account.
    pub stored: u64,
    /// Pages refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Pages that were written after merging, and merged again.
    pub retaken: u64,
    /// Pages given back.
    pub unmerged: u64,
    /// Pages that are the store's after that.
    pub stored_at_the_end: u64,
    /// Pages that ever held a wrong byte.
    pub wrong: u64,
    /// The longest time in which a batch was frozen, in seconds.
    pub longest_frozen: f64,
}

/// Does it.
///
/// # Errors
/// When merging live is not possible.
pub fn run() -> Result<Report> {
    let mut report = Report { collapse: collapse_oracle_works()?, ..Report::default() };
    (report.bpf, report.own_counts) = checks()?;
    let partition = Partition::open("live", Flags::default())?;
    let (mut one, two) = (Pages::filled(PAGES, 1)?, Pages::filled(PAGES, 1)?);
    let ranges = [one.range()?, two.range()?];
    let merged = partition.merge_all(&ranges)?;
    report.merged = merged.pages_merged;
    report.refused.extend(merged.refused);
    report.stored = one.stored()? + two.stored()?;
    report.wrong += wrong(one.bytes(), 1, 0) + wrong(two.bytes(), 1, 0);

    // Written, so that its pages are its own, and equal again.
    fill(one.bytes_mut(), 2, 0);
    report.wrong += wrong(two.bytes(), 1, 0) + wrong(one.bytes(), 2, 0);
    fill(one.bytes_mut(), 1, 0);
    report.retaken = partition.merge_all(&ranges)?.pages_merged;
    report.wrong += wrong(one.bytes(), 1, 0) + wrong(two.bytes(), 1, 0);

    let summary = partition.summary()?;
    report.check = summary["check"].as_str().unwrap_or_default().to_owned();
    report.longest_frozen = summary["frozen_seconds"]["max"].as_f64().unwrap_or_default();
    for range in ranges {
        report.unmerged += partition.unmerge(range)?.pages_unmerged;
    }
    report.stored_at_the_end = one.stored()? + two.stored()?;
    fill(one.bytes_mut(), 3, 0);
    report.wrong += wrong(one.bytes(), 3, 0) + wrong(two.bytes(), 1, 0);
    partition.leave()?;
    Ok(report)
}

/// Exact counts by BPF, asked of the broker and counted by the helper itself. Both try themselves on a held page.
fn checks() -> Result<(String, String)> {
    let check = match BpfCheck::new() {
        Ok(check) => check,
        Err(error) => return Ok((error.to_string(), "needs exact counts by BPF".to_owned())),
    };
    let memory = OwnedMemory::anonymous(PageCount(2 * TABLE / 4096)).context("map memory")?;
    let start = Vaddr(memory.range().start().get().next_multiple_of(TABLE));
    let own = match OwnCounts::load(&check, [start, start]) {
        Ok(_) => "works".to_owned(),
        Err(error) => error.to_string(),
    };
    Ok(("works".to_owned(), own))
}
