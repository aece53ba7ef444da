//! What cannot be brought about from outside: two contents of one fingerprint.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::partition::Options;

fn page(seed: u8) -> Vec<u8> {
    vec![seed; page_bytes()]
}

#[test]
fn a_fingerprint_never_stands_for_a_page() {
    let mut partition = Partition::open(Options::for_user(1)).unwrap();
    let fingerprint = partition.secret.fingerprint(&page(2));
    // Page 1 lies in the store under the fingerprint of page 2.
    let file = make_file(1, std::iter::once(&*page(1))).unwrap();
    let segment = partition.segments.add(file, &[fingerprint], 0).unwrap();
    let place = Place { segment, page: 0 };
    partition.places.insert_unique(fingerprint.low(), place, |_| fingerprint.low());

    let request = FillRequest { fingerprint, source: (), continues: false };
    let report = partition.fill(&mut FillBuffer::new(), &[request], |_, reads| reads.put(0, &page(2)));
    assert_eq!(report.outcomes, [Outcome::Collision]);
    assert_eq!((partition.counters().collisions, partition.counters().known), (1, 0));
}

#[test]
fn nor_within_one_round() {
    let mut partition = Partition::open(Options::for_user(1)).unwrap();
    let fingerprint = partition.secret.fingerprint(&page(2));
    let mut buffer = FillBuffer::new();
    let mut reads = buffer.prepare(3);
    reads.put(0, &page(1));
    reads.put(1, &page(2));
    reads.put(2, &page(2));
    buffer.seen.insert(fingerprint, 0);
    let verdict = partition.judge(&mut buffer, 1, fingerprint).unwrap();
    assert!(matches!(verdict, Verdict::Done(Outcome::Collision)));
    buffer.seen.insert(fingerprint, 1);
    assert!(matches!(partition.judge(&mut buffer, 2, fingerprint).unwrap(), Verdict::Same(1)));
}

#[test]
fn a_strict_run_is_compared_too() {
    let mut partition = Partition::open(Options { strict: true, ..Options::for_user(1) }).unwrap();
    let fingerprint = partition.secret.fingerprint(&page(2));
    let file = make_file(1, std::iter::once(&*page(1))).unwrap();
    let segment = partition.segments.add(file, &[fingerprint], 0).unwrap();
    partition.places.insert_unique(fingerprint.low(), Place { segment, page: 0 }, |_| fingerprint.low());
    let request = FillRequest { fingerprint, source: (), continues: false };
    let report = partition.fill(&mut FillBuffer::new(), &[request], |_, reads| reads.put(0, &page(2)));
    assert_eq!(report.outcomes, [Outcome::Collision]);
}
