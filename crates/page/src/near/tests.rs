#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;

use proptest::prelude::*;

use super::signature::mix;
use super::*;

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// Pages by their id, as a caller has them.
#[derive(Default)]
struct Memory {
    pages: HashMap<u64, Vec<u8>>,
    owners: Vec<(u64, u32)>,
}

impl Memory {
    fn add(&mut self, owner: u32, words: &[u64]) -> u64 {
        let id = self.owners.len() as u64 + 100;
        self.pages.insert(id, words.iter().flat_map(|word| word.to_ne_bytes()).collect());
        self.owners.push((id, owner));
        id
    }

    fn report_within(&self, bound: usize) -> NearReport {
        let mut index = NearIndex::new(bound);
        for &(id, owner) in &self.owners {
            index.feed(id, owner, &self.pages[&id]);
        }
        index.finish(PAGE, |id, page| self.pages.get(&id).inspect(|found| page.copy_from_slice(found)).is_some())
    }

    fn report(&self) -> NearReport {
        self.report_within(1 << 16)
    }
}

/// A page of small numbers that no other seed gives.
fn numbers(seed: u64) -> Vec<u64> {
    (0..WORDS as u64).map(|at| mix(at + seed * 1000) >> 40).collect()
}

/// An address of `process` on its page `page`.
fn address(process: u32, page: u64) -> u64 {
    0x7f00_0000_0000 + u64::from(process) * 0x3_4567_8000 + page * 0x1000 + 0x10
}

/// A word of the process's own that looks random.
fn hash(process: u32, of: u64) -> u64 {
    let word = mix(u64::from(process) << 32 | of);
    if Pointers::default().kind(word) == WordKind::HighEntropy { word } else { hash(process, of + 1_000_000) }
}

/// `processes` processes, each with `pages` pages, changed for each process.
fn processes(count: u32, pages: u64, change: impl Fn(u32, u64, &mut Vec<u64>)) -> Memory {
    let mut memory = Memory::default();
    for process in 0..count {
        for page in 0..pages {
            let mut words = numbers(page + 1);
            change(process, page, &mut words);
            memory.add(process, &words);
        }
    }
    memory
}

fn only(report: &NearReport) -> &NearCause {
    assert_eq!(report.causes.len(), 1, "{report:?}");
    &report.causes[0]
}

#[test]
fn processes_that_differ_in_addresses_only() {
    let memory = processes(8, 20, |process, page, words| {
        words.iter_mut().step_by(3).enumerate().for_each(|(at, word)| *word = address(process, page + at as u64));
    });
    let report = memory.report();
    let found = only(&report);
    assert_eq!(found.cause, Cause::AddressSpaceLayout);
    assert_eq!((found.groups, found.pages, found.worth, found.worth_with_layout), (20, 160, 140, 140));
    assert_ne!(found.example.owners.0, found.example.owners.1);
    assert_eq!((found.example.differing, found.example.first[1].offset), (171, 24));
    assert_eq!((report.share, report.counts.changed, report.counts.fed), (1.0, 0, 160));
}

#[test]
fn a_seed_of_each_process_with_addresses_or_without() {
    for layout in [false, true] {
        let memory = processes(4, 10, |process, _, words| {
            for at in (0..WORDS).step_by(4) {
                words[at] = hash(process, at as u64);
                words[at + 1] = address(if layout { process } else { 0 }, at as u64);
            }
        });
        let report = memory.report();
        let found = only(&report);
        assert_eq!((found.cause.clone(), found.worth), (Cause::HashSeed, 30));
        assert_eq!(found.worth_with_layout, if layout { 30 } else { 0 });
    }
}

#[test]
fn reference_counts_in_some_blocks() {
    let memory = processes(3, 5, |process, page, words| {
        words[40] = 7 + u64::from(process);
        words[200] = address(process, page);
        words[300] = 90 - u64::from(process);
    });
    let report = memory.report();
    assert_eq!((only(&report).cause.clone(), only(&report).worth), (Cause::Counters, 10));
}

#[test]
fn headers_trailers_and_fixed_offsets_within_one_process() {
    let cases = [
        (vec![1, 2], Cause::Header),
        (vec![510, 511], Cause::Trailer),
        (vec![5, 260], Cause::FixedOffsets { offsets: vec![40, 2080] }),
    ];
    for (offsets, cause) in cases {
        // Addresses, as an allocator has them there, and text, as anybody may.
        for kind in 0..2 {
            let mut memory = Memory::default();
            for page in 0..50 {
                let mut words = numbers(1);
                for &at in &offsets {
                    let text = u64::from_ne_bytes([
                        b'a' + (page % 26) as u8,
                        b'a' + (page / 26) as u8,
                        99,
                        99,
                        99,
                        99,
                        99,
                        99,
                    ]);
                    words[at] = if kind == 0 { address(1, page) } else { text };
                }
                memory.add(1, &words);
            }
            let report = memory.report();
            let found = only(&report);
            assert_eq!((&found.cause, found.pages, found.worth), (&cause, 50, 49), "kind {kind}");
        }
    }
}

#[test]
fn nodes_of_one_process_that_point_elsewhere_have_no_remedy() {
    let mut memory = Memory::default();
    for page in 0..50 {
        let mut words = numbers(1);
        words.iter_mut().step_by(5).for_each(|word| *word = address(1, page));
        memory.add(1, &words);
    }
    assert_eq!(memory.report().causes, []);
}

#[test]
fn the_layout_saves_no_more_than_what_each_process_holds() {
    // Both processes hold 30 pages that differ by their addresses: with one layout 30 are left.
    let memory = processes(2, 30, |process, page, words| {
        *words = numbers(1);
        words.iter_mut().step_by(5).for_each(|word| *word = address(process, page));
    });
    let report = memory.report();
    assert_eq!(
        (only(&report).cause.clone(), only(&report).groups, only(&report).worth),
        (Cause::AddressSpaceLayout, 1, 30)
    );
}

#[test]
fn equal_unrelated_plain_and_random_pages_are_not_near() {
    let mut memory = Memory::default();
    for process in 0..4 {
        for page in 0..10 {
            memory.add(process, &numbers(1));
            memory.add(process, &numbers(u64::from(process) * 10 + page + 2));
            let random: Vec<u64> = (0..WORDS as u64).map(|at| hash(process, at)).collect();
            memory.add(process, &random);
            memory.add(process, &[0; WORDS]);
        }
    }
    let report = memory.report();
    assert_eq!(report.causes, []);
    assert_eq!((report.counts.fed, report.counts.plain, report.counts.random), (160, 40, 40));
}

#[test]
fn floating_point_numbers_are_no_seeds() {
    let memory = processes(4, 10, |process, _, words| {
        for (at, word) in words.iter_mut().enumerate() {
            *word = (f64::from(process) + at as f64 * 0.1).to_bits();
        }
    });
    assert_eq!(memory.report().causes, []);
}

#[test]
fn pages_that_are_gone_or_changed_are_counted_and_claim_nothing() {
    let mut memory = processes(2, 10, |process, page, words| words[9] = address(process, page));
    let mut index = NearIndex::new(1000);
    for &(id, owner) in &memory.owners {
        index.feed(id, owner, &memory.pages[&id]);
    }
    memory.pages.values_mut().for_each(|page| page[0] ^= 1);
    memory.pages.retain(|id, _| id % 2 == 0);
    let report =
        index.finish(PAGE, |id, page| memory.pages.get(&id).inspect(|found| page.copy_from_slice(found)).is_some());
    assert_eq!(report.causes, []);
    assert!(report.counts.changed > 0 && report.counts.changed == report.counts.compared);
}

#[test]
fn what_is_an_address_in_one_process_only_makes_equal_pages_no_near_ones() {
    let mut memory = Memory::default();
    let ids = [1, 2].map(|owner| memory.add(owner, &numbers(1)));
    let mut index = NearIndex::new(1000);
    let word = numbers(1)[5];
    index.owner(1, Pointers::within([(word, word + 1)]));
    for (owner, id) in (1..).zip(ids) {
        index.feed(id, owner, &memory.pages[&id]);
    }
    assert_eq!(index.finish(PAGE, |_, _| panic!("nothing to compare")).causes, []);
}

#[test]
fn a_full_index_keeps_whole_groups_and_says_which_share() {
    let memory = processes(4, 4000, |process, page, words| {
        words.iter_mut().step_by(7).for_each(|word| *word = address(process, page));
    });
    let report = memory.report_within(4000);
    assert!(report.share < 1.0 && report.counts.left_out > 8000, "{report:?}");
    let found = only(&report);
    // All pages of every group that was kept are there, but for groups cut when the limit fell.
    assert!(found.worth * 4 == found.pages * 3, "{found:?}");
    let estimate = found.worth as f64 / report.share;
    assert!((9_000.0..15_500.0).contains(&estimate), "{estimate} of 12000");
}

#[test]
fn the_same_data_at_other_offsets() {
    let memory = processes(4, 10, |process, page, words| {
        // Each process has some more of something before it.
        let mut all = numbers(page + 1);
        all.iter_mut()
            .step_by(6)
            .enumerate()
            .for_each(|(at, word)| *word = address(process, at as u64) + u64::from(process) * 16);
        all.rotate_right(process as usize * 12);
        *words = all;
    });
    let report = memory.report();
    let found = only(&report);
    assert_eq!((found.cause.clone(), found.pages, found.worth, found.worth_with_layout), (Cause::Shifted, 40, 30, 30));
}

#[test]
fn many_sets_of_offsets_are_told_together() {
    let mut memory = Memory::default();
    for set in 0..40 {
        for copy in 0..=(60 - set) {
            let mut words = numbers(set + 1);
            words[100 + set as usize] = address(1, copy);
            memory.add(1, &words);
        }
    }
    let report = memory.report();
    assert_eq!(report.causes.len(), 17);
    assert_eq!(report.causes.iter().map(|cause| cause.worth).sum::<u64>(), (0..40).map(|set| 60 - set).sum());
    assert!(report.causes.iter().any(|cause| cause.cause == Cause::FixedOffsets { offsets: vec![] }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever pages there are: no cause is worth more than the contents that it has, and the order of feeding and
    /// equal pages do not matter.
    #[test]
    fn figures_hold_together(
        pages in proptest::collection::vec((0_u32..4, 0_u64..6, 0_usize..WORDS, 0_u64..5, 0_u8..4), 1..60),
    ) {
        let mut memory = Memory::default();
        for &(owner, seed, at, value, kind) in &pages {
            let mut words = numbers(seed);
            words[at] = match kind {
                0 => address(owner, value),
                1 => hash(owner, value),
                2 => value,
                _ => words[at],
            };
            memory.add(owner, &words);
        }
        let report = memory.report();
        for cause in &report.causes {
            prop_assert!(cause.worth >= 1 && cause.worth < cause.pages, "{cause:?}");
            prop_assert!(cause.worth_with_layout <= cause.worth && cause.groups <= cause.pages);
        }
        let distinct: std::collections::HashSet<&Vec<u8>> = memory.pages.values().collect();
        let worth: u64 = report.causes.iter().map(|cause| cause.worth).sum();
        prop_assert!(worth < distinct.len() as u64);
        memory.owners.extend(memory.owners.clone());
        prop_assert_eq!(memory.report().causes, report.causes);
    }
}
