//! Filling from processes: pages that are there, pages that are not, processes that are gone.
#![allow(clippy::unwrap_used, reason = "tests")]

use kernel::{Pid, page_size};
use page::PageNumber;
use pagefold_store::{FillBuffer, FillRequest, Options, Outcome, Partition, ProcessPage, read_processes};

#[test]
fn what_cannot_be_read_stays_out_and_the_rest_keeps_its_order() {
    let size = page_size() as usize;
    let mut partition = Partition::open(Options::for_user(1)).unwrap();
    // Nine pages in a row somewhere inside this, each of its own content.
    let mut memory = vec![0_u8; 10 * size];
    let first = PageNumber((memory.as_ptr() as u64).div_ceil(page_size()));
    let offset = (first.address(page_size()) - memory.as_ptr() as u64) as usize;
    for number in 0..9 {
        memory[offset + number * size] = number as u8 + 1;
    }
    let fingerprint = |number: usize| partition.secret().fingerprint(&memory[offset + number * size..][..size]);
    let own = |number: usize| ProcessPage { pid: Pid::this(), page: first.offset(number as u64) };
    let nowhere = ProcessPage { pid: Pid::this(), page: PageNumber(0) };
    let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
    let gone = ProcessPage { pid: Pid(i32::try_from(child.id()).unwrap()), page: first };
    child.wait().unwrap();

    // Neighbours, a jump back, holes between and in a row, a dead process between, the last page twice.
    let wanted = [
        (own(0), 0),
        (own(1), 1),
        (own(2), 2),
        (nowhere, 3),
        (nowhere, 3),
        (own(8), 8),
        (own(4), 4),
        (gone, 5),
        (own(5), 5),
        (own(6), 7),
        (own(8), 8),
    ];
    let requests: Vec<_> = wanted
        .iter()
        .map(|(source, content)| FillRequest { fingerprint: fingerprint(*content), source: *source, continues: false })
        .collect();
    let report = partition.fill(&mut FillBuffer::new(), &requests, read_processes);
    assert!(report.stopped.is_none());
    let segment = report.outcomes[0].place().unwrap().segment;
    let placed = |page| Outcome::Placed(page::Place { segment, page });
    assert_eq!(
        report.outcomes,
        [
            placed(0),
            placed(1),
            placed(2),
            Outcome::Unread,
            Outcome::Unread,
            placed(3),
            placed(4),
            Outcome::Unread,
            placed(5),
            Outcome::Changed,
            Outcome::Known(page::Place { segment, page: 3 }),
        ]
    );
    let mut buffer = vec![0; size];
    for (outcome, (_, content)) in report.outcomes.iter().zip(wanted) {
        if let Some(place) = outcome.place() {
            assert!(partition.read_page(place, &mut buffer).unwrap());
            assert_eq!(buffer, memory[offset + content * size..][..size]);
        }
    }
    let counters = partition.counters();
    assert_eq!((counters.unread, counters.hash_mismatch, counters.filled, counters.known), (3, 1, 6, 1));
}
