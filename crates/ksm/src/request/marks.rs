//! Which ranges are marked mergeable.
//!
//! Each marked run in the middle of a mapping splits it, which costs two mappings and their memory, and a process may have
//! `vm.max_map_count` of them. So runs are joined over small gaps, and over larger ones where the budget needs it: a page
//! marked without need costs the kernel a record of 64 bytes and ksmd a look in each pass, and changes nothing else.
use kernel::{Range, page_size};
use page::profit::{KsmBooks, StoreBooks};

use super::walk::Area;

/// What is marked in a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Marks {
    /// Ranges to advise, ascending, each within one mapping.
    pub(crate) runs: Vec<Range>,
    /// Pages in them that nobody asked for.
    pub(crate) besides: u64,
    /// Mappings that they add.
    pub(crate) vmas: u64,
    /// Pages that stay unmarked because the process would get too many mappings.
    pub(crate) over_budget: u64,
}

/// A run of wanted pages, with what it would split.
#[derive(Clone, Copy, Debug)]
struct Run {
    range: Range,
    mapping: Range,
    /// Of `range`, the pages that were asked for.
    wanted: u64,
}

impl Run {
    fn vmas(&self) -> u64 {
        u64::from(self.range.start() != self.mapping.start()) + u64::from(self.range.end() != self.mapping.end())
    }
}

/// Plans the marks for `wanted` pages (ascending ranges) of one process in its `areas`, with at most `budget` mappings
/// more. What is mergeable already needs no mark.
pub(crate) fn plan(wanted: &[Range], areas: &[Area], budget: u64) -> Marks {
    let mut runs: Vec<Run> = Vec::new();
    for area in areas.iter().filter(|area| !area.marked) {
        let from = wanted.partition_point(|range| range.end() <= area.range.start());
        let inside = wanted[from..].iter().map_while(|range| range.intersect(&area.range));
        runs.extend(inside.map(|range| Run { range, mapping: area.mapping, wanted: range.pages().get() }));
    }
    // As much memory as the two mappings.
    let small = 2 * StoreBooks::VMA / KsmBooks::RMAP_ITEM;
    runs = join(runs, small);
    let cost = |runs: &[Run]| runs.iter().map(Run::vmas).sum::<u64>();
    if cost(&runs) > budget {
        let mut gaps: Vec<u64> = runs.windows(2).filter_map(|pair| gap(&pair[0], &pair[1])).collect();
        gaps.sort_unstable();
        // A gap that is closed saves two, so the smallest that do it together.
        let needed = usize::try_from((cost(&runs) - budget).div_ceil(2)).unwrap_or(usize::MAX);
        if let Some(widest) = gaps.get(needed.min(gaps.len()).saturating_sub(1)) {
            runs = join(runs, *widest);
        }
    }
    let mut marks = Marks::default();
    // Those that save most come first where not all can.
    if cost(&runs) > budget {
        runs.sort_by_key(|run| std::cmp::Reverse(run.wanted));
    }
    for run in runs {
        if marks.vmas + run.vmas() > budget {
            marks.over_budget += run.wanted;
            continue;
        }
        marks.vmas += run.vmas();
        marks.besides += run.range.pages().get() - run.wanted;
        marks.runs.push(run.range);
    }
    marks.runs.sort_unstable();
    marks
}

/// Pages between two runs of one mapping.
fn gap(one: &Run, next: &Run) -> Option<u64> {
    (one.mapping == next.mapping).then(|| (next.range.start() - one.range.end()).get() / page_size())
}

/// Joins runs over gaps of at most so many pages.
fn join(runs: Vec<Run>, most: u64) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if gap(last, &run).is_some_and(|gap| gap <= most) => {
                let both = Range::new(last.range.start(), run.range.end()).expect("runs ascend");
                *last = Run { range: both, wanted: last.wanted + run.wanted, ..*last };
            }
            _ => joined.push(run),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use kernel::Vaddr;

    fn range(start: u64, end: u64) -> Range {
        Range::new(Vaddr(start * page_size()), Vaddr(end * page_size())).unwrap()
    }

    fn area(start: u64, end: u64) -> Area {
        Area { target: 0, range: range(start, end), mapping: range(start, end), marked: false }
    }

    #[test]
    fn runs_end_where_mappings_do_and_small_gaps_are_closed() {
        let areas = [area(0, 100), area(100, 200), Area { marked: true, ..area(200, 300) }];
        let marks = plan(&[range(90, 110), range(112, 120), range(150, 160), range(210, 220)], &areas, 100);
        assert_eq!(marks.runs, [range(90, 100), range(100, 120), range(150, 160)]);
        assert_eq!((marks.besides, marks.vmas, marks.over_budget), (2, 4, 0));
    }

    #[test]
    fn a_small_budget_closes_larger_gaps_and_then_leaves_the_smallest_runs() {
        let areas = [area(0, 10_000)];
        let wanted: Vec<Range> = (1..=50).map(|at| range(at * 100, at * 100 + 1 + at % 7)).collect();
        let free = plan(&wanted, &areas, 1000);
        assert_eq!((free.runs.len(), free.vmas, free.besides), (50, 100, 0));
        for budget in [60, 10, 3, 2] {
            let tight = plan(&wanted, &areas, budget);
            assert!(tight.vmas <= budget && tight.over_budget == 0, "{tight:?}");
            for range in &wanted {
                assert!(tight.runs.iter().any(|run| run.contains_range(range)), "{range} at {budget}");
            }
        }
        let apart: Vec<Area> = (0..50).map(|at| area(at * 200, at * 200 + 190)).collect();
        let wanted: Vec<Range> = (0..50).map(|at| range(at * 200 + 10, at * 200 + 11 + at)).collect();
        let least = plan(&wanted, &apart, 9);
        assert_eq!((least.runs.len(), least.vmas), (4, 8));
        assert!(least.runs.contains(&wanted[49]) && !least.runs.contains(&wanted[0]));
        let pages: u64 = wanted.iter().map(|range| range.pages().get()).sum();
        assert_eq!(least.over_budget, pages - (50 + 49 + 48 + 47));
    }
}
