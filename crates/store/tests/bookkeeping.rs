//! What a shared page costs in records: 64 bytes at most, whatever the partition and however full its tables.
#![allow(clippy::unwrap_used, reason = "tests")]

use kernel::page_size;
use pagefold_store::{FillBuffer, FillRequest, Options, Partition};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Bytes a page at worst, from `from` pages on, while `pages` are filled in runs of `run`.
fn worst(strict: bool, run: u32, from: u64, pages: u32) -> f64 {
    let mut partition = Partition::open(Options { strict, ..Options::for_user(1) }).unwrap();
    let mut buffer = FillBuffer::new();
    let mut page = vec![0; page_size() as usize];
    let mut worst: f64 = 0.0;
    for start in (0..pages).step_by(256) {
        let requests: Vec<_> = (start..start + 256)
            .map(|source| {
                page[..4].copy_from_slice(&(source + 1).to_ne_bytes());
                let fingerprint = partition.secret().fingerprint(&page);
                FillRequest { fingerprint, source, continues: source % run != 0 }
            })
            .collect();
        let report = partition.fill(&mut buffer, &requests, |requests, reads| {
            for (slot, request) in requests.iter().enumerate() {
                page[..4].copy_from_slice(&(request.source + 1).to_ne_bytes());
                reads.put(slot, &page);
            }
        });
        assert!(report.stopped.is_none(), "{:?}", report.stopped);
        let filled = partition.counters().pages_shared;
        assert_eq!(filled, u64::from(start) + 256);
        if filled >= from {
            worst = worst.max(partition.bookkeeping().0 as f64 / filled as f64);
        }
    }
    worst
}

#[test]
fn records_go_with_their_segments() {
    let mut partition = Partition::open(Options { segment_pages: 16, ..Options::for_user(1) }).unwrap();
    let mut page = vec![0; page_size() as usize];
    let mut largest = 0;
    for round in 0..64_u32 {
        let requests: Vec<_> = (round * 512..(round + 1) * 512)
            .map(|source| {
                page[..4].copy_from_slice(&(source + 1).to_ne_bytes());
                FillRequest { fingerprint: partition.secret().fingerprint(&page), source, continues: true }
            })
            .collect();
        let report = partition.fill(&mut FillBuffer::new(), &requests, |requests, reads| {
            for (slot, request) in requests.iter().enumerate() {
                page[..4].copy_from_slice(&(request.source + 1).to_ne_bytes());
                reads.put(slot, &page);
            }
        });
        largest = largest.max(partition.bookkeeping().0);
        let mut segments: Vec<_> = report.outcomes.iter().map(|outcome| outcome.place().unwrap().segment).collect();
        segments.dedup();
        assert!(segments.into_iter().all(|segment| partition.retire(segment)));
    }
    println!("{largest} bytes at most while 512 pages at a time came and went 64 times");
    assert!(largest <= 512 * 64, "{largest}");
    assert!(partition.bookkeeping().0 <= 4096, "{}", partition.bookkeeping());
    assert_eq!(partition.counters().pages_retired, 64 * 512);
}

#[test]
fn a_shared_page_costs_64_bytes_at_most() {
    let packed = worst(false, 256, 4096, 32_768);
    println!("packed: {packed:.1} bytes a page at worst");
    assert!(packed <= 64.0, "{packed}");
    let runs = worst(true, 16, 4096, 16_384);
    println!("strict, runs of 16: {runs:.1}");
    assert!(runs <= 64.0, "{runs}");
    // Lone pages need a descriptor each.
    let wanted = 8192 + 100;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < wanted) {
        let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
        if setrlimit(Resource::Nofile, raised).is_err() {
            println!("skipped: strict lone pages need {wanted} descriptors");
            return;
        }
    }
    let lone = worst(true, 1, 2048, 8192);
    println!("strict, lone pages: {lone:.1}");
    assert!(lone <= 64.0, "{lone}");
}
