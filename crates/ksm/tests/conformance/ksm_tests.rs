//! The cases of tools/testing/selftests/mm/ksm_tests.c, each with marks by madvise and by the prctl.

use kernel::status::vmstat;
use pagefold_ksm::Wanted;

use super::stand::{Host, expected};
use super::worker::{HUGEPAGE, MERGEABLE, Memory, UNMERGEABLE, Worker};

/// Both ways of marking: a worker, and whether its memory needs a mark of its own.
const MARKS: [bool; 2] = [true, false];

fn worker(madvise: bool) -> Worker {
    Worker::with_merging(!madvise)
}

/// The prctl marks all of python, of which equal pages are merged too: only what is of the area counts then.
fn merged(host: &Host, lease: pagefold_ksm::Lease, worker: &Worker, area: Memory, madvise: bool) -> (u64, u64) {
    let counted = host.settled(lease);
    let vmas = kernel::smaps::read(worker.pid()).unwrap();
    let of_area: u64 = vmas
        .iter()
        .filter(|vma| vma.vma.range.intersect(&area.range()).is_some())
        .map(|vma| vma.memory.ksm.pages().get())
        .sum();
    assert!(of_area <= area.pages || !madvise);
    if madvise { counted } else { (counted.0.min(of_area), of_area) }
}

/// `-M`: equal pages are merged, as many copies as `max_page_sharing` asks for.
#[test]
fn ksm_merging() {
    let Some(host) = Host::lock_alone() else { return };
    for pages in [10, 512, 513, 520] {
        let mut worker = worker(true);
        let area = worker.map(pages, b'*', true);
        let lease = host.merge(Wanted::default());
        host.scans(2);
        assert_eq!(merged(&host, lease, &worker, area, true), expected(pages, 256), "{pages} pages");
        assert!(worker.check(area, b'*', b'*'));
        drop(worker);
        host.unmerge();
    }
    // By the prctl: each of the ten is merged.
    let mut worker = worker(false);
    let area = worker.map(10, b'*', false);
    let lease = host.merge(Wanted::default());
    host.scans(2);
    assert_eq!(merged(&host, lease, &worker, area, false).1, 10);
}

/// `-U`: two merged pages that are written to are two again.
#[test]
fn ksm_unmerging() {
    let Some(host) = Host::lock_alone() else { return };
    let mut worker = worker(true);
    let area = worker.map(2, b'*', true);
    let lease = host.merge(Wanted::default());
    host.scans(2);
    assert_eq!((host.counters().pages_shared, host.counters().pages_sharing), (1, 1));
    worker.touch(area.part(0, 1), 1);
    worker.touch(area.part(1, 1), 2);
    host.scans(1);
    assert_eq!(merged(&host, lease, &worker, area, true), (0, 0));
}

/// `-Z -z 0` and `-z 1`: pages of zeros are merged as others are, or become the zero page and are in neither counter.
#[test]
fn zero_page_merging() {
    let Some(host) = Host::lock_alone() else { return };
    for (use_zero_pages, shared, zero) in [(false, expected(10, 256), 0), (true, (0, 0), 10)] {
        let before = host.zero_pages();
        let mut worker = worker(true);
        let area = worker.map(10, 0, true);
        let lease = host.merge(Wanted { use_zero_pages: Some(use_zero_pages), ..Wanted::default() });
        host.scans(2);
        assert_eq!(merged(&host, lease, &worker, area, true), shared, "use_zero_pages {use_zero_pages}");
        assert_eq!(worker.stat().ksm_zero_pages, Some(zero));
        assert_eq!(host.zero_pages() - before, zero.cast_signed());
        drop(worker);
        host.unmerge();
    }
}

/// `-P` and `-H`: much memory, in small and in large pages; two passes end, and all of it is merged in the end.
#[test]
fn ksm_merge_time() {
    let Some(host) = Host::lock_alone() else { return };
    for huge in [false, true] {
        for madvise in MARKS {
            let mut worker = worker(madvise);
            let area = worker.map(16 << 8, 0, false);
            if huge {
                worker.advise(area, HUGEPAGE);
            }
            worker.fill(area, b'*');
            if madvise {
                worker.advise(area, MERGEABLE);
            }
            let lease = host.merge(Wanted::default());
            host.scans(2);
            // Large pages are split in the first pass that finds equals in them.
            host.scans(if huge { 3 } else { 0 });
            let (_, sharing) = merged(&host, lease, &worker, area, madvise);
            assert!(sharing >= area.pages - area.pages / 256 - 1, "huge {huge}, madvise {madvise}: {sharing}");
            assert!(worker.check(area, b'*', b'*'));
            drop(worker);
            host.unmerge();
        }
    }
}

/// `-D`: a merged area is unmerged by MADV_UNMERGEABLE.
#[test]
fn ksm_unmerge_time() {
    let Some(host) = Host::lock_alone() else { return };
    let mut worker = worker(true);
    let area = worker.map(16 << 8, b'*', true);
    let lease = host.merge(Wanted::default());
    host.scans(2);
    assert!(worker.stat().ksm_merging_pages.unwrap() == area.pages);
    // Without anybody to scan ksmd sleeps, and the counters are corrected by its next pass only.
    worker.map(1, b'+', true);
    worker.advise(area, UNMERGEABLE);
    host.scans(1);
    assert_eq!(host.settled(lease), (0, 0));
    assert_eq!(worker.stat().ksm_merging_pages, Some(0));
    assert!(worker.check(area, b'*', b'*'));
}

/// `-C`: writing to 4000 pages that are merged in pairs copies each of them, and writing to others none.
#[test]
fn ksm_cow_time() {
    let Some(host) = Host::lock_alone() else { return };
    let mut worker = worker(true);
    let area = worker.map(4000, 0, false);
    worker.ask(&format!("pairs {} {}", area.start, area.pages));
    let copied = || vmstat("cow_ksm").unwrap().unwrap();
    let first = copied();
    worker.touch(area, b' ');
    assert_eq!(copied(), first, "nothing is merged yet");
    worker.advise(area, MERGEABLE);
    let lease = host.merge(Wanted::default());
    host.scans(2);
    assert_eq!(merged(&host, lease, &worker, area, true), (2000, 2000));
    let first = copied();
    worker.touch(area, b' ');
    assert_eq!(copied() - first, 4000);
}
