//! What runs out in the broker ends a fill, not the process. Limits are the whole process's: one test, in a file of
//! its own.
#![allow(clippy::unwrap_used, reason = "tests")]

use kernel::page_size;
use pagefold_store::{FillBuffer, FillReport, FillRequest, Options, Outcome, Partition, StoreError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

fn page(seed: u32) -> Vec<u8> {
    vec![u8::try_from(seed + 1).unwrap(); page_size() as usize]
}

fn fill(partition: &mut Partition) -> FillReport {
    let requests: Vec<_> = (0..12)
        .map(|source| FillRequest {
            fingerprint: partition.secret().fingerprint(&page(source)),
            source,
            continues: true,
        })
        .collect();
    partition.fill(&mut FillBuffer::new(), &requests, |requests, reads| {
        for (slot, request) in requests.iter().enumerate() {
            reads.put(slot, &page(request.source));
        }
    })
}

fn open() -> Partition {
    Partition::open(Options { segment_pages: 4, ..Options::for_user(1) }).unwrap()
}

fn with_limit<T>(resource: Resource, current: u64, run: impl FnOnce() -> T) -> T {
    let before = getrlimit(resource);
    setrlimit(resource, Rlimit { current: Some(current), maximum: before.maximum }).unwrap();
    let result = run();
    setrlimit(resource, before).unwrap();
    result
}

#[test]
fn running_out_ends_the_fill_and_leaves_what_was_placed() {
    // Descriptors: two segments need one each and one more while they are made.
    let lowest = std::fs::File::open("/dev/null").unwrap();
    let open_now = std::os::fd::AsRawFd::as_raw_fd(&lowest) as u64;
    drop(lowest);
    let mut partition = open();
    let report = with_limit(Resource::Nofile, open_now + 2, || fill(&mut partition));
    let Some(StoreError::Make { pages: 4, .. }) = report.stopped else { panic!("{:?}", report.stopped) };
    let placed = report.outcomes.iter().filter(|outcome| outcome.place().is_some()).count();
    assert_eq!(placed, 4, "the first segment only: {:?}", report.outcomes);
    assert!(report.outcomes[4..].iter().all(|outcome| *outcome == Outcome::NotTried));
    assert_eq!((partition.counters().segments, partition.counters().filled), (1, 4));
    assert_eq!(partition.lookup(partition.secret().fingerprint(&page(5))), None);
    let again = fill(&mut partition);
    assert!(again.stopped.is_none());
    assert_eq!(
        again.outcomes[..4],
        report.outcomes[..4].iter().map(|o| Outcome::Known(o.place().unwrap())).collect::<Vec<_>>()
    );
    assert_eq!(partition.counters().filled, 12);

    // File size: an error, not SIGXFSZ.
    let mut partition = open();
    let report = with_limit(Resource::Fsize, 2 * page_size(), || fill(&mut partition));
    assert!(matches!(report.stopped, Some(StoreError::Make { .. })), "{:?}", report.stopped);
    assert_eq!(partition.counters().segments, 0);
    assert!(fill(&mut partition).stopped.is_none());
}
