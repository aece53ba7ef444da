#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::Secret;

fn secret() -> Secret {
    Secret::new([3; Secret::BYTES])
}

/// A page that is a function of its number.
fn page(number: u32) -> Vec<u8> {
    if number == 0 {
        return vec![0; 4096];
    }
    (0..1024_u32).flat_map(|i| (i ^ 0x5eed).wrapping_mul(number).wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

fn census_of(numbers: &[Option<u32>], fraction: Option<f64>) -> Census {
    let mut census = match fraction {
        None => Census::new(numbers.len()),
        Some(fraction) => Census::sampled(numbers.len(), fraction),
    };
    census.take_in(&findings(numbers));
    census
}

fn findings(numbers: &[Option<u32>]) -> Findings {
    let mut findings = Findings::new(0, numbers.len());
    for (at, number) in numbers.iter().enumerate() {
        if let Some(number) = number {
            findings.put(at, Content::of(&page(*number), &secret()));
        }
    }
    findings
}

fn groups_of(groups: &Groups, threads: usize) -> Vec<Vec<u32>> {
    let parts = groups.visit(threads, Vec::new, |list: &mut Vec<Vec<u32>>, group| list.push(group.pages.to_vec()));
    let mut all = parts.concat();
    all.sort();
    all
}

fn expected(numbers: &[Option<u32>]) -> (Vec<u32>, Vec<Vec<u32>>) {
    let mut by_number: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (at, number) in (0..).zip(numbers) {
        if let Some(number) = number {
            by_number.entry(*number).or_default().push(at);
        }
    }
    let zeros = by_number.remove(&0).unwrap_or_default();
    let mut groups: Vec<Vec<u32>> = by_number.into_values().collect();
    groups.sort();
    (zeros, groups)
}

#[test]
fn classes_are_told() {
    let class = |page: &[u8]| Content::of(page, &secret()).class();
    assert_eq!(class(&[0; 4096]), ContentClass::Zero);
    assert_eq!(class(&[0xcc; 4096]), ContentClass::Repeated);
    let text: Vec<u8> = b"The quick brown fox jumps over the lazy dog.\n".iter().copied().cycle().take(4096).collect();
    assert_eq!(class(&text), ContentClass::Text);
    let addresses = |from: u64| -> Vec<u8> {
        (0..512).flat_map(|i| if i % 3 == 0 { 0 } else { from + i * 48 }.to_le_bytes()).collect()
    };
    assert_eq!(class(&addresses(0x7f12_3456_7000)), ContentClass::Pointers);
    assert_eq!(class(&addresses(0x5512_3456_7000)), ContentClass::Pointers);
    assert_eq!(class(&addresses(0x40)), ContentClass::Other);
    assert_eq!(class(&page(7)), ContentClass::Other);
    assert_eq!(Content::of(&page(7), &secret()).class().text(), "other");
}

#[test]
fn one_page_and_none() {
    let groups = census_of(&[Some(5)], None).group(2);
    assert_eq!((groups_of(&groups, 3), groups.read()), (vec![vec![0]], 1));
    let groups = census_of(&[], None).group(2);
    assert_eq!((groups_of(&groups, 3).len(), groups.read(), groups.zeros().len()), (0, 0, 0));
    let groups = census_of(&[None, Some(0), None], None).group(1);
    assert_eq!((groups_of(&groups, 1).len(), groups.read(), groups.zeros()), (0, 1, &[1][..]));
}

#[test]
fn what_a_sample_keeps_is_complete_and_about_its_share() {
    let numbers: Vec<Option<u32>> = (0..40_000).map(|at| Some(at % 10_000)).collect();
    let groups = census_of(&numbers, Some(0.1)).group(2);
    let kept = groups_of(&groups, 2);
    assert!((850..1_150).contains(&kept.len()), "{}", kept.len());
    assert!(kept.iter().all(|group| group.len() == 4));
    assert_eq!((groups.read(), groups.zeros().len()), (40_000, 4));
    assert_eq!(groups_of(&census_of(&numbers, Some(0.0)).group(1), 1).len(), 0);
}

proptest! {
    /// Groups are those of a plain map, whatever the number of threads; what a second look finds changed, gone or no
    /// longer zero is volatile, and nothing else.
    #[test]
    fn groups_and_volatile_pages_are_exact(
        before in proptest::collection::vec(proptest::option::weighted(0.9, 0_u32..40), 0..300),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), proptest::option::of(0_u32..40)), 0..30),
        threads in 1_usize..5,
    ) {
        let mut after = before.clone();
        for (at, number) in changes {
            if !after.is_empty() {
                let at = at.index(after.len());
                after[at] = number;
            }
        }
        let mut census = census_of(&before, None);
        census.look_again(&findings(&after));
        let groups = census.group(threads);
        let (zeros, expected) = expected(&before);
        prop_assert_eq!(groups.zeros(), &zeros[..]);
        prop_assert_eq!(groups_of(&groups, threads), expected);
        for (at, (before, after)) in (0..).zip(before.iter().zip(&after)) {
            prop_assert_eq!(groups.is_volatile(at), before.is_some() && before != after, "page {}", at);
        }
        // The whole of hash space is a sample too.
        let mut sample = census_of(&before, Some(1.0));
        sample.look_again(&findings(&after));
        let sample = sample.group(threads);
        prop_assert_eq!(groups_of(&sample, threads), groups_of(&groups, threads));
        for (at, (before, after)) in (0..).zip(before.iter().zip(&after)) {
            prop_assert_eq!(sample.is_volatile(at), before.is_some() && before != after, "page {}", at);
        }
    }

    /// Sorting in parts is sorting.
    #[test]
    fn parts_are_sorted_as_a_whole(seed in any::<u64>(), threads in 1_usize..6) {
        let mut state = seed;
        let mut items: Vec<u64> = (0..70_000).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 40
        }).collect();
        let mut sorted = items.clone();
        sorted.sort_unstable();
        sort(&mut items, threads);
        prop_assert_eq!(items, sorted);
    }
}
