#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::test_memory::{Anonymous, as_nobody, started_by_a_test};
use crate::uffd::{CreateFlags, Mode, Uffd, UffdFeatures};

/// Memory whose writes are tracked, or none where that does not work here.
fn tracked(pages: u64) -> Option<(Anonymous, Uffd, Pagemap)> {
    let uffd = Uffd::create(CreateFlags::empty()).and_then(|uffd| uffd.api(UffdFeatures::WP_ASYNC).map(|_| uffd));
    let uffd = match uffd {
        Ok(uffd) => uffd,
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    let memory = Anonymous::new(PageCount(pages));
    memory.advise(rustix::mm::Advice::LinuxNoHugepage);
    memory.fill(1);
    uffd.register(memory.range(), Mode::WP).unwrap();
    Some((memory, uffd, Pagemap::open(Pid::this()).unwrap()))
}

#[test]
fn written_pages_are_collected_once() {
    let Some((memory, _uffd, pagemap)) = tracked(64) else { return };
    let mut found = Vec::new();
    let request = ScanRequest::collect_written();
    pagemap.scan_all(memory.range(), &request, &mut found).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].range, memory.range());
    pagemap.scan_all(memory.range(), &request, &mut found).unwrap();
    assert_eq!(found, []);
    for page in [3, 4, 40] {
        memory.write(page * page_size(), 2);
    }
    pagemap.scan_all(memory.range(), &request, &mut found).unwrap();
    let ranges: Vec<_> = found.iter().map(|region| region.range).collect();
    let run = Range::new(memory.page(3).start(), memory.page(4).end()).unwrap();
    assert_eq!(ranges, [run, memory.page(40)]);
}

#[test]
fn protecting_alone_starts_tracking() {
    let Some((memory, _uffd, pagemap)) = tracked(64) else { return };
    pagemap.protect(memory.range()).unwrap();
    assert!(pagemap.entry(memory.page(5).start()).unwrap().uffd_wp());
    memory.write(5 * page_size(), 2);
    assert!(!pagemap.entry(memory.page(5).start()).unwrap().uffd_wp());
    let mut found = Vec::new();
    pagemap.scan_all(memory.range(), &ScanRequest::collect_written(), &mut found).unwrap();
    assert_eq!(found.iter().map(|region| region.range).collect::<Vec<_>>(), [memory.page(5)]);
}

#[test]
fn a_small_buffer_stops_the_scan_where_it_can_go_on() {
    let Some((memory, _uffd, pagemap)) = tracked(64) else { return };
    pagemap.protect(memory.range()).unwrap();
    for page in (0..64).step_by(2) {
        memory.write(page * page_size(), 2);
    }
    let request = ScanRequest { mask: Category::WRITTEN, ret: Category::WRITTEN, ..ScanRequest::default() };
    let mut some = Vec::with_capacity(5);
    let (mut rest, mut seen) = (memory.range(), 0);
    while !rest.is_empty() {
        let end = pagemap.scan(rest, &request, &mut some).unwrap();
        assert!(some.len() <= some.capacity());
        seen += some.len();
        rest = Range::new(end.walk_end, rest.end()).unwrap();
    }
    assert_eq!(seen, 32);
    let mut all = Vec::new();
    pagemap.scan_all(memory.range(), &request, &mut all).unwrap();
    assert_eq!(all.len(), 32);
    let limited = ScanRequest { max_pages: PageCount(3), ..request };
    pagemap.scan(memory.range(), &limited, &mut some).unwrap();
    assert_eq!(some.len(), 3);
    assert!(matches!(pagemap.scan(memory.range(), &request, &mut Vec::new()), Err(PagemapError::NoRoom)));
}

#[test]
fn windows_leave_no_seams() {
    let Some((memory, _uffd, pagemap)) = tracked(3 * SCAN_WINDOW.pages().0 + 5) else { return };
    let mut found = Vec::new();
    pagemap.scan_all(memory.range(), &ScanRequest::collect_written(), &mut found).unwrap();
    assert_eq!(found.iter().map(|region| region.range).collect::<Vec<_>>(), [memory.range()]);
}

#[test]
fn memory_that_is_not_registered_is_an_outcome_of_its_own() {
    let memory = Anonymous::new(PageCount(8));
    memory.fill(1);
    let pagemap = Pagemap::open(Pid::this()).unwrap();
    let mut found = Vec::new();
    let result = pagemap.scan_all(memory.range(), &ScanRequest::collect_written(), &mut found);
    assert!(matches!(result, Err(PagemapError::NotTracked { .. } | PagemapError::NotSupported)), "{result:?}");
    let present = ScanRequest { mask: Category::PRESENT, ret: Category::all(), ..ScanRequest::default() };
    let unknown = pagemap.scan_all(memory.range(), &present, &mut found);
    assert!(matches!(unknown, Err(PagemapError::Scan { .. } | PagemapError::NotSupported)), "{unknown:?}");
}

#[test]
fn entries_of_pages_there_and_not_there() {
    let memory = Anonymous::new(PageCount(4));
    memory.write(page_size(), 1);
    let pagemap = Pagemap::open(Pid::this()).unwrap();
    let mut entries = [PagemapEntry(0); 4];
    assert_eq!(pagemap.entries(memory.range().start(), &mut entries).unwrap(), 4);
    assert!(!entries[0].present() && entries[0].pfn().is_none());
    assert!(entries[1].present() && entries[1].exclusive() && !entries[1].file_or_shared() && !entries[1].swapped());
    if rustix::process::geteuid().is_root() {
        assert!(entries[1].pfn().is_some());
    }
    let code = Vaddr(entries_of_pages_there_and_not_there as fn() as usize as u64);
    assert!(pagemap.entry(code).unwrap().file_or_shared());
}

#[test]
fn a_process_that_ends_takes_its_pages_with_it() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let pid = Pid(child.id().cast_signed());
    let maps = crate::maps::read(pid).unwrap();
    let pagemap = Pagemap::open(pid).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let mut entries = [PagemapEntry(0); 4];
    assert_eq!(pagemap.entries(maps[0].range.start(), &mut entries).unwrap(), 0);
    let mut found = Vec::new();
    let present = ScanRequest { mask: Category::PRESENT, ret: Category::PRESENT, ..ScanRequest::default() };
    assert!(pagemap.scan_all(maps[0].range, &present, &mut found).unwrap_err().is_gone());
    assert!(matches!(Pagemap::open(pid), Err(PagemapError::Gone { .. })));
}

#[test]
fn another_users_pagemap_is_refused_and_frames_are_hidden() {
    if !as_nobody("pagemap::tests::body_as_another_user") {
        println!("skipped: root, or a test binary that everybody may execute");
    }
}

#[test]
#[ignore = "runs as another user, started by the test above"]
fn body_as_another_user() {
    if !started_by_a_test() {
        return;
    }
    assert!(matches!(Pagemap::open(Pid(1)), Err(PagemapError::Open { .. })));
    let memory = Anonymous::new(PageCount(1));
    memory.fill(1);
    let entry = Pagemap::open(Pid::this()).unwrap().entry(memory.range().start()).unwrap();
    assert!(entry.present() && entry.pfn().is_none());
}

/// Seen to fail: with room for more than 512 regions in a call, regions came twice.
#[test]
fn many_regions_of_one_window_come_once_each() {
    let memory = Anonymous::new(PageCount(6000));
    memory.advise(rustix::mm::Advice::LinuxNoHugepage);
    for page in (0..6000).step_by(2) {
        memory.write(page * page_size(), 1);
    }
    let pagemap = Pagemap::open(Pid::this()).unwrap();
    let present = ScanRequest { mask: Category::PRESENT, ret: Category::PRESENT, ..ScanRequest::default() };
    for capacity in [0, 100, 1024, 5000] {
        let mut regions = Vec::with_capacity(capacity);
        match pagemap.scan_all(memory.range(), &present, &mut regions) {
            Err(PagemapError::NotSupported) => return println!("skipped: PAGEMAP_SCAN"),
            result => result.unwrap(),
        }
        assert_eq!(regions.len(), 3000, "with room for {capacity}");
        assert!(regions.is_sorted_by_key(|region| region.range.start()));
        assert!(regions.iter().all(|region| region.range.pages() == PageCount(1)));
    }
}
