//! Merging live: this process and children that share the descriptor.
#![allow(clippy::unwrap_used, reason = "tests")]

mod members;

use std::time::{Duration, Instant};

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

#[test]
fn a_thread_that_ends_takes_no_helper_along() {
    if !live_here() {
        return;
    }
    in_child("body_a_thread_that_ends_takes_no_helper_along");
}

/// Seen to fail: the helper took the end of the thread that had asked first for the program's, and left; so did every
/// later one, and merging took 5 s each time.
#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_a_thread_that_ends_takes_no_helper_along() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let (one, two) = (Memory::filled(64, 5), Memory::filled(64, 5));
    std::thread::scope(|scope| {
        scope.spawn(|| partition.merge(one.range()).unwrap());
    });
    // The helper looks up every 100 ms.
    std::thread::sleep(Duration::from_millis(400));
    let report = partition.merge(two.range()).unwrap();
    assert!(report.pages_merged > 50, "{report:?}");
    assert_eq!(partition.summary().unwrap()["processes_ever"], 1);
}

#[test]
fn exec_after_a_thread_has_merged_leaves_no_helper_behind() {
    if !live_here() {
        return;
    }
    in_child("body_exec_after_a_thread_has_merged_leaves_no_helper_behind");
}

/// The other process that has a process's memory.
fn helper_of(pid: kernel::Pid) -> Option<kernel::Pid> {
    let mut others = kernel::status::processes().unwrap().into_iter().filter(|process| *process != pid);
    others.find(|process| kernel::task::kcmp_vm(pid, *process).is_ok_and(std::cmp::Ordering::is_eq))
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < end, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Seen to fail: of a program whose first thread had nothing to do with merging nobody told the helper that it was gone;
/// all of its memory stayed.
#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_exec_after_a_thread_has_merged_leaves_no_helper_behind() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let mut other = child("body_a_thread_merges_and_the_program_is_executed_over", &partition);
    let pid = other.pid();
    let helper = || helper_of(pid);
    wait_until("the child has a helper", || helper().is_some());
    let helper = kernel::Pidfd::open(helper().unwrap()).unwrap();
    wait_until("its helper has gone with the program", || helper.exited().unwrap());
    assert!(other.process().try_wait().unwrap().is_none(), "it has ended, and its helper because of that");
    other.process().kill().unwrap();
    other.process().wait().unwrap();
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_a_thread_merges_and_the_program_is_executed_over() {
    use std::os::unix::process::CommandExt as _;
    let Some(partition) = members::inherited() else { return };
    let memory = Memory::filled(64, 6);
    std::thread::scope(|scope| {
        scope.spawn(|| partition.merge(memory.range()).unwrap());
    });
    std::thread::sleep(Duration::from_secs(1));
    panic!("{}", std::process::Command::new("sleep").arg("60").exec());
}

#[test]
fn a_killed_helper_that_nobody_reaps_is_replaced() {
    if !live_here() {
        return;
    }
    in_child("body_a_killed_helper_that_nobody_reaps_is_replaced");
}

/// As below an init that does not reap, in many containers. Seen to fail: a number that still exists was a helper that
/// lives, and merging took 5 s and came to nothing for as long as it existed.
#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_a_killed_helper_that_nobody_reaps_is_replaced() {
    kernel::task::set_child_subreaper(true).unwrap();
    let partition = Partition::open("test", Flags::default()).unwrap();
    let mut other = child("body_merges_before_and_after", &partition);
    let pid = other.pid();
    let helper = || helper_of(pid);
    wait_until("the child has a helper", || helper().is_some());
    std::thread::sleep(Duration::from_millis(300));
    let first = helper().unwrap();
    kernel::Pidfd::open(first).unwrap().send_signal(kernel::Signal::KILL).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(kernel::status::read(first).unwrap().state, b'Z');
    drop(other.process().stdin.take());
    other.wait();
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_merges_before_and_after() {
    let Some(partition) = members::inherited() else { return };
    let (one, two) = (Memory::filled(64, 7), Memory::filled(64, 7));
    partition.merge(one.range()).unwrap();
    std::io::stdin().lines().count();
    let report = partition.merge_all(&[one.range(), two.range()]).unwrap();
    assert!(report.pages_merged > 50, "{report:?}");
}

#[test]
fn the_way_back() {
    if !live_here() {
        return;
    }
    in_child("body_the_way_back");
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_the_way_back() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let (mut one, two) = (Memory::filled(512, 3), Memory::filled(512, 3));
    let digest = one.digest();
    let report = partition.merge_all(&[one.range(), two.range()]).unwrap();
    assert!(report.pages_merged > 900, "{report:?}");
    let merged = one.pages_in_store();
    let back = partition.unmerge(one.range()).unwrap();
    assert_eq!((back.pages_unmerged, one.pages_in_store(), one.store_mappings()), (merged, 0, 0), "{back:?}");
    assert_eq!((one.digest(), two.digest()), (digest, digest));
    assert!(two.pages_in_store() > 400);

    // While it merges here it cannot merge there; once it has left it can.
    let other = Partition::open("other", Flags::default()).unwrap();
    assert!(matches!(other.merge(one.range()), Err(pagefold::Error::OtherPartition)));
    partition.leave().unwrap();
    assert_eq!((two.pages_in_store(), two.store_mappings()), (0, 0));
    let report = other.merge_all(&[one.range(), two.range()]).unwrap();
    assert!(report.pages_merged > 900, "{report:?}");
    one.write_all();
    assert_eq!(two.digest(), digest);
    // And back again.
    other.leave().unwrap();
    assert!(partition.merge_all(&[one.range(), two.range()]).unwrap().pages_merged > 900);
}

#[test]
fn a_tracker_keeps_merged() {
    if !live_here() {
        return;
    }
    in_child("body_a_tracker_keeps_merged");
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_a_tracker_keeps_merged() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let (mut one, two) = (Memory::filled(256, 4), Memory::filled(256, 4));
    let digest = one.digest();
    let until = |wanted: &dyn Fn() -> bool| {
        let end = Instant::now() + Duration::from_secs(20);
        while !wanted() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        wanted()
    };
    let tracker = partition.track(&[one.range(), two.range()], Duration::from_millis(200)).unwrap();
    let merged = until(&|| one.pages_in_store() > 200 && two.pages_in_store() > 200);
    assert!(merged, "{:#}", partition.summary().unwrap());
    // Zeros and back: every page is written, and in the end holds what it held.
    for page in 0..256 {
        one.page_mut(page)[17] ^= 1;
    }
    assert_eq!(one.pages_in_store(), 0);
    for page in 0..256 {
        one.page_mut(page)[17] ^= 1;
    }
    let again = kernel::Features::probe().retake().is_ok();
    assert!(!again || until(&|| one.pages_in_store() > 200), "{}", one.pages_in_store());
    assert_eq!((one.digest(), two.digest()), (digest, digest));
    drop(tracker);
    std::thread::sleep(Duration::from_millis(600));
    for page in 0..256 {
        one.page_mut(page)[17] ^= 1;
    }
    for page in 0..256 {
        one.page_mut(page)[17] ^= 1;
    }
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(one.pages_in_store(), 0, "nobody watches any more");
}

#[test]
fn a_forked_child_speaks_for_itself() {
    if !live_here() {
        return;
    }
    in_child("body_a_forked_child_speaks_for_itself");
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_a_forked_child_speaks_for_itself() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let (one, two) = (Memory::filled(256, 9), Memory::filled(256, 9));
    partition.merge_all(&[one.range(), two.range()]).unwrap();
    let digest = one.digest();
    let child = members::fork(|| {
        // The child's copy of the memory is merged already, as its parent's is; what it fills itself is not.
        let own = Memory::filled(256, 9);
        let report = partition.merge(own.range()).map_err(|error| error.to_string())?;
        let same = own.digest() == digest && one.digest() == digest;
        if report.pages_merged > 200 && same && !partition.is_served_here() {
            Ok(())
        } else {
            Err(format!("{report:?}"))
        }
    });
    assert_eq!(child, Ok(()));
    assert_eq!(two.digest(), digest);
    assert!(partition.merge(one.range()).is_ok(), "the parent's broker and helper are still there");
}

#[test]
fn a_child_that_goes_on_keeps_no_fork_waiting() {
    if !live_here() {
        return;
    }
    in_child("body_a_child_that_goes_on_keeps_no_fork_waiting");
}

/// The child has a copy of every descriptor that this process has, those of its broker among them. When the broker leaves
/// nobody reads the events of forks any more.
#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_a_child_that_goes_on_keeps_no_fork_waiting() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let (one, two) = (Memory::filled(256, 4), Memory::filled(256, 4));
    let digest = one.digest();
    let tracker = partition.track(&[one.range(), two.range()], Duration::from_millis(200)).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while one.pages_in_store() < 200 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(one.pages_in_store() >= 200);
    let long = members::fork_and_go_on(|| {
        std::thread::sleep(Duration::from_secs(6));
        if one.digest() == digest { Ok(()) } else { Err("the child's memory is another".to_owned()) }
    });
    drop(tracker);
    drop(partition);
    let begun = Instant::now();
    assert_eq!(members::fork(|| if two.digest() == digest { Ok(()) } else { Err(String::new()) }), Ok(()));
    assert!(begun.elapsed() < Duration::from_secs(3), "a fork took {:?}", begun.elapsed());
    assert_eq!(long.wait(), Ok(()));
}
