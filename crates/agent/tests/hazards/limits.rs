//! V5, C5, C6, D7: limits, holes, and the number of mappings.

use crate::stand::Stand;
use crate::victim::{Region, Victim, errno, merge_now, merged_pair, page, tell};

pub(crate) const VICTIMS: &[Victim] = &[
    ("address_space", address_space),
    ("few_descriptors", few_descriptors),
    ("small_files", small_files),
    ("holes", holes),
    ("heap_chunk", heap_chunk),
    ("many_maps", many_maps),
    ("one_mapping_each", one_mapping_each),
];

const PAGES: usize = 24;

pub(crate) fn set_limit(resource: libc::__rlimit_resource_t, value: u64) {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the kernel reads the limit.
    assert_eq!(unsafe { libc::setrlimit(resource, &raw const limit) }, 0);
}

/// Sets what can be raised again; returns what it was.
pub(crate) fn set_soft_limit(resource: libc::__rlimit_resource_t, soft: u64) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes the limit and reads it.
    unsafe {
        assert_eq!(libc::getrlimit(resource, &raw mut limit), 0);
        let before = limit.rlim_cur;
        limit.rlim_cur = soft;
        assert_eq!(libc::setrlimit(resource, &raw const limit), 0);
        before
    }
}

/// At exactly RLIMIT_AS the program's calls work as without merging.
fn address_space() {
    let (one, two) = merged_pair(PAGES, 50);
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split(' ').next().unwrap().parse().unwrap();
    set_limit(libc::RLIMIT_AS, pages * page() as u64);
    one.fill_from(80);
    two.fill_from(80);
    for _ in 0..5 {
        merge_now();
    }
    one.check_from(80);
    assert_eq!(one.part(2, 6).advise(libc::MADV_DONTNEED), 0);
    one.part(2, 6).check_zero();
    one.part(8, 12).unmap();
    two.check_from(80);
    two.unmap();
}

/// RLIMIT_AS: merging at the limit fails nothing.
#[test]
fn limit_of_the_address_space() {
    let stand = Stand::on_request();
    stand.run("address_space");
    stand.assert_merged(PAGES as u64);
}

/// A soft and hard limit of few descriptors.
fn few_descriptors() {
    set_limit(libc::RLIMIT_NOFILE, 8);
    let (one, two) = merged_pair(PAGES, 50);
    // All of them are the program's.
    let files: Vec<_> = (3..8).map_while(|_| std::fs::File::open("/dev/null").ok()).collect();
    assert_eq!(files.len(), 5);
    drop(files);
    one.check_from(50);
    two.check_from(50);
}

/// RLIMIT_NOFILE: the program's descriptors are all its own.
#[test]
fn limit_of_descriptors() {
    let stand = Stand::on_request();
    stand.run("few_descriptors");
    stand.assert_merged(PAGES as u64);
}

/// No file may be larger than a page.
fn small_files() {
    set_limit(libc::RLIMIT_FSIZE, page() as u64);
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(50);
    two.fill_from(50);
    one.mergeable();
    two.mergeable();
    for _ in 0..5 {
        merge_now();
    }
    one.check_from(50);
    two.check_from(50);
    tell(&format!("{} merged", one.merged()));
}

/// C5: RLIMIT_FSIZE does not kill the program.
#[test]
fn c5_limit_of_file_sizes() {
    let stand = Stand::on_request();
    stand.run("small_files");
}

/// Holes stay holes, and pages that a child shares are not copied.
fn holes() {
    let (one, two) = (Region::map(512), Region::map(512));
    (0..512).step_by(8).for_each(|index| {
        one.fill(index, 50 + index as u64);
        two.fill(index, 50 + index as u64);
    });
    let resident = || {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
    };
    // A fork, so that pages have to be made exclusive.
    reap_child();
    let before = resident();
    one.mergeable();
    two.mergeable();
    for _ in 0..20 {
        merge_now();
    }
    assert!(one.merged() >= 32, "{} merged", one.merged());
    let after = resident();
    assert!(after <= before + 160, "{before} KiB grew to {after} KiB");
    (0..512).for_each(|index| {
        let seed = if index % 8 == 0 { 50 + index as u64 } else { 0 };
        assert!(one.holds(index, seed), "page {index}");
    });
}

fn reap_child() {
    crate::victim::reap(crate::victim::fork(|| {}));
}

/// C6: holes are not populated, and nothing is allocated for preparation.
#[test]
fn c6_holes_stay_holes() {
    let stand = Stand::on_request();
    stand.run("holes");
    stand.assert_merged(32);
}

/// realloc of a merged chunk that malloc had mapped.
fn heap_chunk() {
    let bytes = 64 * page();
    let twin = Region::map(256);
    twin.fill_from(500);
    twin.mergeable();
    // SAFETY: a chunk of malloc's, large enough to be a mapping; written within its bounds.
    unsafe {
        let mut chunk = libc::malloc(bytes).cast::<u8>();
        for round in 1..6 {
            let size = bytes * round;
            let start = (chunk as usize).next_multiple_of(page());
            let region = Region { start, pages: (chunk as usize + size - start) / page() };
            region.fill_from(500);
            region.mergeable();
            for _ in 0..3 {
                merge_now();
            }
            let bigger = libc::realloc(chunk.cast(), bytes * (round + 1)).cast::<u8>();
            assert!(!bigger.is_null(), "realloc: {}", std::io::Error::last_os_error());
            let offset = start - chunk as usize;
            let moved = Region { start: bigger as usize + offset, pages: region.pages };
            moved.check_from(500);
            // What is new reads as zeros or is left from the allocator; never as the store's next pages.
            let behind = Region { start: moved.end(), pages: 60 };
            (0..behind.pages).for_each(|index| assert!(behind.holds(index, 0), "page {index} behind the old end"));
            chunk = bigger;
        }
        let smaller = libc::realloc(chunk.cast(), bytes).cast::<u8>();
        let start = (smaller as usize).next_multiple_of(page());
        Region { start, pages: 60 }.check_from(500);
        libc::free(smaller.cast());
    }
    twin.check_from(500);
}

/// D7, f12: realloc of merged memory grows into zeros.
#[test]
fn d7_realloc() {
    let stand = Stand::on_request();
    stand.run("heap_chunk");
    stand.assert_merged(100);
}

/// The program needs nearly as many mappings as it may have.
fn many_maps() {
    let limit: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if limit > 70_000 {
        println!("skipped: vm.max_map_count is too large to be reached here");
        return;
    }
    // Merged pages that cannot join: every other one has no twin.
    const MERGED: usize = 4000;
    let (one, two) = (Region::map(MERGED), Region::map(MERGED));
    (0..MERGED).for_each(|index| {
        one.fill(index, if index % 2 == 0 { 500 + index as u64 } else { 100_000 + index as u64 });
        two.fill(index, if index % 2 == 0 { 500 + index as u64 } else { 200_000 + index as u64 });
    });
    one.mergeable();
    two.mergeable();
    merge_now();
    merge_now();
    assert!(one.merged() > 100, "{} merged", one.merged());
    let used = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    assert!(used < limit * 4 / 5, "{used} of {limit} mappings");
    // What a program can do beside that: a fifth of the limit.
    let own = Region::map(limit / 6);
    for index in (0..own.pages).step_by(2) {
        assert_eq!(own.part(index, index + 1).protect(libc::PROT_READ), 0, "page {index}: {}", errno());
    }
    own.unmap();
    one.unmap();
    two.unmap();
}

/// V5: the program's own calls have mappings left.
#[test]
fn v5_many_mappings() {
    let stand = Stand::on_request();
    stand.run("many_maps");
}

/// Pages that are mappings of their own once they are merged, since their neighbours lie elsewhere in the store: every
/// other page first, which cuts the rest to pieces, then those in between.
fn one_mapping_each() {
    let (one, two) = (Region::map(SCATTERED), Region::map(SCATTERED));
    let seed = |index: usize| 500 + (index * 7 % SCATTERED) as u64;
    one.mergeable();
    two.mergeable();
    for odd in [0, 1] {
        (0..SCATTERED).filter(|index| seed(*index) % 2 == odd).for_each(|index| two.fill(index, seed(index)));
        (0..SCATTERED)
            .filter(|index| (500 + *index as u64) % 2 == odd)
            .for_each(|index| one.fill(index, 500 + index as u64));
        merge_now();
    }
    assert!(one.merged() + 1 >= SCATTERED && two.merged() + 1 >= SCATTERED, "{} merged", two.merged());
    let used = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    assert!(used > SCATTERED, "{used} mappings: the pages lie side by side");
}

/// Pages of [`one_mapping_each`]; no multiple of 7.
const SCATTERED: usize = 900;

/// V5: a run between two that are merged already adds no mapping. The budget is counted again, not only added up: the
/// sum of what each run could add is twice what they need here.
#[test]
fn the_budget_of_mappings_is_counted_again() {
    let settings = broker::Settings { vmas: 2 * SCATTERED as u64 + 200, ..broker::Settings::default() };
    let stand = Stand::with(settings);
    stand.run("one_mapping_each");
    stand.assert_merged(2 * SCATTERED as u64 - 2);
}
