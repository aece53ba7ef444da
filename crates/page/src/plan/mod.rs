//! Run planning: which of the pages that have a twin in the store are mapped to it, in which batches.
//!
//! A merged run costs one mapping however long it is, and the number of mappings of a process is limited, so what
//! decides the yield is runs: neighbours that are neighbours in the store too. The planner takes long runs first and
//! lone pages only while the budget of mappings lasts, counts exactly what each run adds (a run in the middle of a
//! mapping two, one that touches another run or the mapping's start one, one that fills a gap none), and packs the
//! chosen runs into batches: at most [`Limits::batch_pages`] pages of one area, all within one aligned window, since
//! a batch's scratch memory is such a window.
//!
//! The last page of an area is never taken: what the program sees there must keep growing as anonymous memory does,
//! and a mapping of the store would grow into its neighbours.

use std::collections::HashSet;

use crate::{PageNumber, PageRange, Place};

/// What a page turned out to be equal to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Twin {
    /// A page of the store.
    Store(Place),
    /// The zero page: the page is dropped and needs no mapping.
    Zero,
}

impl Twin {
    fn follows(self, other: Self) -> bool {
        match (self, other) {
            (Self::Store(place), Self::Store(before)) => place.follows(before),
            (Self::Zero, Self::Zero) => true,
            _ => false,
        }
    }

    fn offset(self, pages: u64) -> Self {
        match self {
            Self::Store(Place { segment, page }) => {
                let pages = u32::try_from(pages).expect("a run lies in one segment");
                Self::Store(Place { segment, page: page + pages })
            }
            Self::Zero => Self::Zero,
        }
    }
}

/// A page with its twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Match {
    /// The page.
    pub page: PageNumber,
    /// What it equals.
    pub twin: Twin,
}

/// What a plan may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most pages of a batch.
    pub batch_pages: u64,
    /// Pages of an aligned window: a batch never leaves one.
    pub window_pages: u64,
    /// Mappings that may be added to the process.
    pub vmas: u64,
}

impl Limits {
    /// Batches of 64 pages in windows of 2 MiB, for pages of `page_size` bytes, and `vmas` mappings to add.
    pub fn new(page_size: u64, vmas: u64) -> Self {
        Self { batch_pages: 64, window_pages: ((2 << 20) / page_size).max(1), vmas }
    }
}

/// Neighbouring pages that become one mapping, or that are dropped together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The pages.
    pub pages: PageRange,
    /// What the first of them equals; the others equal what follows it.
    pub twin: Twin,
}

impl Run {
    fn split_at(self, pages: u64) -> (Self, Self) {
        let middle = self.pages.start.offset(pages);
        (
            Self { pages: PageRange::new(self.pages.start, middle), twin: self.twin },
            Self { pages: PageRange::new(middle, self.pages.end), twin: self.twin.offset(pages) },
        )
    }
}

/// Pages to be merged together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Which of the areas they belong to: an index into what was passed to [`plan`].
    pub area: usize,
    /// The runs, by address.
    pub runs: Vec<Run>,
}

impl Batch {
    /// Pages of all runs.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.pages.pages()).sum()
    }

    /// From the first page of the first run to the last of the last, with what lies between.
    pub fn extent(&self) -> PageRange {
        match (self.runs.first(), self.runs.last()) {
            (Some(first), Some(last)) => PageRange::new(first.pages.start, last.pages.end),
            _ => PageRange::new(PageNumber(0), PageNumber(0)),
        }
    }
}

/// Why a page with a twin is not merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It is the last page of its area.
    LastPage,
    /// It lies in no area that was passed.
    NoArea,
    /// Its run would add more mappings than the budget has left.
    Budget,
}

/// Pages that are not merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeftOut {
    /// The pages.
    pub pages: PageRange,
    /// Why.
    pub reason: Reason,
}

/// What to merge and what not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Batches, those with the longest runs first.
    pub batches: Vec<Batch>,
    /// What was left out, by address.
    pub left_out: Vec<LeftOut>,
    /// Mappings that the batches add when all of them succeed.
    pub vmas_added: u64,
}

impl Plan {
    /// Pages of all batches.
    pub fn pages(&self) -> u64 {
        self.batches.iter().map(Batch::pages).sum()
    }

    /// Pages left out for this reason.
    pub fn pages_left_out(&self, reason: Reason) -> u64 {
        self.left_out.iter().filter(|left| left.reason == reason).map(|left| left.pages.pages()).sum()
    }
}

/// Plans the merging of `matches` (ascending by page, each page once) in `areas` (ascending, apart from each other):
/// the ranges that the program knows as one mapping each, whatever we have mapped into them already.
pub fn plan(areas: &[PageRange], matches: &[Match], limits: &Limits) -> Plan {
    debug_assert!(areas.windows(2).all(|pair| pair[0].end <= pair[1].start), "areas ascend");
    debug_assert!(matches.windows(2).all(|pair| pair[0].page < pair[1].page), "matches ascend");
    let mut plan = Plan::default();
    let runs = find_runs(areas, matches, &mut plan.left_out);
    let chosen = choose(areas, runs, limits, &mut plan);
    pack(&chosen, limits, &mut plan.batches);
    plan.left_out.sort_unstable_by_key(|left| left.pages);
    plan
}

/// A run and its area.
type RunIn = (usize, Run);

fn find_runs(areas: &[PageRange], matches: &[Match], left_out: &mut Vec<LeftOut>) -> Vec<RunIn> {
    let mut runs: Vec<RunIn> = Vec::new();
    let mut area = 0;
    for found in matches {
        while areas.get(area).is_some_and(|range| range.end <= found.page) {
            area += 1;
        }
        let range = areas.get(area).filter(|range| range.contains(found.page));
        // A dropped page adds no mapping, so nothing grows into the store behind it.
        let last = range.is_some_and(|range| range.end == found.page.next()) && found.twin != Twin::Zero;
        if range.is_none() || last {
            let reason = if last { Reason::LastPage } else { Reason::NoArea };
            leave_out(left_out, PageRange::from_count(found.page, 1), reason);
            continue;
        }
        match runs.last_mut() {
            Some((before, run))
                if *before == area
                    && run.pages.end == found.page
                    && found.twin.follows(run.twin.offset(run.pages.pages() - 1)) =>
            {
                run.pages.end = found.page.next();
            }
            _ => runs.push((area, Run { pages: PageRange::from_count(found.page, 1), twin: found.twin })),
        }
    }
    runs
}

fn leave_out(left_out: &mut Vec<LeftOut>, pages: PageRange, reason: Reason) {
    match left_out.last_mut() {
        Some(before) if before.reason == reason && before.pages.end == pages.start => before.pages.end = pages.end,
        _ => left_out.push(LeftOut { pages, reason }),
    }
}

/// The runs that the budget allows, by address.
fn choose(areas: &[PageRange], mut runs: Vec<RunIn>, limits: &Limits, plan: &mut Plan) -> Vec<RunIn> {
    runs.sort_unstable_by_key(|(_, run)| (std::cmp::Reverse(run.pages.pages()), run.pages.start));
    // Where one mapping ends and the next begins once the chosen runs are in place.
    let mut borders: HashSet<PageNumber> = areas.iter().flat_map(|area| [area.start, area.end]).collect();
    let mut left = Vec::new();
    runs.retain(|(_, run)| {
        if run.twin == Twin::Zero {
            return true;
        }
        let new: Vec<_> = [run.pages.start, run.pages.end].into_iter().filter(|at| !borders.contains(at)).collect();
        let vmas = plan.vmas_added + new.len() as u64;
        if vmas > limits.vmas {
            left.push(LeftOut { pages: run.pages, reason: Reason::Budget });
            return false;
        }
        plan.vmas_added = vmas;
        borders.extend(new);
        true
    });
    plan.left_out.extend(left);
    runs.sort_unstable_by_key(|(_, run)| run.pages.start);
    runs
}

/// Packs runs (by address) into batches and puts those with the longest runs first.
fn pack(runs: &[RunIn], limits: &Limits, batches: &mut Vec<Batch>) {
    let (most, window) = (limits.batch_pages.max(1), limits.window_pages.max(1));
    let mut open: Option<(u64, u64, Batch)> = None; // window, pages, batch
    for (area, run) in runs {
        let mut rest = *run;
        while !rest.pages.is_empty() {
            let at = rest.pages.start.0 / window;
            let fits = (at + 1) * window - rest.pages.start.0;
            let (piece, behind) = rest.split_at(rest.pages.pages().min(fits).min(most));
            rest = behind;
            match &mut open {
                Some((open_at, pages, batch))
                    if *open_at == at && batch.area == *area && *pages + piece.pages.pages() <= most =>
                {
                    *pages += piece.pages.pages();
                    batch.runs.push(piece);
                }
                // Full batches go out at once and leave the one that short runs are collected in open.
                _ if piece.pages.pages() == most => batches.push(Batch { area: *area, runs: vec![piece] }),
                _ => {
                    let next = (at, piece.pages.pages(), Batch { area: *area, runs: vec![piece] });
                    batches.extend(open.replace(next).map(|(.., batch)| batch));
                }
            }
        }
    }
    batches.extend(open.map(|(.., batch)| batch));
    // Pages per run, compared without fractions; the order by address stays among equals.
    batches.sort_by(|a, b| {
        let (pages_a, runs_a) = (a.pages(), a.runs.len() as u64);
        let (pages_b, runs_b) = (b.pages(), b.runs.len() as u64);
        (pages_b * runs_a).cmp(&(pages_a * runs_b)).then_with(|| a.extent().cmp(&b.extent()))
    });
}

#[cfg(test)]
mod tests;
