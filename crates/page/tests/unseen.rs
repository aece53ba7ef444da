//! Estimates from samples of made-up hosts, against what is known of them.
#![allow(clippy::unwrap_used, reason = "tests")]

use pagefold_page::unseen::{Basis, HashSubset, Sample, share};

mod populations;

use populations::{Dice, Population, populations};

/// Percentage points of all pages by which an estimate may be off, and half its range may be.
fn check(population: &Population, p: f64, seed: u64, most_off: f64, most_half: f64) {
    let (pages, truth) = (population.pages(), population.duplicates());
    let sample = Sample::of_contents(pages, population.sample(p, &mut Dice(seed))).unwrap();
    let estimate = sample.estimate();
    let found = estimate.duplicates;
    let points = |value: u64| 100.0 * value as f64 / pages as f64;
    let (off, half) = (points(found.likely.abs_diff(truth)), points(found.high - found.low) / 2.0);
    let name = format!("{} at {p}, seed {seed}: {truth} and {found:?}, off {off:.2}, half {half:.2}", population.name);
    assert_eq!(estimate.basis, Basis::Fitted, "{name}");
    assert!(found.contains(truth), "{name}");
    assert!(off <= most_off && half <= most_half, "{name}");
}

#[test]
fn hosts_are_as_described() {
    let saving: Vec<_> = populations()
        .iter()
        .map(|host| (host.pages() / 10_000, (1000.0 * host.duplicates() as f64 / host.pages() as f64).round() as u64))
        .collect();
    assert_eq!(saving.iter().filter(|(pages, _)| !(195..=205).contains(pages)).count(), 0, "{saving:?}");
}

#[test]
fn the_true_value_is_in_the_range_from_one_page_in_twenty_on() {
    for host in populations() {
        for seed in 0..2 {
            for (p, off, half) in [(0.05, 10.0, 14.0), (0.1, 3.0, 7.0), (0.15, 3.0, 3.5), (0.3, 0.3, 0.6)] {
                check(&host, p, 100 * seed + 7, off, half);
            }
        }
    }
}

#[test]
fn a_hash_subset_is_right_within_its_error() {
    for mut host in populations() {
        // Few and large: counted apart, or the error is that of the few which happened to be in the subset.
        host.contents.retain(|&(size, _)| size <= 500);
        let (pages, truth) = (host.pages(), host.duplicates() as f64);
        let mut dice = Dice(3);
        let mut subset = HashSubset::new(0.02).unwrap();
        for &(size, contents) in &host.contents {
            subset.add(size, (0..contents).filter(|_| dice.lucky(0.02)).count() as u64);
        }
        for found in [subset.duplicates(), subset.duplicates_of(pages)] {
            let off = (found.value - truth).abs();
            assert!(off < 3.0 * found.error, "{}: {truth}, {found:?}", host.name);
            assert!(found.error < 0.02 * pages as f64, "{}: {found:?}", host.name);
        }
        let distinct = subset.distinct();
        assert!((distinct.value - host.distinct() as f64).abs() < 3.0 * distinct.error);
        let all = subset.all_pages();
        assert!((all.value - pages as f64).abs() < 3.0 * all.error);
    }
}

#[test]
fn a_share_of_a_sample_is_a_share_of_the_whole() {
    let mut dice = Dice(11);
    let (mut missed, runs) = (0, 400);
    for _ in 0..runs {
        // 30,000 of 100,000 pages are of the kind.
        let part = (0..30_000).filter(|_| dice.lucky(0.02)).count() as u64;
        let rest = (0..70_000).filter(|_| dice.lucky(0.02)).count() as u64;
        missed += u64::from(!share(part, part + rest, 100_000).contains(30_000));
    }
    assert!(missed <= 4, "three standard deviations: {missed} of {runs} missed");
}
