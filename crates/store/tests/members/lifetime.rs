//! Space comes back when the last mapping goes, no sooner and no later.

use std::time::{Duration, Instant};

use crate::member::{Member, NOBODY};
use kernel::{Bytes, page_size};
use pagefold_store::{FillBuffer, FillRequest, HandOut, NearlyDead, Options, Outcome, Partition, Place, SegmentId};

fn page(seed: u32) -> Vec<u8> {
    let mut page = vec![0; page_size() as usize];
    page[..4].copy_from_slice(&(seed + 1).to_ne_bytes());
    page
}

fn fill(partition: &mut Partition, seeds: std::ops::Range<u32>) -> Vec<Place> {
    let requests: Vec<_> = seeds
        .map(|source| FillRequest {
            fingerprint: partition.secret().fingerprint(&page(source)),
            source,
            continues: true,
        })
        .collect();
    let report = partition.fill(&mut FillBuffer::new(), &requests, |requests, reads| {
        for (slot, request) in requests.iter().enumerate() {
            reads.put(slot, &page(request.source));
        }
    });
    assert!(report.stopped.is_none(), "{:?}", report.stopped);
    report.outcomes.iter().filter_map(Outcome::place).collect()
}

fn member_of(partition: &Partition, segment: SegmentId) -> Option<Member> {
    match partition.hand_out(segment, partition.options().uid, |_| true) {
        HandOut::File { file, .. } => Member::start(partition.options().uid, "hold", file),
        other => panic!("{other:?}"),
    }
}

fn shmem() -> Bytes {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Shmem:")).unwrap();
    Bytes::from_kib(line.trim().trim_end_matches(" kB").parse().unwrap())
}

/// One life of a segment and what the host's Shmem was at each of its stages.
fn one_life(uid: u32, pages: u32) -> Option<[Bytes; 5]> {
    let mut partition = Partition::open(Options { segment_pages: pages, ..Options::for_user(uid) }).unwrap();
    let before = shmem();
    let segment = fill(&mut partition, 0..pages)[0].segment;
    let filled = shmem();
    let mut member = member_of(&partition, segment)?;
    let (name, sum) = member.answer().unwrap();
    assert_eq!(name, "touched");
    assert_eq!(member.answer().unwrap().0, "mapped");
    assert!(partition.retire(segment));
    let retired = shmem();
    // Now the mapping is all that holds it.
    member.go_on();
    assert_eq!(member.answer().unwrap().0, "closed");
    let mapped = shmem();
    member.go_on();
    assert_eq!(member.finish()["held"], sum, "retired under its mapping, and every page still reads the same");
    let after = shmem();
    Some([before, filled, retired, mapped, after])
}

#[test]
fn space_comes_back_when_the_last_mapping_goes() {
    const PAGES: u32 = 16_384;
    let uid = if rustix::process::geteuid().is_root() { NOBODY } else { rustix::process::geteuid().as_raw() };
    let size = Bytes(u64::from(PAGES) * page_size());
    // Shmem is the whole host's: lives are repeated until one falls into a quiet moment. Even then it lags behind by
    // what each CPU has not yet added, 125 pages at most (mm/vmstat.c).
    let cpus = std::thread::available_parallelism().unwrap().get() as u64;
    let lag = 2 * 125 * cpus * page_size();
    assert!(size.0 > 10 * lag, "or the test could not fail");
    let near = |one: Bytes, other: Bytes| one.0.abs_diff(other.0) <= lag;
    let mut seen = Vec::new();
    for _ in 0..60 {
        let Some(life) = one_life(uid, PAGES) else { return };
        let [before, filled, retired, mapped, after] = life;
        if near(filled, before + size) && near(retired, filled) && near(mapped, filled) && near(after, before) {
            println!("Shmem: {life:?}");
            return;
        }
        seen.push(life);
        std::thread::sleep(Duration::from_millis(500));
    }
    panic!("never as it should be: {seen:?}");
}

#[test]
fn segments_that_nobody_maps_go_after_a_time() {
    let mut partition = Partition::open(Options { segment_pages: 4, ..Options::for_user(NOBODY) }).unwrap();
    let places = fill(&mut partition, 0..12);
    let [first, second, third] = [places[0].segment, places[4].segment, places[8].segment];
    let opened = Instant::now();
    let grace = Duration::from_secs(10);
    assert!(partition.report_use(first, 4, opened));
    assert!(partition.report_use(second, 1, opened));
    assert_eq!(partition.reclaim(opened, grace).segments, 0, "freshly filled");

    // The third is never used; the second loses its last mapping later.
    let later = opened + Duration::from_secs(11);
    assert!(partition.report_use(second, 0, later));
    let reclaimed = partition.reclaim(later, grace);
    assert_eq!((reclaimed.segments, reclaimed.pages), (1, 4));
    assert!(partition.fingerprints(third).is_none() && partition.fingerprints(second).is_some());
    assert_eq!(partition.lookup(partition.secret().fingerprint(&page(9))), None);

    let much_later = later + Duration::from_secs(11);
    assert_eq!(partition.reclaim(much_later, grace).segments, 1);
    assert!(!partition.report_use(second, 3, much_later), "retired");
    assert_eq!(partition.reclaim(much_later + grace, grace).segments, 0, "the first is in use");
    let counters = partition.counters();
    assert_eq!((counters.segments, counters.retired, counters.pages_shared, counters.pages_retired), (1, 2, 4, 8));
}

#[test]
fn survivors_of_a_nearly_dead_segment_can_be_moved() {
    let mut partition = Partition::open(Options { segment_pages: 8, ..Options::for_user(NOBODY) }).unwrap();
    let places = fill(&mut partition, 0..16);
    let [old, other] = [places[0].segment, places[8].segment];
    let now = Instant::now();
    let later = now + Duration::from_secs(60);
    partition.report_use(old, 3, now);
    partition.report_use(other, 8, now);
    partition.report_use(old, 2, later);
    let minute = Duration::from_secs(59);
    assert_eq!(partition.nearly_dead(25, now, minute).count(), 0, "it may be on its way up");
    // That it has fallen a moment ago does not make it younger.
    assert_eq!(
        partition.nearly_dead(25, later, minute).collect::<Vec<_>>(),
        [NearlyDead { segment: old, pages_mapped: 2, pages: 8 }]
    );
    assert_eq!(partition.nearly_dead(24, later, minute).count(), 0);

    // Withdrawn, its pages are filled anew instead of being found where they were; its members keep it meanwhile.
    assert!(partition.withdraw(old));
    let moved = fill(&mut partition, 2..4);
    assert!(moved.iter().all(|place| place.segment != old));
    let mut buffer = vec![0; page_size() as usize];
    assert!(partition.read_page(places[2], &mut buffer).unwrap());
    assert_eq!(buffer, page(2));
    assert!(partition.retire(old));
    assert_eq!(partition.lookup(partition.secret().fingerprint(&page(2))), Some(moved[0]));
    assert!(!partition.read_page(places[2], &mut buffer).unwrap());
}

#[test]
fn a_strict_member_never_gets_a_page_that_it_does_not_have() {
    let mut partition = Partition::open(Options { strict: true, ..Options::for_user(NOBODY) }).unwrap();
    // Two members share pages 0 to 9 in a row; a third has changed page 5 and comes later.
    let run = fill(&mut partition, 0..10);
    let segment = run[0].segment;
    let third: Vec<_> =
        (0..10).map(|seed| partition.secret().fingerprint(&page(if seed == 5 { 99 } else { seed }))).collect();
    assert!(partition.lookup(third[0]).is_some(), "its pages are there");
    assert_eq!(partition.lookup_run(&third), None, "but no segment of them alone");
    assert!(matches!(partition.hand_out(segment, NOBODY, |content| third.contains(&content)), HandOut::NotHeld));

    // It shares its parts with a fourth: they get segments of their own.
    let parts = [fill(&mut partition, 0..5), fill(&mut partition, 6..10)];
    for part in &parts {
        assert_ne!(part[0].segment, segment);
        let handed = partition.hand_out(part[0].segment, NOBODY, |content| third.contains(&content));
        assert!(matches!(handed, HandOut::File { pages, .. } if pages as usize == part.len()));
    }
    let found = partition.lookup_run(&third).unwrap();
    assert_eq!((found.place, found.pages), (parts[0][0], 5));
    let all: Vec<_> = (0..10).map(|seed| partition.secret().fingerprint(&page(seed))).collect();
    assert_eq!(partition.lookup_run(&all).unwrap().pages, 10, "who has all of it still gets the long one");
    assert_eq!(fill(&mut partition, 0..10), run, "and the same run is not stored twice");
}
