//! A trace of the real ksmd.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kernel::Pid;
use kernel::ksm_sysfs::ksm_stat;
use pagefold_ksm::trace::{TraceReport, Tracer};
use pagefold_ksm::{KsmSysfs, Lease, Rate, StatePath, Wanted, check_writable, host_lock};

const HOARD: &str = r"
import ctypes, mmap, sys
assert ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) == 0
area = mmap.mmap(-1, 800 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(500):
    area[page * mmap.PAGESIZE:page * mmap.PAGESIZE + 16] = b'trace %10d' % page
for page in range(500, 800):
    area[page * mmap.PAGESIZE] = 0
print('here', flush=True)
sys.stdin.read()
";

fn hoard() -> Child {
    let mut child =
        Command::new("python3").args(["-c", HOARD]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    child
}

fn pid(child: &Child) -> Pid {
    Pid(child.id().cast_signed())
}

fn of(report: &TraceReport, child: &Child) -> pagefold_ksm::trace::ProcessTrace {
    let found = report.processes.iter().find(|process| process.pid == pid(child).get());
    found.unwrap_or_else(|| panic!("{report:#?} lacks {}", child.id())).clone()
}

/// Two processes that were there before and one that comes later, merged under the eyes of a trace.
#[test]
fn merges_are_seen_with_their_processes() {
    let sysfs = KsmSysfs::host();
    if let Err(missing) = check_writable(&sysfs) {
        return println!("skipped: {missing}");
    }
    if Command::new("python3").arg("--version").output().is_err() {
        return println!("skipped: no python3 for the processes to merge");
    }
    let _lock = host_lock().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let mut hoards = vec![hoard(), hoard()];
    let mut tracer = match Tracer::start() {
        Ok(tracer) => tracer,
        Err(error) if error.is_not_here() => return println!("skipped: {error}"),
        Err(error) => panic!("{error:?}"),
    };
    let wanted = Wanted {
        run: Some(true),
        rate: Some(Rate { pages_to_scan: 20_000, sleep_millisecs: 1 }),
        smart_scan: Some(false),
        use_zero_pages: Some(true),
        ..Wanted::default()
    };
    let lease = Lease::acquire_at(&StatePath::at(temp.path().join("lease.json")), &sysfs, wanted).unwrap().0;
    let deadline = Instant::now() + Duration::from_secs(60);
    let until_merged = |tracer: &mut Tracer, hoards: &[Child]| {
        let merged = |child: &Child| {
            let stat = ksm_stat(pid(child)).unwrap();
            stat.ksm_merging_pages.unwrap() >= 500 && stat.ksm_zero_pages.unwrap() >= 300
        };
        while !hoards.iter().all(merged) {
            assert!(Instant::now() < deadline, "nothing merges");
            tracer.tick().unwrap();
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    until_merged(&mut tracer, &hoards);
    hoards.push(hoard());
    until_merged(&mut tracer, &hoards);
    // A pass more, for its time.
    let passes = tracer.report().unwrap().passes.completed;
    while tracer.report().unwrap().passes.completed < passes + 2 {
        assert!(Instant::now() < deadline, "no pass ends");
        tracer.tick().unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    let ended = hoards.remove(0);
    let ended_report = { end(ended) };
    lease.release().unwrap();
    let report = tracer.finish().unwrap();
    assert_eq!(report.lost_events, 0);
    assert!(report.can_attribute, "this kernel has the event");
    let first = report.processes.iter().find(|process| process.pid == ended_report.get()).unwrap();
    assert!(first.ended && first.merges.joined + first.merges.promoted >= 500, "{first:?}");
    for child in &hoards {
        let seen = of(&report, child);
        let kernels = ksm_stat(pid(child)).unwrap();
        let merged = seen.merges.joined + seen.merges.promoted;
        // Pages written and merged again are merges twice, and a page whose partner failed is none that stayed.
        assert!(merged >= kernels.ksm_merging_pages.unwrap(), "{seen:?} {kernels:?}");
        assert!(seen.merges.zero_pages >= 300 && !seen.ended && seen.comm == "python3", "{seen:?}");
    }
    assert!(report.merges.promoted >= 500 && report.merges.joined >= 1000, "{:?}", report.merges);
    assert!(report.entered >= 1 && report.exited >= 1 && report.passes.median_seconds.unwrap() > 0.0);
    let listed: u64 = report.timeline.iter().map(|second| second.merged).sum();
    assert_eq!(listed, report.merges.joined + report.merges.promoted);
    hoards.into_iter().for_each(|child| {
        end(child);
    });
}

fn end(mut child: Child) -> Pid {
    let pid = pid(&child);
    child.kill().unwrap();
    child.wait().unwrap();
    pid
}
