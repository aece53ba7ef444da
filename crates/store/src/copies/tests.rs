#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use kernel::{Bytes, page_size};

use super::*;
use crate::partition::Options;
use crate::{FillBuffer, FillRequest, Outcome};

fn page(seed: u8) -> Vec<u8> {
    vec![seed; usize::try_from(page_size()).unwrap()]
}

fn open(limit: Option<u64>) -> Partition {
    let limit = limit.map(|pages| Bytes(pages * page_size()));
    Partition::open(Options { limit, ..Options::for_user(1) }).unwrap()
}

fn fill(partition: &mut Partition, seeds: &[u8]) -> Vec<Outcome> {
    let fingerprint = |seed: &u8| partition.secret.fingerprint(&page(*seed));
    let requests: Vec<_> = seeds
        .iter()
        .map(|seed| FillRequest { fingerprint: fingerprint(seed), source: *seed, continues: true })
        .collect();
    let report = partition.fill(&mut FillBuffer::new(), &requests, |requests, reads| {
        requests.iter().enumerate().for_each(|(slot, request)| reads.put(slot, &page(request.source)));
    });
    report.outcomes
}

fn repeat(partition: &mut Partition, seed: u8, copies: u32) -> bool {
    let fingerprint = partition.secret.fingerprint(&page(seed));
    partition.repeat(fingerprint, &page(seed), copies).unwrap()
}

fn copies(partition: &Partition, seed: u8) -> Option<Run> {
    partition.copies(partition.secret.fingerprint(&page(seed)))
}

#[test]
fn a_block_is_found_once_and_counted_in_full() {
    let mut partition = open(None);
    assert!(repeat(&mut partition, 7, 20));
    let block = copies(&partition, 7).unwrap();
    assert_eq!((block.place.page, block.pages), (0, 20));
    assert_eq!((partition.counters.pages_shared, partition.counters.filled, partition.places.len()), (20, 20, 1));
    for number in 0..20 {
        let mut stored = page(0);
        assert!(partition.read_page(Place { page: number, ..block.place }, &mut stored).unwrap());
        assert_eq!(stored, page(7));
    }
    assert_eq!(fill(&mut partition, &[7, 8])[0], Outcome::Known(block.place), "the first copy");
    let alike = vec![partition.secret.fingerprint(&page(7)); 30];
    assert_eq!(partition.lookup_run(&alike), Some(block), "as many as there are");
}

#[test]
fn neighbours_get_neighbours_and_a_page_always_the_same() {
    let mut partition = open(None);
    repeat(&mut partition, 7, 20);
    let block = copies(&partition, 7).unwrap();
    let places: Vec<Place> = (1000..1200).map(|number| block.copy_for(PageNumber(number))).collect();
    let mappings = places.chunk_by(|before, after| after.follows(*before)).count();
    assert_eq!(mappings, 10, "200 pages over 20 copies");
    assert!(places.iter().all(|place| place.page < 20));
}

#[test]
fn blocks_grow_by_doubling_and_no_further_than_a_segment() {
    let mut partition = open(None);
    let place = fill(&mut partition, &[6, 7, 8])[1].place().unwrap();
    let alone = copies(&partition, 7).unwrap();
    assert_eq!((alone.place, alone.pages, alone.copy_for(PageNumber(5))), (place, 1, place));
    for (wanted, there) in [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (9, 9), (1 << 20, 256), (1 << 21, 256)] {
        repeat(&mut partition, 7, wanted);
        assert_eq!(copies(&partition, 7).unwrap().pages, there, "{wanted} wanted");
    }
    assert!(partition.counters.pages_shared < 2 * 256 + 3);
    assert_eq!(partition.places.len(), 3, "a content is found once");
    let around: Vec<_> = [6, 7, 8].iter().map(|seed| partition.secret.fingerprint(&page(*seed))).collect();
    assert_eq!(partition.lookup_run(&around).unwrap().pages, 3, "its older place serves its neighbours");
}

#[test]
fn the_limit_is_kept_with_room_for_other_contents() {
    let mut partition = open(Some(10));
    assert!(repeat(&mut partition, 7, 100));
    assert_eq!(copies(&partition, 7).unwrap().pages, 5);
    assert!(repeat(&mut partition, 8, 100));
    assert_eq!(copies(&partition, 8).unwrap().pages, 2);
    assert!(!repeat(&mut partition, 9, 100));
    let filled = fill(&mut partition, &[9, 10, 11, 12, 7]);
    assert_eq!((filled[2].place().is_some(), filled[3], partition.counters.pages_shared), (true, Outcome::Full, 10));
}

#[test]
fn nothing_is_repeated_that_is_not_what_it_was() {
    let mut partition = open(None);
    let other = partition.secret.fingerprint(&page(8));
    assert!(!partition.repeat(other, &page(7), 4).unwrap());
    let zero = partition.secret.fingerprint(&page(0));
    assert!(!partition.repeat(zero, &page(0), 4).unwrap());
    // Page 1 lies in the store under the fingerprint of page 8.
    let file = make_file(1, std::iter::once(&*page(1))).unwrap();
    let segment = partition.enter(file, &[other]).unwrap();
    partition.insert_place(other, Place { segment, page: 0 });
    assert!(!partition.repeat(other, &page(8), 4).unwrap());
    assert_eq!(partition.counters.collisions, 1);
}

#[test]
fn a_block_goes_as_a_whole() {
    let mut partition = open(None);
    repeat(&mut partition, 7, 20);
    let block = copies(&partition, 7).unwrap();
    partition.report_use(block.place.segment, 3, Instant::now());
    let later = Instant::now() + Duration::from_secs(60);
    let dead: Vec<_> = partition.nearly_dead(25, later, Duration::from_secs(30)).collect();
    assert_eq!(dead.len(), 1, "few of its copies are used");
    assert!(partition.retire(block.place.segment));
    assert_eq!((copies(&partition, 7), partition.places.len()), (None, 0));
    assert_eq!(partition.counters.pages_shared, 0);
}

#[test]
fn strict_partitions_have_no_blocks() {
    let mut partition = Partition::open(Options { strict: true, ..Options::for_user(1) }).unwrap();
    assert!(!repeat(&mut partition, 7, 20));
    assert_eq!(partition.most_copies(), 1);
    fill(&mut partition, &[7, 7, 7]);
    let (found, alike) = (copies(&partition, 7).unwrap(), partition.secret.fingerprint(&page(7)));
    assert_eq!(found.pages, 1);
    assert_eq!(partition.lookup_run(&[alike; 3]).unwrap().pages, 3, "a run of equal pages is a run");
}
