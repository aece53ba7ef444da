//! A kernel on which running processes cannot be merged: what the library says, and what it still does.

use anyhow::Result;
use pagefold::{Error, Flags, Partition};
use serde::Serialize;

use super::pages::{Pages, fill, wrong};

/// Pages of each of two areas that hold the same.
const PAGES: usize = 512;

/// What was seen.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// True if merging live failed, as the error that says so.
    pub no_move: bool,
    /// What the error says.
    pub said: String,
    /// Pages merged at rest.
    pub merged: u64,
    /// Pages that are the store's then, by the kernel's account.
    pub stored: u64,
    /// Bytes that the partition's account calls saved.
    pub bytes_saved: u64,
    /// Pages given back.
    pub unmerged: u64,
    /// Pages that are the store's after that.
    pub stored_at_the_end: u64,
    /// Pages that ever held a wrong byte.
    pub wrong: u64,
}

/// Does it.
///
/// # Errors
/// When memory at rest cannot be merged either.
pub fn run() -> Result<Report> {
    let mut report = Report::default();
    let partition = Partition::open("rest", Flags::default())?;
    let (mut one, mut two) = (Pages::filled(PAGES, 1)?, Pages::filled(PAGES, 1)?);
    match partition.merge(one.range()?) {
        Err(error) => {
            report.no_move = matches!(error, Error::NoMove);
            report.said = error.to_string();
        }
        Ok(merged) => report.said = format!("merged {merged:?}"),
    }
    report.wrong += wrong(one.bytes(), 1, 0);
    // The first makes its pages known, the second is merged, and then the first can be.
    for _ in 0..2 {
        for pages in [&mut one, &mut two] {
            report.merged += partition.merge_exclusive(pages.bytes_mut())?.pages_merged;
        }
    }
    report.stored = one.stored()? + two.stored()?;
    report.wrong += wrong(one.bytes(), 1, 0) + wrong(two.bytes(), 1, 0);
    report.bytes_saved = partition.summary()?["bytes_saved"].as_u64().unwrap_or_default();
    fill(one.bytes_mut(), 2, 0);
    report.wrong += wrong(one.bytes(), 2, 0) + wrong(two.bytes(), 1, 0);
    report.unmerged = partition.unmerge(two.range()?)?.pages_unmerged;
    partition.leave()?;
    report.stored_at_the_end = two.stored()?;
    report.wrong += wrong(one.bytes(), 2, 0) + wrong(two.bytes(), 1, 0);
    Ok(report)
}
