//! Merging live: this process and children that share the descriptor.
#![allow(clippy::unwrap_used, reason = "tests")]

mod members;

use members::{Memory, child, in_child, live_here};
use pagefold::{Flags, Partition};

#[test]
fn two_processes_share_what_is_equal() {
    if !live_here() {
        return;
    }
    in_child("body_two_processes_share_what_is_equal");
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_two_processes_share_what_is_equal() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let mut memory = Memory::filled(1024, 1);
    let digest = memory.digest();
    let first = partition.merge(memory.range()).unwrap();
    assert_eq!(first.pages_merged, 0, "nothing is equal yet: {first:?}");
    let other = child("body_child_merges", &partition);
    let said = other.wait();
    // A page that was just faulted in may still be held by a CPU's list of new pages.
    let merged: u64 = members::number(&said, "merged ");
    assert!((960..=1023).contains(&merged), "{said}");
    assert_eq!(memory.digest(), digest);
    let second = partition.merge(memory.range()).unwrap();
    assert_eq!(second.pages_merged, 0, "merged by the child's call already: {second:?}");
    assert!(memory.pages_in_store() >= merged, "{}", memory.pages_in_store());
    memory.write_all();
    assert_ne!(memory.digest(), digest);
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_child_merges() {
    let Some(partition) = members::inherited() else { return };
    let memory = Memory::filled(1024, 1);
    let digest = memory.digest();
    let report = partition.merge(memory.range()).unwrap();
    assert_eq!(memory.digest(), digest);
    println!("merged {} elsewhere {} {:?}", report.pages_merged, report.pages_merged_elsewhere, report.refused);
}
