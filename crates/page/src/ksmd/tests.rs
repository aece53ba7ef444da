#![allow(clippy::unwrap_used, reason = "tests")]
use std::collections::HashMap;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const ZERO: u64 = 1;

/// Contents by number: 0 absent, 1 zeros.
fn capture(looks: &[&[u64]]) -> Capture {
    let mut builder = Capture::builder();
    for (second, look) in looks.iter().enumerate() {
        builder.look(Duration::from_secs(second as u64), look.iter().map(|&bits| Content::from_bits(bits))).unwrap();
    }
    builder.build()
}

/// Long sleeps, one batch a pass: the clock does not matter.
const STEPPED: Settings = Settings {
    pages_to_scan: u32::MAX,
    sleep_millisecs: 0,
    smart_scan: false,
    use_zero_pages: false,
    max_page_sharing: u32::MAX,
    advisor: Advisor::None,
};

fn duplicates(pages: &[u64]) -> (u64, u64) {
    let mut copies: HashMap<u64, u64> = HashMap::new();
    for &page in pages.iter().filter(|&&page| page != 0) {
        *copies.entry(page).or_default() += 1;
    }
    let shared = copies.values().filter(|&&copies| copies > 1).count() as u64;
    (shared, copies.values().map(|copies| copies - 1).sum())
}

#[test]
fn equal_pages_take_two_passes() {
    let capture = capture(&[&[5, 6, 5, ZERO, 7, ZERO, 5, 0]]);
    let mut model = Model::new(&capture, STEPPED);
    let first = model.pass();
    assert_eq!((first.full_scans, first.pages_sharing, first.pages_unshared, first.pages_volatile), (1, 0, 0, 7));
    let second = model.pass();
    assert_eq!((second.pages_shared, second.pages_sharing, second.pages_unshared), (2, 3, 2));
    assert_eq!((second.pages_volatile, second.pages_scanned, second.rmap_items), (0, 14, 7));
    assert_eq!(second.general_profit(4096), 3 * 4096 - 7 * 64);
    assert_eq!(capture.reachable(), Reachable { duplicates: 2, zero_pages: 2 });
}

#[test]
fn zero_pages_lose_their_records_a_pass_later() {
    let capture = capture(&[&[ZERO, ZERO, 9, ZERO], &[ZERO, 8, 9, 0]]);
    let mut model = Model::new(&capture, Settings { use_zero_pages: true, ..STEPPED });
    model.show(0);
    model.pass();
    let second = model.pass();
    assert_eq!((second.ksm_zero_pages, second.pages_sharing, second.rmap_items), (3, 0, 4));
    assert_eq!(model.pass().rmap_items, 1);
    model.show(1);
    assert_eq!(model.state().ksm_zero_pages, 1, "the kernel counts at once");
    assert_eq!((model.pass().rmap_items, model.pass().pages_unshared), (2, 2));
}

#[test]
fn smart_scan_visits_less_and_less_often() {
    let capture = capture(&[&[5]]);
    let mut model = Model::new(&capture, Settings { smart_scan: true, ..STEPPED });
    let mut before = 0;
    let visits: Vec<u32> = (0..50)
        .filter(|_| {
            let scanned = model.pass().pages_scanned;
            std::mem::replace(&mut before, scanned) < scanned
        })
        .collect();
    assert_eq!(visits, [0, 1, 2, 3, 5, 8, 13, 22, 31, 40, 49]);
    assert_eq!(model.state().pages_skipped, 50 - 11);
}

#[test]
fn smart_scan_misses_equal_pages_whose_visits_never_coincide() {
    // Passes from the first page's appearance to the second's, and whether they ever meet.
    for (apart, meet) in [(0, true), (1, true), (14, true), (22, false), (24, false), (25, false), (27, true)] {
        let capture = capture(&[&[5, 0], &[5, 5]]);
        let mut model = Model::new(&capture, Settings { smart_scan: true, ..STEPPED });
        model.show(0);
        for _ in 0..apart {
            model.pass();
        }
        model.show(1);
        let met = model.run_until_settled(Duration::from_secs(3600)).pages_sharing == 1;
        assert_eq!(met, meet, "{apart} passes apart");
    }
}

#[test]
fn a_written_page_is_counted_until_ksmd_comes_by() {
    let capture = capture(&[&[5, 5, 5], &[5, 6, 5], &[7, 6, 8], &[7, 6, 5]]);
    let mut model = Model::new(&capture, STEPPED);
    model.show(0);
    model.pass();
    assert_eq!(model.pass().pages_sharing, 2);
    model.show(1);
    assert_eq!(model.state().pages_sharing, 2);
    let state = model.pass();
    assert_eq!((state.pages_shared, state.pages_sharing, state.pages_volatile), (1, 1, 1));
    model.show(2);
    let state = model.pass();
    assert_eq!((state.pages_shared, state.pages_sharing, state.pages_volatile), (0, 0, 2));
    model.show(3);
    model.pass();
    assert_eq!(model.pass().pages_sharing, 0, "what was merged is gone: a lone page finds nothing to join");
}

#[test]
fn a_page_that_nobody_maps_any_more_is_not_joined() {
    let capture = capture(&[&[9, 5, 5], &[5, 5, 5], &[5, 7, 8]]);
    let mut model = Model::new(&capture, STEPPED);
    model.show(0);
    model.pass();
    model.pass();
    model.show(1);
    assert_eq!(model.pass().pages_sharing, 1);
    model.show(2);
    // The first page is met while the records of the others still hang on what was merged.
    let state = model.pass();
    assert_eq!((state.pages_shared, state.pages_sharing, state.pages_unshared), (0, 0, 1));
}

#[test]
fn a_page_that_was_away_is_a_new_one() {
    let capture = capture(&[&[5, 6], &[0, 6]]);
    let mut model = Model::new(&capture, STEPPED);
    for (look, unshared, volatile) in [(0, 0, 2), (0, 2, 0), (1, 1, 0), (0, 1, 1), (0, 2, 0)] {
        model.show(look);
        let state = model.pass();
        assert_eq!((state.pages_unshared, state.pages_volatile), (unshared, volatile));
    }
}

#[test]
fn a_late_copy_joins_at_its_second_visit() {
    let capture = capture(&[&[5, 5, 0], &[5, 5, 5]]);
    let mut model = Model::new(&capture, STEPPED);
    model.show(0);
    model.pass();
    model.pass();
    model.show(1);
    assert_eq!(model.pass().pages_sharing, 1);
    assert_eq!(model.pass().pages_sharing, 2);
}

#[test]
fn a_page_that_changes_every_pass_is_never_merged() {
    let capture = capture(&[&[5, 5], &[6, 6]]);
    let mut model = Model::new(&capture, STEPPED);
    for pass in 0..10 {
        model.show(pass % 2);
        let state = model.pass();
        assert_eq!((state.pages_sharing, state.pages_volatile), (0, 2));
    }
}

#[test]
fn looks_come_with_the_clock() {
    // 1000 pages in batches of 100 every 24 ms: 0.26 s a pass. The second page changes at 1 s.
    let mut before: Vec<u64> = (1000..2000).collect();
    (before[0], before[1]) = (2, 2);
    let mut after = before.clone();
    after[1] = 3;
    let capture = capture(&[&before, &after]);
    let settings = Settings { smart_scan: false, ..Settings::default() };
    let mut model = Model::new(&capture, settings);
    assert_eq!(model.run_until(Duration::from_millis(500)).pages_sharing, 1);
    assert_eq!(model.run_until(Duration::from_millis(1600)).pages_sharing, 0);
    assert_eq!(model.state().pages_shared, 1, "a merged page with one mapping left stays");
    let state = model.run_until(Duration::from_secs(100));
    assert!(model.settled() && state.at >= Duration::from_secs(100));
}

#[test]
fn a_repeated_pass_is_what_a_played_one_would_be() {
    let pages: Vec<u64> = (0..3000).map(|page| if page % 3 == 0 { page } else { 10_000 + page / 7 }).collect();
    let capture = capture(&[&pages]);
    for smart_scan in [false, true] {
        for advisor in [Advisor::None, Advisor::ScanTime(ScanTime::default())] {
            let settings = Settings { smart_scan, advisor, pages_to_scan: 170, ..Settings::default() };
            let mut repeated = Model::new(&capture, settings);
            let mut played = repeated.clone();
            for _ in 0..100 {
                let state = repeated.pass();
                while !played.play() {}
                let mut expected = played.state();
                let apart = state.at.abs_diff(expected.at);
                assert!(apart < expected.at / 50, "{state:?}\n{expected:?}");
                if smart_scan {
                    // Under an advisor times decide batches, and batches the times.
                    expected.pages_to_scan = state.pages_to_scan;
                    expected.cpu = state.cpu;
                }
                expected.at = state.at;
                assert_eq!(state, expected);
            }
            assert!(repeated.settled());
        }
    }
}

#[test]
fn the_advisor_stays_at_ten_per_cent_where_less_would_do() {
    let pages: Vec<u64> = (2..1_000_002).collect();
    let capture = capture(&[&pages]);
    let costs =
        Costs { checksum: 2000, stable_level: 0, unstable_level: 0, batch: 0, pass: 0, tick: 0, ..Costs::default() };
    let advisor = Advisor::ScanTime(ScanTime::default());
    let settings = Settings { advisor, smart_scan: false, ..Settings::default() };
    let mut model = Model::with_costs(&capture, settings, costs);
    let (mut before, mut last) = (State::default(), State::default());
    for _ in 0..30 {
        (before, last) = (last, model.pass());
    }
    let pass = (last.at - before.at).as_secs_f64();
    let share = (last.cpu - before.cpu).as_secs_f64() / pass;
    assert!((18.0..21.0).contains(&pass) && (0.09..0.11).contains(&share), "{pass} s, {share}: asked were 200 s");
}

#[test]
fn an_advisor_takes_all_that_ksmd_ever_used_for_its_first_pass() {
    let pages: Vec<u64> = (2..2_002).collect();
    let capture = capture(&[&pages]);
    let advisor = Advisor::ScanTime(ScanTime::default());
    let settings = Settings { advisor, ..Settings::default() };
    for (before, batches) in [(0, [5_000, 30_000, 30_000]), (60, [10, 100, 1_000]), (3_600, [10, 100, 1_000])] {
        let mut model = Model::new(&capture, settings).ksmd_has_used(Duration::from_secs(before));
        let [first, second, third] = std::array::from_fn(|_| model.pass());
        let pages_to_scan = [first, second, third].map(|state| state.pages_to_scan);
        if before > 0 {
            let starved = second.at - first.at;
            assert!(starved > Duration::from_secs(1), "{starved:?}");
        }
        assert_eq!(pages_to_scan, batches, "{before} s before");
    }
}

#[test]
fn bad_looks_are_refused_and_left_out() {
    let mut builder = Capture::builder();
    builder.look(Duration::from_secs(3), [Content::ZERO; 3]).unwrap();
    let late = builder.look(Duration::from_secs(3), [Content::ZERO; 3]);
    assert!(matches!(late, Err(CaptureError::Time { .. })), "{late:?}");
    let short = builder.look(Duration::from_secs(4), [Content::ZERO; 2]);
    assert_eq!(short, Err(CaptureError::Pages { expected: 3, found: 2 }));
    let capture = builder.build();
    assert_eq!((capture.looks(), capture.pages(), capture.length()), (1, 3, Duration::ZERO));
}

#[test]
fn reserved_hashes_are_moved_aside_and_nothing_is_a_capture() {
    assert_eq!(Content::hashed(5).to_bits(), 5);
    assert!(![Content::ABSENT, Content::ZERO].contains(&Content::hashed(0)));
    assert!(![Content::ABSENT, Content::ZERO].contains(&Content::hashed(1)));
    let empty = Capture::builder().build();
    let mut model = Model::new(&empty, Settings::default());
    assert_eq!(model.pass().full_scans, 1);
    assert_eq!(model.run_until(Duration::from_secs(3600)).pages_scanned, 0);
    assert_eq!(empty.reachable().pages(), 0);
}

#[test]
fn the_cheapest_settings_that_are_fast_enough_are_recommended() {
    let pages: Vec<u64> = (0..40_000).map(|page| 2 + page % 30_000).collect();
    let capture = capture(&[&pages]);
    let at_rate = |pages_to_scan| Settings { pages_to_scan, smart_scan: false, ..Settings::default() };
    let choice = [100, 1000, 10_000].map(at_rate);
    // Two passes of 40,000 pages: 19 s, 1.9 s and 0.2 s.
    for (within, best) in [(60, Some(100)), (10, Some(1000)), (1, Some(10_000))] {
        let goal = Goal { share: 0.95, within: Duration::from_secs(within) };
        let trials = compare(&capture, &choice, Costs::default(), goal);
        assert_eq!(recommend(&trials).map(|trial| trial.settings.pages_to_scan), best, "{within} s");
        assert!(trials.iter().all(|trial| trial.end().at >= goal.within));
    }
    let goal = Goal { share: 0.95, within: Duration::from_millis(50) };
    assert!(recommend(&compare(&capture, &choice, Costs::default(), goal)).is_none());
    let goal = Goal { share: 0.9, within: Duration::from_secs(120) };
    assert!(recommend(&compare(&capture, &ladder(Settings::default()), Costs::default(), goal)).is_some());
}

proptest! {
    #[test]
    fn what_holds_still_is_merged_whole(pages in vec(0_u64..40, 0..200)) {
        let capture = capture(&[&pages]);
        let present = pages.iter().filter(|&&page| page != 0).count() as u64;
        let (shared, sharing) = duplicates(&pages);
        for smart_scan in [false, true] {
            let mut model = Model::new(&capture, Settings { smart_scan, ..STEPPED });
            model.pass();
            let state = model.pass();
            prop_assert_eq!((state.pages_shared, state.pages_sharing), (shared, sharing));
            prop_assert_eq!(state.pages_unshared, present - shared - sharing);
            let reachable = capture.reachable();
            prop_assert_eq!(sharing, reachable.pages() - u64::from(reachable.zero_pages > 0));
        }
        let mut model = Model::new(&capture, Settings { use_zero_pages: true, ..STEPPED });
        model.pass();
        prop_assert_eq!(model.pass().pages_saved(), capture.reachable().pages());
    }

    #[test]
    fn a_limit_of_mappings_gives_the_selftests_figures(copies in 1_u64..200, limit in 2_u32..40) {
        let pages = vec![77; copies as usize];
        let capture = capture(&[&pages]);
        let mut model = Model::new(&capture, Settings { max_page_sharing: limit, ..STEPPED });
        model.pass();
        let state = model.pass();
        let limit = u64::from(limit);
        let (shared, sharing) = match copies % limit {
            0 | 1 => (copies / limit, copies / limit * (limit - 1)),
            _ => (copies / limit + 1, copies - copies / limit - 1),
        };
        prop_assert_eq!((state.pages_shared, state.pages_sharing), (shared, sharing));
        prop_assert_eq!(model.run_until_settled(Duration::from_secs(3600)).pages_sharing, sharing);
    }

    #[test]
    fn counters_add_up_whatever_changes(
        looks in vec(vec(0_u64..6, 30), 1..12),
        smart_scan: bool,
        use_zero_pages: bool,
        max_page_sharing in 2_u32..6,
        pages_to_scan in 1_u32..50,
    ) {
        let slices: Vec<&[u64]> = looks.iter().map(Vec::as_slice).collect();
        let capture = capture(&slices);
        let settings = Settings { pages_to_scan, smart_scan, use_zero_pages, max_page_sharing, ..Settings::default() };
        let mut model = Model::new(&capture, settings);
        let mut at = Duration::ZERO;
        while at < Duration::from_secs(30) {
            at += Duration::from_millis(300);
            let state = model.run_until(at);
            let counted = state.pages_shared + state.pages_sharing + state.pages_unshared + state.pages_volatile;
            prop_assert_eq!(counted, state.rmap_items);
            prop_assert!(state.rmap_items <= 30);
            prop_assert!(state.pages_sharing < state.pages_shared * u64::from(max_page_sharing) + 1);
        }
        // Long after the last look only pages that hold something are known, and merges only join equal pages.
        let state = model.run_until_settled(Duration::from_secs(3600));
        let last = looks.last().unwrap();
        let zero = last.iter().filter(|&&page| page == ZERO).count() as u64;
        prop_assert!(model.settled());
        if use_zero_pages {
            prop_assert_eq!(state.ksm_zero_pages, zero);
        }
        let (_, most) = duplicates(last);
        prop_assert!(state.pages_sharing <= most);
    }
}
