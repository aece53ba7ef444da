#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::*;

fn estimate(pages: u64, seen: &[(u64, u64)]) -> Estimate {
    Sample::new(pages, seen.iter().copied()).unwrap().estimate()
}

#[test]
fn a_sample_of_everything_is_exact() {
    let found = estimate(100, &[(1, 40), (2, 10), (40, 1)]);
    assert_eq!(found.basis, Basis::Counted);
    assert_eq!((found.distinct, found.duplicates), (Interval::exactly(51), Interval::exactly(49)));
    assert_eq!(estimate(0, &[]).duplicates, Interval::exactly(0));
}

#[test]
fn an_empty_sample_says_nothing() {
    let found = estimate(1000, &[]);
    assert_eq!(found.basis, Basis::Bounds);
    assert_eq!(found.distinct, Interval { low: 1, likely: 1000, high: 1000 });
    assert_eq!(found.duplicates, Interval { low: 0, likely: 0, high: 999 });
}

#[test]
fn pages_that_all_differ_have_no_duplicates() {
    let found = estimate(1_000_000, &[(1, 100_000)]);
    assert_eq!(found.duplicates.low, 0);
    assert!(found.duplicates.likely < 1_000, "{found:?}");
    // 9 pairs more than none are plausible, which are 900 pairs, or a few larger groups.
    assert!(found.duplicates.high < 30_000, "{found:?}");
}

#[test]
fn pages_that_are_all_equal_have_one_content() {
    let found = estimate(1_000_000, &[(100_000, 1)]);
    assert_eq!(found.distinct.low, 1);
    assert!(found.distinct.likely < 10, "{found:?}");
    assert!(found.distinct.high < 200, "nine pages in ten are known, {found:?}");
}

#[test]
fn a_tiny_sample_promises_nothing() {
    let found = estimate(1_000_000, &[(1, 10)]);
    assert_eq!(found.duplicates.low, 0);
    assert!(found.duplicates.high > 900_000, "{found:?}");
    let found = estimate(1_000_000, &[(10, 1)]);
    assert!(found.duplicates.low < 600_000, "{found:?}");
    assert!(found.duplicates.high > 999_000, "{found:?}");
    let found = estimate(2, &[(1, 1)]);
    assert_eq!((found.duplicates.low, found.duplicates.high), (0, 1));
}

#[test]
fn how_large_a_large_content_is_is_not_certain_either() {
    // Half of 60 pages; a third of all is plausible.
    let found = estimate(1_000_000, &[(1, 30), (30, 1)]);
    assert!((0.6e6..0.8e6).contains(&(found.distinct.high as f64)), "{found:?}");
}

#[test]
fn a_sample_of_one_page_in_a_million_is_estimated() {
    let found = estimate(1 << 40, &[(1, 1 << 20), (2, 3), (1000, 2)]);
    assert_eq!(found.basis, Basis::Fitted);
    assert!(found.duplicates.low >= 1_000_000_000, "the two large contents: {found:?}");
    assert!(found.duplicates.high > 1 << 39, "pairs do not show: {found:?}");
}

#[test]
fn the_largest_counts_do_not_overflow() {
    let found = estimate(u64::MAX, &[(1, 1 << 62), (1 << 61, 3), (u64::MAX >> 3, 1)]);
    assert!(found.distinct.low >= (1 << 62) + 4);
    assert_eq!(
        Sample::new(u64::MAX, [(u64::MAX, 2)]).map(|sample| sample.sampled()),
        Ok(u64::MAX),
        "saturates, rather than wraps"
    );
    assert_eq!(share(u64::MAX, u64::MAX, u64::MAX), Interval::exactly(u64::MAX));
}

#[test]
fn what_cannot_be_a_sample_is_refused() {
    let too_large = Sample::new(10, [(1, 5), (2, 3)]).unwrap_err();
    assert_eq!(too_large, SampleError::TooLarge { sampled: 11, pages: 10 });
    assert_eq!(too_large.to_string(), "a sample of 11 pages out of 10");
    assert_eq!(Sample::new(10, [(0, 2)]), Err(SampleError::SeenNever { contents: 2 }));
    assert!(Sample::new(10, [(0, 0), (11, 0)]).is_ok(), "nothing seen so often");
    assert_eq!(Sample::of_contents(9, [1, 1, 2, 1]), Sample::new(9, [(2, 1), (1, 2), (1, 1)]));
}

#[test]
fn shares_at_the_ends_are_not_certain() {
    assert_eq!(share(0, 0, 50), Interval { low: 0, likely: 0, high: 50 });
    assert_eq!(share(5, 10, 10), Interval::exactly(5));
    let none = share(0, 100, 10_000);
    assert_eq!((none.low, none.likely), (0, 0));
    assert!((500..1_000).contains(&none.high), "{none:?}");
    let all = share(100, 100, 10_000);
    assert_eq!((all.likely, all.high), (10_000, 10_000));
    assert!((9_000..9_500).contains(&all.low), "{all:?}");
}

#[test]
fn a_hash_subset_scales_complete_groups() {
    assert_eq!(HashSubset::new(0.0), None);
    assert_eq!(HashSubset::new(f64::NAN), None);
    assert_eq!(HashSubset::new(1.0).unwrap().bound(), None);
    let mut subset = HashSubset::new(0.25).unwrap();
    assert_eq!(subset.bound(), Some(1 << 62));
    assert_eq!(subset.duplicates_of(50), Scaled { value: 0.0, error: 50.0 }, "nothing is known");
    assert!(subset.duplicates().error > 0.0);
    subset.add(1, 60);
    subset.add(3, 20);
    subset.add(0, 7);
    assert_eq!((subset.contents(), subset.pages()), (80, 120));
    assert_eq!((subset.distinct().value, subset.all_pages().value), (320.0, 480.0));
    let duplicates = subset.duplicates();
    assert_eq!(duplicates.value, 160.0);
    // 20 terms of 2 squared, three quarters of them by chance, scaled by 4.
    assert!((duplicates.error - 60_f64.sqrt() * 4.0).abs() < 1e-9);
    let of = subset.duplicates_of(480);
    assert!((of.value - 160.0).abs() < 1e-9);
    assert!(of.error < duplicates.error);
}

#[test]
fn all_of_hash_space_is_exact() {
    let mut subset = HashSubset::new(1.0).unwrap();
    subset.add(4, 10);
    assert_eq!(subset.duplicates(), Scaled { value: 30.0, error: 0.0 });
    assert_eq!(subset.duplicates_of(40), Scaled { value: 30.0, error: 0.0 });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_estimate_never_contradicts_its_sample(
        seen in prop::collection::vec((1_u64..600, 0_u64..5_000), 0..12),
        ones in 0_u64..100_000,
        more in 0_u64..10_000_000,
    ) {
        let seen = seen.into_iter().chain([(1, ones)]);
        let sampled: u64 = seen.clone().map(|(times, contents)| times * contents).sum();
        let sample = Sample::new(sampled + more, seen).unwrap();
        let found = sample.estimate();
        for interval in [found.distinct, found.duplicates] {
            prop_assert!(interval.low <= interval.likely && interval.likely <= interval.high);
            prop_assert!(interval.high <= sample.pages());
        }
        prop_assert!(found.distinct.low >= sample.contents());
        prop_assert!(found.duplicates.low >= sampled - sample.contents());
        prop_assert_eq!(found.distinct.likely + found.duplicates.likely, sample.pages());
        prop_assert_eq!(found.basis == Basis::Counted, more == 0);
        prop_assert_eq!(sample.estimate(), found, "the same sample, the same answer");
    }

    #[test]
    fn a_share_is_between_what_was_seen(part in 0_u64..1_000, other in 0_u64..1_000, more in 0_u64..1_000_000) {
        let pages = part + other + more;
        let found = share(part, part + other, pages);
        prop_assert!(part <= found.low && found.low <= found.likely && found.likely <= found.high);
        prop_assert!(found.high <= pages - other);
    }
}
