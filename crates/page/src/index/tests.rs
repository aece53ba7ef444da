#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;

use proptest::prelude::*;

use super::shard::{HASH_BITS, Inserted, Shard};
use super::*;
use crate::{PageNumber, PageRange};

/// Distinct fingerprints, as uniform as real ones (splitmix64).
fn fingerprint(number: u64) -> Fingerprint {
    let mix = |seed: u64| {
        let z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    Fingerprint::from_u128(u128::from(mix(2 * number + 1)) << 64 | u128::from(mix(2 * number + 2)))
}

fn id(number: u64) -> PageId {
    PageId::new(number + 1).unwrap()
}

#[test]
fn the_second_page_learns_of_the_first() {
    let mut index = CandidateIndex::new(1000);
    assert_eq!(index.observe(fingerprint(1), id(1)), Sighting::First);
    assert_eq!(index.observe(fingerprint(1), id(1)), Sighting::Again);
    assert_eq!(index.observe(fingerprint(1), id(2)), Sighting::Candidate(id(1)));
    assert_eq!(index.observe(fingerprint(1), id(3)), Sighting::Candidate(id(1)));
    assert_eq!(index.observe(fingerprint(2), id(4)), Sighting::First);
    let counts = index.counts();
    assert_eq!((counts.distinct, counts.duplicates, counts.confirmed), (2, 2, 1));
    assert_eq!((counts.entries, counts.unique), (2, 1));
    assert!(index.supersede(fingerprint(1), id(1), id(3)));
    assert!(!index.supersede(fingerprint(1), id(1), id(2)), "no longer there");
    assert_eq!(index.peek(fingerprint(1)), Some(id(3)));
    assert!(!index.forget(fingerprint(1), id(1)));
    assert!(index.forget(fingerprint(1), id(3)));
    assert_eq!(index.observe(fingerprint(1), id(9)), Sighting::First);
    index.clear();
    assert_eq!(index.counts(), IndexCounts::default());
}

/// The figure that matters: bytes for a page seen once, at every size on the way to the bound.
#[test]
fn a_page_seen_once_costs_eight_to_ten_bytes() {
    let mut index = CandidateIndex::new(2_000_000);
    let mut worst: f64 = 0.0;
    for page in 0..1_800_000_u64 {
        index.observe(fingerprint(page), id(page));
        if page > 100_000 && page.is_multiple_of(997) {
            worst = worst.max(index.bytes() as f64 / index.counts().entries as f64);
        }
    }
    let at_load = index.bytes() as f64 / index.counts().entries as f64;
    println!("bytes for a page seen once: {worst:.2} at worst, {at_load:.2} at load");
    assert!(worst <= 10.0, "{worst}");
    assert!(at_load <= 9.0, "{at_load}");
    // False candidates are all that keeps distinct below 1.8 million.
    let counts = index.counts();
    assert_eq!(counts.replaced_fresh + counts.replaced_old, 0);
    assert_eq!(counts.distinct + counts.duplicates, 1_800_000);
    let false_share = counts.duplicates as f64 / 1_800_000.0;
    println!("false candidates: {:.5} of lookups", false_share);
    assert!(false_share < 1.0 / 2000.0, "{false_share}");
}

#[test]
fn full_it_never_grows_and_gives_up_the_oldest_first() {
    let mut index = CandidateIndex::new(100_000);
    let bound = index.bound_bytes();
    assert!(bound <= 100_000 * 8 + 24 * 7);
    for page in 0..90_000 {
        index.observe(fingerprint(page), id(page));
    }
    assert_eq!(index.counts().replaced_fresh, 0);
    // The first 60,000 are confirmed in a second pass, the others grow old, and 25,000 newcomers come.
    index.grow_older();
    for page in 0..60_000 {
        assert_ne!(index.observe(fingerprint(page), id(page)), Sighting::First);
    }
    for page in 200_000..225_000 {
        index.observe(fingerprint(page), id(page));
        assert!(index.bytes() <= bound);
    }
    let counts = index.counts();
    let kept = (0..60_000).filter(|page| index.peek(fingerprint(*page)) == Some(id(*page))).count();
    let old = (60_000..90_000).filter(|page| index.peek(fingerprint(*page)) == Some(id(*page))).count();
    println!("kept {kept} of 60000 confirmed, {old} of 30000 old; {counts:?}");
    assert!(kept >= 59_000, "confirmed ones stay: {kept}");
    assert!(counts.replaced_old > 15_000 && counts.replaced_fresh < 2_000, "{counts:?}");
    assert!(counts.entries as usize * 8 <= bound);
    // Far more than it can hold, in one pass, twice: still something of everything, and no growth.
    for _ in 0..2 {
        for page in 1_000_000..1_400_000 {
            index.observe(fingerprint(page), id(page));
        }
        assert!(index.bytes() <= bound);
    }
    let held = (1_000_000..1_400_000).filter(|page| index.peek(fingerprint(*page)).is_some()).count();
    assert!(held > 80_000, "{held}");
    assert!(index.counts().replaced_fresh > 600_000);
}

#[test]
fn many_at_once_see_what_one_after_the_other_would() {
    let pages: Vec<_> = (0..1000).map(|page| (fingerprint(page * page % 331), id(page))).collect();
    let (mut one, mut many) = (CandidateIndex::new(5000), CandidateIndex::new(5000));
    let expected: Vec<_> = pages.iter().map(|(fingerprint, page)| one.observe(*fingerprint, *page)).collect();
    let mut told = Vec::new();
    many.observe_all(&pages, &mut told);
    assert_eq!(told, expected);
    assert_eq!(many.counts(), one.counts());
}

#[test]
fn tiny_bounds_work() {
    for bound in [0, 1, 15, 16, 17, 200] {
        let mut index = CandidateIndex::new(bound);
        for page in 0..500 {
            index.observe(fingerprint(page), id(page));
        }
        assert!(index.bytes() <= index.bound_bytes());
        assert!(index.counts().entries > 0);
        assert_eq!(index.observe(fingerprint(499), id(499)), Sighting::Again, "newcomers always enter");
    }
}

#[test]
fn ids_lead_back_through_the_spans() {
    let mut spans = Spans::new();
    let mut index = CandidateIndex::new(100);
    let first = spans.add(42, PageRange::from_count(PageNumber(0x7f00), 16)).unwrap();
    index.observe(fingerprint(0), first.offset(5));
    let Sighting::Candidate(other) = index.observe(fingerprint(0), first.offset(6)) else { panic!("seen before") };
    assert_eq!(spans.locate(other), Some(Location { owner: 42, page: PageNumber(0x7f05) }));
}

#[derive(Clone, Debug)]
enum Step {
    Observe(u64, u64),
    Forget(u64, u64),
    Supersede(u64, u64, u64),
    GrowOlder,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..300_u64, 0..500_u64).prop_map(|(content, page)| Step::Observe(content, page)),
        2 => (0..300_u64, 0..500_u64).prop_map(|(content, page)| Step::Forget(content, page)),
        1 => (0..300_u64, 0..500_u64, 0..500_u64).prop_map(|(content, stale, page)| Step::Supersede(content, stale, page)),
        1 => Just(Step::GrowOlder),
    ]
}

proptest! {
    /// As long as there is room the index is a map from content to page.
    #[test]
    fn with_room_it_is_a_map(steps in proptest::collection::vec(step(), 1..800)) {
        let mut index = CandidateIndex::new(1000);
        let mut map: HashMap<u64, (u64, bool)> = HashMap::new();
        let (mut distinct, mut duplicates, mut confirmed) = (0, 0, 0);
        for step in steps {
            match step {
                Step::Observe(content, page) => {
                    let expected = match map.get_mut(&content) {
                        None => { map.insert(content, (page, false)); distinct += 1; Sighting::First }
                        Some((first, _)) if *first == page => { confirmed += 1; Sighting::Again }
                        Some((first, repeated)) => { *repeated = true; duplicates += 1; Sighting::Candidate(id(*first)) }
                    };
                    prop_assert_eq!(index.observe(fingerprint(content), id(page)), expected);
                }
                Step::Forget(content, page) => {
                    let there = map.get(&content).is_some_and(|(first, _)| *first == page);
                    if there { map.remove(&content); }
                    prop_assert_eq!(index.forget(fingerprint(content), id(page)), there);
                }
                Step::Supersede(content, stale, page) => {
                    let there = map.get(&content).is_some_and(|(first, _)| *first == stale);
                    if there { map.insert(content, (page, false)); }
                    prop_assert_eq!(index.supersede(fingerprint(content), id(stale), id(page)), there);
                }
                Step::GrowOlder => index.grow_older(),
            }
        }
        for content in 0..300 {
            prop_assert_eq!(index.peek(fingerprint(content)), map.get(&content).map(|(page, _)| id(*page)));
        }
        let unique = map.values().filter(|(_, repeated)| !repeated).count() as u64;
        let expected = IndexCounts {
            distinct, duplicates, confirmed, entries: map.len() as u64, unique, ..IndexCounts::default()
        };
        prop_assert_eq!(index.counts(), expected);
    }

    /// A shard of any size, with hashes as crowded as one likes: what is in it is found, what is not is not, a
    /// newcomer always enters, and the array never exceeds its bound.
    #[test]
    fn a_crowded_shard_stays_sorted(
        max_words in 16_u32..300,
        crowd in 1_u32..=HASH_BITS,
        hashes in proptest::collection::vec((any::<u32>(), 0..8_u8), 1..600),
    ) {
        let mut shard = Shard::default();
        let mut present: HashMap<u32, PageId> = HashMap::new();
        for (at, (hash, action)) in hashes.into_iter().enumerate() {
            // Crowded at the end of the hashes, where the array's spare words are.
            let hash = (1 << HASH_BITS) - 1 - (hash >> (32 - crowd));
            prop_assert_eq!(shard.find(hash).map(|word| word.id()), present.get(&hash).copied());
            if action == 0 {
                prop_assert_eq!(shard.remove(hash).map(|word| word.id()), present.remove(&hash));
            } else if action == 1 {
                shard.grow_older();
            } else if shard.find(hash).is_none() {
                let inserted = shard.insert(hash, id(at as u64), max_words);
                present.insert(hash, id(at as u64));
                if inserted != Inserted::Room {
                    present.retain(|hash, page| shard.find(*hash).is_some_and(|word| word.id() == *page));
                }
                prop_assert_eq!(shard.find(hash).map(|word| word.id()), Some(id(at as u64)));
            }
            prop_assert_eq!(shard.used() as usize, present.len());
            prop_assert_eq!(shard.words().count(), present.len());
            prop_assert!(shard.bytes() <= max_words as usize * 8);
            for (hash, page) in &present {
                prop_assert_eq!(shard.find(*hash).map(|word| word.id()), Some(*page));
            }
        }
    }
}
