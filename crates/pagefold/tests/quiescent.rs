//! Merging in the caller's own thread: without userfaultfd, without privilege.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unsafe_code, reason = "what the unsafe function promises is kept here")]

mod members;

use members::{Memory, child, in_child, number};
use pagefold::{Flags, MergeReport, Partition};
use std::io::{BufRead, BufReader, Write};

fn merge(partition: &Partition, memory: &Memory) -> MergeReport {
    // SAFETY: this process has one thread that uses the memory, this one.
    unsafe { partition.merge_quiescent(memory.range()) }.unwrap()
}

#[test]
fn two_processes_merge_with_each_other() {
    in_child("body_two_processes_merge_with_each_other");
}

#[test]
fn nobody_may_do_it_too() {
    if !kernel_is_root() {
        println!("skipped: root, to become nobody");
        return;
    }
    members::in_child_as_nobody("body_two_processes_merge_with_each_other");
}

fn kernel_is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
#[ignore = "runs in a process of its own, started by the tests above"]
fn body_two_processes_merge_with_each_other() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let mut memory = Memory::filled(3000, 1);
    memory.page_mut(100).fill(0);
    memory.page_mut(101).fill(0);
    let digest = memory.digest();
    let first = merge(&partition, &memory);
    assert_eq!((first.pages_merged, first.zero_pages), (0, 2), "nothing is equal yet: {first:?}");
    assert!(first.pages_scanned >= 3000, "{first:?}");
    let mut other = child("body_other_merges", &partition);
    let mut said = String::new();
    let mut lines = BufReader::new(other.process().stdout.take().unwrap());
    while !said.contains("merged ") {
        lines.read_line(&mut said).unwrap();
    }
    let theirs = number(&said, "merged ");
    assert!(theirs >= 2900, "{said}");
    let second = merge(&partition, &memory);
    assert!(second.pages_merged >= 2900 && second.refused.is_empty(), "{second:?}");
    assert_eq!(memory.digest(), digest);
    assert!(memory.pages_in_store() >= 2900);
    let summary = partition.summary().unwrap();
    assert!(summary["pages_sharing"].as_u64().unwrap() >= 2900, "{summary:#}");
    assert!(summary["bytes_saved"].as_u64().unwrap() > 2000 * 4096, "{summary:#}");
    // Written pages become this process's own, and no other's.
    memory.write_all();
    assert_ne!(memory.digest(), digest);
    other.process().stdin.take().unwrap().write_all(b"go\n").unwrap();
    let said = other.wait();
    let _ = said;
}

#[test]
#[ignore = "runs in a process of its own, started by the tests above"]
fn body_other_merges() {
    let Some(partition) = members::inherited() else { return };
    let memory = Memory::filled(3000, 1);
    let digest = memory.digest();
    let report = merge(&partition, &memory);
    println!("merged {} of {} {:?}", report.pages_merged, report.pages_scanned, report.refused);
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    assert_eq!(memory.digest(), digest, "the other one's writes are not seen here");
}

#[test]
fn the_gate_knows_what_was_merged() {
    in_child("body_the_gate_knows_what_was_merged");
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_the_gate_knows_what_was_merged() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let (one, two) = (Memory::filled(64, 5), Memory::filled(64, 5));
    merge(&partition, &one);
    let report = merge(&partition, &two);
    assert!(report.pages_merged >= 63, "{report:?}");
    assert!(two.pages_in_store() >= 63);
    // DONTNEED uncovers the store's content unless the gate puts anonymous memory there first.
    members::forget(&two, 10, 5);
    assert!(two.page(12).iter().all(|byte| *byte == 0), "what was given back reads as zeros");
    assert!(two.page(9).iter().any(|byte| *byte != 0));
}

#[test]
fn the_way_back_without_a_helper() {
    in_child("body_the_way_back_without_a_helper");
    if kernel_is_root() {
        members::in_child_as_nobody("body_the_way_back_without_a_helper");
    }
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_the_way_back_without_a_helper() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let (mut one, two) = (Memory::filled(128, 6), Memory::filled(128, 6));
    let digest = one.digest();
    merge(&partition, &one);
    merge(&partition, &two);
    merge(&partition, &one);
    let merged = one.pages_in_store();
    assert!(merged >= 126, "{merged}");
    let back = partition.unmerge(one.range()).unwrap();
    assert_eq!((back.pages_unmerged, one.pages_in_store()), (merged, 0), "{back:?}");
    assert_eq!(one.digest(), digest);
    one.write_all();
    assert_eq!(two.digest(), digest);
    partition.leave().unwrap();
    assert_eq!((two.digest(), two.pages_in_store()), (digest, 0));
}

#[test]
fn borrowed_memory_needs_no_promise() {
    in_child("body_borrowed_memory_needs_no_promise");
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_borrowed_memory_needs_no_promise() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    // All pages are alike, wherever the allocator puts the two.
    let mut one = vec![7_u64; 1 << 16];
    let mut two = one.clone();
    let first = partition.merge_exclusive(&mut one).unwrap();
    let second = partition.merge_exclusive(&mut two).unwrap();
    assert!(first.pages_merged > 100 && second.pages_merged > 100, "{first:?} {second:?}");
    assert!(one.iter().chain(&two).all(|word| *word == 7));
    two[1000] = 1;
    assert_eq!((one[1000], two[1000], two[1512]), (7, 1, 7));
}
