#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::SegmentId;

fn store(segment: u32, page: u32) -> Twin {
    Twin::Store(Place { segment: SegmentId(segment), page })
}

fn matched(page: u64, twin: Twin) -> Match {
    Match { page: PageNumber(page), twin }
}

fn range(start: u64, end: u64) -> PageRange {
    PageRange::new(PageNumber(start), PageNumber(end))
}

const ROOM: Limits = Limits { batch_pages: 64, window_pages: 512, vmas: 1000 };

#[test]
fn neighbours_merged_into_neighbours_are_one_run() {
    let matches: Vec<_> = (0..10).map(|at| matched(100 + at, store(1, 7 + at as u32))).collect();
    let plan = plan(&[range(50, 200)], &matches, &ROOM);
    assert_eq!(plan.batches, [Batch { area: 0, runs: vec![Run { pages: range(100, 110), twin: store(1, 7) }] }]);
    assert_eq!((plan.vmas_added, plan.pages()), (2, 10));
    assert!(plan.left_out.is_empty());
}

#[test]
fn the_last_page_of_an_area_stays_unless_it_is_dropped() {
    let areas = [range(10, 20), range(20, 30)];
    let matches =
        [matched(18, store(1, 0)), matched(19, store(1, 1)), matched(20, store(1, 2)), matched(29, Twin::Zero)];
    let plan = plan(&areas, &matches, &ROOM);
    assert_eq!(plan.left_out, [LeftOut { pages: range(19, 20), reason: Reason::LastPage }]);
    assert_eq!(plan.pages(), 3);
    // [18, 19) splits twice, [20, 21) is at its area's start.
    assert_eq!(plan.vmas_added, 3);
}

#[test]
fn pages_in_no_area_are_named() {
    let plan =
        plan(&[range(10, 20)], &[matched(5, store(1, 0)), matched(6, Twin::Zero), matched(20, store(1, 0))], &ROOM);
    assert!(plan.batches.is_empty());
    assert_eq!(plan.pages_left_out(Reason::NoArea), 3);
    assert_eq!(plan.left_out.len(), 2, "neighbours are named together");
}

#[test]
fn the_budget_goes_to_long_runs_and_filling_a_gap_is_free() {
    let mut matches = vec![matched(10, store(9, 0))];
    matches.extend((0..8).map(|at| matched(20 + at, store(1, at as u32))));
    matches.extend((0..8).map(|at| matched(29 + at, store(2, at as u32))));
    matches.push(matched(28, store(3, 0)));
    matches.sort_unstable_by_key(|found| found.page);
    let plan = plan(&[range(0, 100)], &matches, &Limits { vmas: 4, ..ROOM });
    assert_eq!(plan.vmas_added, 4);
    assert_eq!(plan.pages(), 17, "both long runs, and the page between them, which adds no mapping");
    assert_eq!(plan.left_out, [LeftOut { pages: range(10, 11), reason: Reason::Budget }]);
}

#[test]
fn a_long_run_is_cut_into_full_batches_that_keep_the_windows() {
    let matches: Vec<_> = (0..200).map(|at| matched(500 + at, store(1, at as u32))).collect();
    let plan = plan(&[range(0, 1000)], &matches, &ROOM);
    let mut sizes: Vec<_> = plan.batches.iter().map(|batch| (batch.extent().start.0, batch.pages())).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [(500, 12), (512, 64), (576, 64), (640, 60)]);
    assert_eq!(plan.vmas_added, 2);
    assert_eq!(plan.batches[0].pages(), 64, "the longest runs go first");
}

#[test]
fn scattered_pages_of_a_window_share_a_batch() {
    let matches: Vec<_> = (0..100).map(|at| matched(at * 4, store(1, 1000 - at as u32))).collect();
    let plan = plan(&[range(0, 500)], &matches, &ROOM);
    assert_eq!(plan.batches.iter().map(Batch::pages).collect::<Vec<_>>(), [64, 36]);
    // The first begins where the area does.
    assert_eq!(plan.vmas_added, 199);
}

fn matches() -> impl Strategy<Value = Vec<Match>> {
    proptest::collection::btree_map(0_u64..1500, (0_u32..3, 0_u32..20, 0_u8..4), 0..400).prop_map(|pages| {
        pages
            .into_iter()
            .map(|(page, (segment, near, kind))| match kind {
                0 => matched(page, Twin::Zero),
                // Mostly neighbours, so that runs come about.
                1 | 2 => matched(page, store(segment, u32::try_from(page).unwrap())),
                _ => matched(page, store(segment, near)),
            })
            .collect()
    })
}

proptest! {
    /// Every page is planned once, to its own twin, or left out for a reason that holds; limits are kept; the
    /// mappings added are those that a naive page table shows; and no run left out is longer than one chosen.
    #[test]
    fn plans_account_for_every_page(
        matches in matches(),
        batch_pages in 1_u64..80,
        vmas in 0_u64..300,
        borders in proptest::collection::btree_set(0_u64..1600, 0..12),
    ) {
        let borders: Vec<_> = borders.into_iter().collect();
        let areas: Vec<_> = borders.chunks_exact(2).map(|pair| range(pair[0], pair[1])).collect();
        let limits = Limits { batch_pages, window_pages: 128, vmas };
        let plan = plan(&areas, &matches, &limits);

        let mut planned: BTreeMap<PageNumber, Twin> = BTreeMap::new();
        for batch in &plan.batches {
            prop_assert!(batch.pages() <= batch_pages && batch.pages() > 0);
            prop_assert_eq!(batch.extent().start.0 / 128, (batch.extent().end.0 - 1) / 128);
            prop_assert!(batch.runs.windows(2).all(|pair| pair[0].pages.end <= pair[1].pages.start));
            for run in &batch.runs {
                for (at, page) in run.pages.iter().enumerate() {
                    prop_assert!(areas[batch.area].contains(page));
                    prop_assert!(run.twin == Twin::Zero || areas[batch.area].end != page.next());
                    prop_assert!(planned.insert(page, run.twin.offset(at as u64)).is_none());
                }
            }
        }
        let mut left: BTreeMap<PageNumber, Reason> = BTreeMap::new();
        for out in &plan.left_out {
            for page in out.pages.iter() { prop_assert!(left.insert(page, out.reason).is_none()); }
        }
        prop_assert_eq!(planned.len() + left.len(), matches.len());
        for found in &matches {
            let area = areas.iter().find(|area| area.contains(found.page));
            match left.get(&found.page) {
                None => prop_assert_eq!(planned[&found.page], found.twin),
                Some(Reason::NoArea) => prop_assert!(area.is_none()),
                Some(Reason::LastPage) => prop_assert_eq!(area.unwrap().end, found.page.next()),
                Some(Reason::Budget) => prop_assert!(area.is_some()),
            }
        }

        // Mappings as the kernel would count them: neighbours join where the twin goes on or both are private.
        let mut expected = 0;
        for area in &areas {
            let pages: Vec<_> = area.iter().map(|page| planned.get(&page).copied().filter(|twin| *twin != Twin::Zero)).collect();
            expected += pages.windows(2).filter(|pair| match (pair[0], pair[1]) {
                (None, None) => false,
                (Some(before), Some(after)) => !after.follows(before),
                _ => true,
            }).count() as u64;
        }
        prop_assert!(plan.vmas_added <= vmas);
        prop_assert_eq!(plan.vmas_added, expected);

        // A run was left out for the budget only when nothing shorter that costs as much was taken instead.
        let longest_left = plan.left_out.iter().filter(|out| out.reason == Reason::Budget).map(|out| out.pages.pages()).max();
        if longest_left.is_some() {
            prop_assert!(vmas - plan.vmas_added < 2, "budget was left: {} of {vmas}", plan.vmas_added);
        }
    }
}
