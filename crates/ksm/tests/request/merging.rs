//! What is merged, what is not, and what the report says of it.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use kernel::ksm_sysfs::ksm_stat;
use kernel::{PageCount, Pid, Range, Vaddr, maps, page_size};
use pagefold_ksm::Counters;
use pagefold_ksm::request::{End, Request};

use crate::host::{Host, all};
use crate::target::Target;

#[test]
fn half_of_the_pages_are_duplicates_and_only_these_are_touched() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    let doubles = target.hold(8192, 2, 1);
    let singles = target.hold(8192, 1, 2);
    // Pages of processes that have ended count until ksmd comes by; nothing of them is left after this.
    host.sysfs.write("run", "2").unwrap();
    host.sysfs.write("run", "0").unwrap();
    let before = Counters::read(&host.sysfs).unwrap();
    let request = Request { ranges: vec![doubles, singles], ..all([target.pid()]) };
    let report = host.merge(&request);
    let process = &report.processes[0];
    assert_eq!(report.end, End::Done, "{report:#?}");
    assert_eq!((report.pages_read, report.pages_with_partner), (16_384, 8192), "{report:#?}");
    assert_eq!((process.pages_marked, process.pages_merged), (8192, 8192), "{report:#?}");
    assert!(process.pages_marked_besides == 0 && process.runs_marked == 1 && process.stops == 1, "{process:#?}");
    assert_eq!(report.bytes_saved, 4096 * page_size());
    assert!(report.refused.is_empty() && report.ksmd_cpu_seconds.is_some() && report.full_scans >= 1, "{report:#?}");
    assert!(host.is_as_before(), "the administrator's settings");
    let after = Counters::read(&host.sysfs).unwrap();
    assert_eq!(after.pages_shared - before.pages_shared, 4096);
    assert_eq!(after.pages_sharing - before.pages_sharing, 4096);
    assert_eq!(ksm_stat(target.pid()).unwrap().ksm_merging_pages, Some(8192));
    assert_eq!(target.wrong_words(), 0);

    // Once more: everything is there already, so nothing is marked, and nobody is stopped.
    let again = host.merge(&request);
    assert_eq!((again.end, again.pages_marked, again.processes[0].stops), (End::Done, 0, 0), "{again:#?}");
    assert_eq!(again.pages_merged_before, 8192);
}

/// Seen to fail: nothing was said of what cannot be merged.
#[test]
fn what_a_named_range_has_besides_is_counted() {
    const HOLD: &str = r"
import ctypes, mmap, sys
area = mmap.mmap(-1, 64 * mmap.PAGESIZE)
for page in range(48):
    area[page * mmap.PAGESIZE] = 1
print(hex(ctypes.addressof(ctypes.c_char.from_buffer(area))), flush=True)
sys.stdin.read()
";
    let Some(host) = Host::lock() else { return };
    let mut command = Command::new("python3");
    let child = command.args(["-c", HOLD]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = child else { return println!("skipped: python3") };
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let start = Vaddr(u64::from_str_radix(line.trim().trim_start_matches("0x"), 16).unwrap());
    let shared = Range::from_pages(start, PageCount(64)).unwrap();
    // Where no program maps anything.
    let unmapped = Range::from_pages(Vaddr(16 * page_size()), PageCount(16)).unwrap();
    let pid = Pid(child.id().cast_signed());
    let code = maps::read(pid).unwrap().into_iter().find(|vma| vma.exec && vma.inode != 0).unwrap().range;
    let request = Request { ranges: vec![shared, unmapped, code], wait: None, ..all([pid]) };
    let report = host.merge(&request);
    child.kill().unwrap();
    child.wait().unwrap();
    let left_out = &report.pages_not_eligible;
    assert_eq!((left_out.get("shared"), left_out.get("unmapped")), (Some(&48), Some(&16)), "{left_out:?}");
    assert!(left_out.get("file").is_some_and(|pages| (1..=code.pages().get()).contains(pages)), "{left_out:?}");
}

#[test]
fn a_newcomer_joins_what_ksm_shares_in_others_unless_it_is_told_not_to() {
    let Some(host) = Host::lock() else { return };
    let (mut first, mut second) = (Target::start(), Target::start());
    let shared = first.hold(2048, 2, 3);
    let merged = host.merge(&Request { ranges: vec![shared], ..all([first.pid()]) });
    assert_eq!(merged.pages_merged, 2048, "{merged:#?}");
    // Each content once: no two are equal within the request.
    let newcomer = second.hold(1024, 1, 3);
    let request = Request { ranges: vec![newcomer], ..all([second.pid()]) };
    let within = host.merge(&Request { within: true, ..request.clone() });
    assert_eq!((within.end, within.pages_with_partner, within.pages_read_elsewhere), (End::Done, 0, 0), "{within:#?}");
    let joined = host.merge(&request);
    assert_eq!((joined.pages_marked, joined.pages_merged), (1024, 1024), "{joined:#?}");
    assert!(joined.pages_read_elsewhere >= 1024, "{joined:#?}");
    assert_eq!(joined.bytes_saved, 1024 * page_size(), "all of them: the shared ones were there before");
    assert_eq!((first.wrong_words(), second.wrong_words()), (0, 0));
}

#[test]
fn pages_of_zeros_become_the_zero_page() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    let range: Vec<_> = target.ask("zeros 600").split(' ').map(str::to_owned).collect();
    let range = crate::target::range(&range[0]);
    let report = host.merge(&Request { ranges: vec![range], ..all([target.pid()]) });
    assert_eq!((report.pages_merged, report.zero_pages_merged), (600, 600), "{report:#?}");
    assert_eq!(report.bytes_saved, 600 * page_size());
    assert_eq!(ksm_stat(target.pid()).unwrap().ksm_zero_pages, Some(600));
}

#[test]
fn huge_pages_are_left_whole_for_few_and_split_for_many() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    let many = target.hold_huge(4096, 2, 4);
    let few = target.hold_huge(4096, 1, 5);
    // Two pages in different huge pages.
    target.ask("copy 700 3000");
    if target.ask("huge_pages") == "0" {
        return println!("skipped: huge pages");
    }
    let request = Request { ranges: vec![many, few], ..all([target.pid()]) };
    let report = host.merge(&request);
    assert_eq!(report.end, End::Done, "{report:#?}");
    assert!(report.pages_merged >= 4000 && report.huge_pages_to_split >= 6, "{report:#?}");
    // At the ends of a mapping there are small pages.
    assert!((1..=2).contains(&report.huge_pages_left) && report.pages_left_huge <= 2, "{report:#?}");
    let split = host.merge(&Request { split_huge: true, ..request });
    assert_eq!((split.huge_pages_left, split.end), (0, End::Done), "{split:#?}");
    assert!(split.pages_merged >= 2, "{split:#?}");
    assert_eq!(target.wrong_words(), 0);
}

#[test]
fn writers_lose_nothing_and_what_they_write_is_not_called_merged() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    let held = target.hold(16_384, 4, 6);
    // A quarter is written to all the while, with contents that are equal now and then.
    target.ask("write 25");
    let report = host.merge(&Request { ranges: vec![held], ..all([target.pid()]) });
    assert_eq!(report.end, End::Done, "{report:#?}");
    // What nobody writes to is merged; what was changed after it was chosen is said to be.
    assert!(report.pages_merged >= 12_288, "{report:#?}");
    assert!(report.refused.keys().all(|word| ["changed", "no_partner"].contains(word)), "{report:#?}");
    let refused: u64 = report.refused.values().sum();
    assert_eq!(report.pages_merged + refused, report.pages_marked, "{report:#?}");
    assert_eq!(target.wrong_words(), 0);
}

#[test]
fn a_process_keeps_mappings_for_itself() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    // 30,000 pages far from each other: as runs of their own they would add 60,000 mappings.
    let range = crate::target::range(&target.ask("sparse 30000 12"));
    let report = host.merge(&Request { ranges: vec![range], ..all([target.pid()]) });
    let process = &report.processes[0];
    let most = maps::max_map_count();
    assert_eq!((report.pages_with_partner, report.pages_merged), (30_000, 30_000), "{report:#?}");
    assert!(process.pages_marked_besides > 0 && process.vmas_added < most * 3 / 4, "{process:#?}");
    assert!(maps::count(target.pid()).unwrap() < most * 3 / 4, "{process:#?}");
    assert_eq!(target.wrong_words(), 0);
}

#[test]
fn more_copies_than_one_page_may_have_are_shared_by_several() {
    let Some(host) = Host::lock() else { return };
    let most: u64 = host.sysfs.number("max_page_sharing").unwrap().unwrap().unsigned_abs();
    let (copies, mut target) = (2 * most + 88, Target::start());
    let range = target.hold(copies, copies, 8);
    host.sysfs.write("run", "2").unwrap();
    host.sysfs.write("run", "0").unwrap();
    let report = host.merge(&Request { ranges: vec![range], within: true, ..all([target.pid()]) });
    assert_eq!((report.pages_merged, report.end), (copies, End::Done), "{report:#?}");
    // Two full ones, and one for the rest.
    let counters = Counters::read(&host.sysfs).unwrap();
    assert_eq!((counters.pages_shared, counters.pages_sharing), (3, copies - 3));
    assert_eq!(report.bytes_saved, (copies - 3) * page_size());
    assert_eq!(target.wrong_words(), 0);
}
