//! What a snapshot predicts, held against the kernel's own KSM on pages that the test dictates, and that looking at
//! merged pages leaves them merged.
#![allow(clippy::unwrap_used, reason = "tests")]

mod children;

use std::time::{Duration, Instant};

use children::{Mode, hold, place};
use kernel::{Pid, smaps};
use ksm::{Counters, KsmSysfs, Lease, Rate, Wanted, check_writable, host_lock};
use pagefold_eval::{Options, Pace, Report, Selection, evaluate};

#[test]
#[ignore = "what the other tests start"]
fn child() {
    children::child_main();
}

fn eval(pids: &[Pid], pages: usize) -> Report {
    let options = Options {
        selection: Selection { pids: pids.to_vec(), ..Selection::default() },
        ranges: vec![place(pages)],
        pace: Pace { threads: 2, limit: None },
        watch: Some(Duration::from_millis(10)),
        ..Options::default()
    };
    evaluate(&options, &|_| {}).unwrap()
}

/// Seen to fail: with process_vm_readv for all pages, looking un-merges pages, which ksmd then has to merge again.
#[test]
fn what_is_predicted_is_what_ksmd_reaches_and_looking_leaves_it_merged() {
    let sysfs = KsmSysfs::host();
    if let Err(missing) = check_writable(&sysfs) {
        println!("skipped: {missing}");
        return;
    }
    let _lock = host_lock().unwrap();
    let wanted = Wanted {
        run: Some(true),
        rate: Some(Rate::FLAT_OUT),
        smart_scan: Some(false),
        use_zero_pages: Some(false),
        ..Wanted::default()
    };
    let sharing = || Counters::read(&sysfs).unwrap().pages_sharing;
    // ksmd forgets those who have ended when it comes by.
    let lease = Lease::acquire(&sysfs, wanted).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while sharing() > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let others = sharing();
    lease.release().unwrap();
    if others > 0 {
        println!("skipped: a machine where nothing else is merged");
        return;
    }
    let contents = |from: u32| -> Vec<u32> { (0..900).map(|at| if at % 9 == 0 { 0 } else { from + at / 2 }).collect() };
    let (one, two) = (hold(&contents(1), Mode::Mergeable), hold(&contents(201), Mode::Mergeable));
    let pids = [one.pid(), two.pid()];
    let before = eval(&pids, 900);
    let predicted = before.savings.pages_sharing_predicted;
    assert!(predicted > 1000 && before.totals.counters.zero_pages == 200, "{:?}", before.totals);
    let lease = Lease::acquire(&sysfs, wanted).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while sharing() < predicted && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    // A few passes more bring nothing more.
    let pass = Counters::read(&sysfs).unwrap().full_scans + 3;
    while Counters::read(&sysfs).unwrap().full_scans < pass && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let merged = sharing();
    let ksm = |pid: Pid| smaps::rollup(pid).unwrap().ksm;
    let in_smaps = (ksm(pids[0]), ksm(pids[1]));
    let after = eval(&pids, 900);
    let left = (sharing(), (ksm(pids[0]), ksm(pids[1])));
    lease.release().unwrap();
    assert_eq!(merged, predicted);
    assert_eq!(left, (merged, in_smaps), "looking has un-merged pages");
    // Frames tell which mappings are further ones of a page; without them each is a page of its own again.
    if after.reading.frames_seen {
        assert_eq!(after.totals.already_shared_by_ksm, merged, "{:?}", after.totals);
        assert_eq!(after.totals.counters.duplicate_pages, 0);
    }
    assert_eq!(after.savings.pages_sharing_predicted, predicted);
}
