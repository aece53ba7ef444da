//! What a snapshot says of processes whose content is known, and that it leaves them as they are.
#![allow(clippy::unwrap_used, reason = "tests")]

mod children;

use std::time::Duration;

use children::{Mode, hold, place};
use kernel::{Pagemap, PagemapEntry, Pid, smaps};
use pagefold_eval::{GroupBy, Options, Pace, Report, Selection, evaluate};

#[test]
#[ignore = "what the other tests start"]
fn child() {
    children::child_main();
}

fn options(pids: &[Pid], pages: usize) -> Options {
    Options {
        selection: Selection { pids: pids.to_vec(), ..Selection::default() },
        ranges: vec![place(pages)],
        pace: Pace { threads: 2, limit: None },
        ..Options::default()
    }
}

fn eval(options: &Options) -> Report {
    let report = evaluate(options, &|_| {}).unwrap();
    let counters = report.totals.counters;
    assert_eq!(
        counters.pages_scanned,
        counters.zero_pages + counters.distinct_pages + counters.duplicate_pages,
        "{counters:?}"
    );
    for scopes in &report.duplicates {
        let sum = scopes.within_process + scopes.within_group + scopes.between_groups;
        assert_eq!(sum, counters.duplicate_pages, "{scopes:?}");
    }
    report
}

/// Three processes: what is once, twice in one, in two, in all, and zeros. Every figure is known.
#[test]
fn every_count_is_exact() {
    let one = hold(&[1, 2, 3, 4, 5, 5, 5, 10, 11, 0, 0], Mode::Rest);
    let two = hold(&[6, 7, 10, 11, 11, 12, 0, 8, 9, 13, 14], Mode::Rest);
    let three = hold(&[11, 12, 12, 20, 21, 22, 23, 24, 25, 26, 0], Mode::Rest);
    let report = eval(&options(&[one.pid(), two.pid(), three.pid()], 11));
    let counters = report.totals.counters;
    assert_eq!((counters.pages_scanned, counters.zero_pages), (33, 4));
    // 1-5, 10, 11 | 6-9, 12-14 | 20-26
    assert_eq!((counters.distinct_pages, counters.unique_pages, counters.duplicate_pages), (21, 17, 8));
    let scopes = report.duplicates.iter().find(|scopes| scopes.by == GroupBy::Command).unwrap();
    // 5 thrice in one, 11 twice in two, 12 twice in three | 10, 11, 11, 12 in further processes | one command.
    assert_eq!((scopes.within_process, scopes.within_group, scopes.between_groups), (4, 4, 0));
    assert_eq!(report.savings.pages_sharing_predicted, 8 + 4 - 1);
    assert_eq!(report.savings.bytes_saved_ksm, 11 * 4096 - 33 * 64);
    let of = |pid: Pid| report.processes.iter().find(|process| process.process.pid == pid.get()).unwrap();
    let first = of(one.pid()).owned;
    assert_eq!((first.counters.pages_scanned, first.counters.zero_pages), (11, 2));
    assert_eq!((first.counters.distinct_pages, first.counters.unique_pages), (7, 4));
    assert_eq!((first.counters.duplicate_pages, first.shared_content_pages), (2, 5));
    // 5: all three give 2/3; 10: 1/2; 11 has four copies: 3/4; two zero pages.
    assert_eq!(first.bytes_saved_share, ((2.0 + 0.5 + 0.75 + 2.0) * 4096.0) as u64);
    let at = |pid: Pid| report.sharing.pids.iter().position(|other| *other == pid.get()).unwrap();
    let (a, b, c) = (at(one.pid()), at(two.pid()), at(three.pid()));
    let pages = &report.sharing.pages;
    assert_eq!((pages[a][b], pages[b][a], pages[a][c], pages[b][c]), (2, 2, 1, 2));
    assert_eq!((pages[a][a], pages[b][b], pages[c][c]), (2, 1, 1));
    let top = &report.top_contents[0];
    assert_eq!((top.copies, top.processes), (4, 3));
    assert_eq!(report.vmas.iter().map(|vma| vma.owned.counters.pages_scanned).sum::<u64>(), 33);
    assert_eq!(report.totals.volatile_pages, 0);
    assert!(report.totals.stable.is_none());
}

/// 40,000 pages, each content in its own number of copies, by one thread and by four.
#[test]
fn many_pages_are_exact_too() {
    let contents: Vec<u32> = (0..20_000_u32).map(|at| 1 + at % 7919).collect();
    let (one, two) = (hold(&contents, Mode::Rest), hold(&contents[..10_000], Mode::Rest));
    let mut options = options(&[one.pid(), two.pid()], contents.len());
    for threads in [1, 4] {
        options.pace.threads = threads;
        let counters = eval(&options).totals.counters;
        assert_eq!(
            (counters.pages_scanned, counters.distinct_pages, counters.duplicate_pages, counters.unique_pages),
            (30_000, 7919, 30_000 - 7919, 0)
        );
    }
}

/// The target is as before: nothing is un-shared after a fork, nothing appears, nothing is stopped.
///
/// Seen to fail: with process_vm_readv for all pages, all of these get a copy each.
#[test]
fn pages_that_a_fork_left_shared_stay_shared() {
    let contents: Vec<u32> = (1..=600).collect();
    let parent = hold(&contents, Mode::Fork);
    let child = parent.grandchild.unwrap();
    let exclusive = |pid: Pid| {
        let mut entries = vec![PagemapEntry(0); 600];
        Pagemap::open(pid).unwrap().entries(place(600).start(), &mut entries).unwrap();
        entries.iter().filter(|entry| entry.exclusive()).count()
    };
    // Pages of files are everybody's: others map them, and they are written back.
    let own = |vma: smaps::VmaUse| {
        let memory = if vma.vma.inode == 0 {
            vma.memory
        } else {
            kernel::MemoryUse { anonymous: vma.memory.anonymous, ..Default::default() }
        };
        (vma.vma, memory)
    };
    let image = |pid: Pid| smaps::read(pid).unwrap().into_iter().map(own).collect::<Vec<_>>();
    assert_eq!((exclusive(parent.pid()), exclusive(child)), (0, 0));
    // Until both wait: what they still allocate for that is not ours to explain.
    let both = || (image(parent.pid()), image(child));
    let mut before = both();
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(100));
        let now = both();
        if std::mem::replace(&mut before, now) == before {
            break;
        }
    }
    let mut options = options(&[parent.pid(), child], 600);
    options.watch = Some(Duration::from_millis(10));
    let report = eval(&options);
    assert_eq!((exclusive(parent.pid()), exclusive(child)), (0, 0));
    let after = both();
    let differ = before.0.iter().chain(&before.1).zip(after.0.iter().chain(&after.1)).filter(|(a, b)| a != b);
    assert!(before == after, "smaps says something else: {:#?}", differ.collect::<Vec<_>>());
    let totals = report.totals;
    assert_eq!((totals.counters.pages_scanned, totals.counters.duplicate_pages), (600, 0));
    assert_eq!((totals.already_shared_by_fork, totals.already_shared_pages), (600, 600));
    assert_eq!((totals.volatile_pages, report.savings.pages_sharing_predicted), (0, 600));
}

/// A process that rewrites half of its duplicates has half of them volatile.
#[test]
fn what_is_rewritten_is_volatile() {
    let contents: Vec<u32> = (0..400).map(|at| 1 + at / 2).collect();
    let (quiet, busy) = (hold(&contents, Mode::Rest), hold(&contents, Mode::Rewrite));
    let mut options = options(&[quiet.pid(), busy.pid()], 400);
    options.watch = Some(Duration::from_millis(500));
    let report = eval(&options);
    let totals = report.totals;
    assert_eq!((totals.counters.pages_scanned, totals.volatile_pages), (800, 200));
    let stable = totals.stable.unwrap();
    // Both copies in the quiet process and the one that the busy one leaves alone: two beyond the first of each.
    assert_eq!((stable.pages_scanned, stable.distinct_pages, stable.duplicate_pages), (600, 200, 400));
    let of = |pid: Pid| report.processes.iter().find(|process| process.process.pid == pid.get()).unwrap();
    assert_eq!((of(quiet.pid()).owned.volatile_pages, of(busy.pid()).owned.volatile_pages), (0, 200));
    assert_eq!(report.savings.bytes_saved_ksm, 400 * 4096 - 800 * 64);
}

/// Zero pages and duplicates inside huge pages are told apart.
#[test]
fn huge_pages_are_told() {
    let mut contents = vec![0; 512 + 64];
    for (at, content) in contents.iter_mut().enumerate().take(256) {
        *content = 1 + at as u32 / 2;
    }
    let child = hold(&contents, Mode::Huge);
    let entries = smaps::read(child.pid()).unwrap();
    let huge: u64 = entries
        .iter()
        .filter(|vma| place(1).start() == vma.vma.range.start())
        .map(|vma| vma.memory.anon_huge_pages.pages().get())
        .sum();
    if huge == 0 {
        println!("skipped: huge pages");
        return;
    }
    let totals = eval(&options(&[child.pid()], contents.len())).totals;
    assert_eq!((totals.huge_pages, totals.counters.zero_pages), (512, 320));
    assert_eq!((totals.counters.zero_pages_in_huge, totals.duplicate_pages_in_huge), (256, 256));
}

/// Pages of huge pages that are not whole any more stay where they are, after a fork too.
///
/// Seen to fail: with process_vm_readv, nearly all of them get a new frame.
#[test]
fn parts_of_large_folios_keep_their_frames() {
    let contents: Vec<u32> = (1..=2048).collect();
    let child = hold(&contents, Mode::Torn);
    let frames = || {
        let mut entries = vec![PagemapEntry(0); contents.len()];
        Pagemap::open(child.pid()).unwrap().entries(place(1).start(), &mut entries).unwrap();
        entries.iter().map(|entry| entry.pfn()).collect::<Vec<_>>()
    };
    let before = frames();
    if before.iter().all(Option::is_none) {
        println!("skipped: page frame numbers (CAP_SYS_ADMIN)");
        return;
    }
    let report = eval(&options(&[child.pid()], contents.len()));
    let present = before.iter().flatten().count() as u64;
    assert_eq!(report.totals.counters.pages_scanned, present);
    assert!((2000..2048).contains(&present), "{present}");
    let moved = before.iter().zip(frames()).filter(|(before, after)| **before != *after).count();
    assert_eq!(moved, 0);
}

/// Pages that lie apart, more than the kernel reports at a time, come once each.
#[test]
fn scattered_pages_come_once() {
    let contents: Vec<u32> = (1..=12_000).collect();
    let child = hold(&contents, Mode::Holes);
    let counters = eval(&options(&[child.pid()], contents.len())).totals.counters;
    assert_eq!((counters.pages_scanned, counters.distinct_pages, counters.duplicate_pages), (6000, 6000, 0));
}

/// A second look at a sample says of the sample what lasted.
///
/// Seen to fail: what lasted was reckoned up to all that was read, so that nothing was volatile.
#[test]
fn a_sample_says_what_lasts() {
    let contents: Vec<u32> = (0..8000).map(|at| 1 + at / 2).collect();
    let (quiet, busy) = (hold(&contents, Mode::Rest), hold(&contents, Mode::Rewrite));
    let mut options = options(&[quiet.pid(), busy.pid()], contents.len());
    options.watch = Some(Duration::from_millis(500));
    for sample in [pagefold_eval::SampleBy::HashSpace(0.3), pagefold_eval::SampleBy::Pages(0.3)] {
        options.sample = Some(sample);
        let totals = eval(&options).totals;
        let (volatile, stable) = (totals.volatile_pages, totals.stable.unwrap());
        // A quarter of all 16,000.
        assert!((3_500..4_500).contains(&volatile), "{sample:?}: {volatile} in {totals:?}");
        assert_eq!(stable.pages_scanned + volatile, totals.counters.pages_scanned);
        // What is rewritten had no equal: all duplicates last, 2 of each of 4,000 contents.
        assert_eq!(stable.duplicate_pages, totals.counters.duplicate_pages, "{sample:?}: {totals:?}");
        assert!((6_000..10_000).contains(&stable.duplicate_pages), "{sample:?}: {totals:?}");
    }
}

/// A rate is for what is read, not for what is passed over.
///
/// Seen to fail: when a sample's jobs were waited for whole, this took 2.5 s.
#[test]
fn a_rate_counts_what_is_read() {
    let contents: Vec<u32> = (1..=12_800).collect();
    let child = hold(&contents, Mode::Rest);
    let mut options = options(&[child.pid()], contents.len());
    options.sample = Some(pagefold_eval::SampleBy::Pages(0.1));
    options.pace = Pace { threads: 1, limit: Some(20 << 20) };
    let begun = std::time::Instant::now();
    evaluate(&options, &|_| {}).unwrap();
    // 5 of 50 MiB, and one job of 4 MiB ahead.
    let took = begun.elapsed();
    assert!((Duration::from_millis(200)..Duration::from_millis(1500)).contains(&took), "{took:?}");
}

/// What ends while it is looked at is a line of the report, and a rate is kept.
#[test]
fn a_process_that_ends_is_no_failure() {
    let contents: Vec<u32> = (1..=3000).collect();
    let (stays, ends) = (hold(&contents, Mode::Rest), std::sync::Mutex::new(Some(hold(&contents, Mode::Rest))));
    let pids = [stays.pid(), ends.lock().unwrap().as_ref().unwrap().pid()];
    let mut options = options(&pids, contents.len());
    options.pace = Pace { threads: 1, limit: Some(40 << 20) };
    let begun = std::time::Instant::now();
    let report = evaluate(&options, &|stage| {
        if matches!(stage, pagefold_eval::Stage::Reading { .. }) {
            ends.lock().unwrap().take();
        }
    });
    let report = report.unwrap();
    assert_eq!(report.totals.counters.pages_scanned + report.reading.lost_pages, 6000);
    assert!(report.totals.counters.pages_scanned < 6000, "{:?}", report.totals);
    // 12 MiB at 40 MiB a second.
    assert!(begun.elapsed() > Duration::from_millis(250), "{:?}", begun.elapsed());
}
