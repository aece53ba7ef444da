//! The advisor over real processes.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pagefold_ksm::advise::{Advisor, Decision, Event, Goals, Pace, Turn};
use pagefold_ksm::{Knob, KsmSysfs, Lease, Phase, Rate, StatePath, Wanted, check_writable, host_lock};

const STEADY: Goals = Goals {
    scan_time: Duration::from_secs(2),
    max_cpu: 0.5,
    boost: None,
    memory_pressure: None,
    cpu_pressure: None,
    rest: false,
    keep_smart_scan: false,
};

struct Host {
    _lock: File,
    sysfs: KsmSysfs,
    temp: tempfile::TempDir,
    before: Vec<String>,
}

impl Host {
    fn lock() -> Option<Self> {
        let Some(sysfs) = Some(KsmSysfs::host()).filter(|sysfs| check_writable(sysfs).is_ok()) else {
            println!("skipped: no KSM whose settings can be written (root needed)");
            return None;
        };
        if Command::new("python3").arg("--version").output().is_err() {
            println!("skipped: no python3 for the processes to merge");
            return None;
        }
        let lock = host_lock().unwrap();
        let temp = tempfile::tempdir().unwrap();
        let before = values(&sysfs);
        Some(Self { _lock: lock, sysfs, temp, before })
    }

    fn path(&self) -> StatePath {
        StatePath::at(self.temp.path().join("lease.json"))
    }

    fn start(&self, goals: Goals) -> Advisor {
        Advisor::start_at(&self.path(), &self.sysfs, goals).unwrap().0
    }

    fn assert_restored(&self) {
        assert_eq!(values(&self.sysfs), self.before);
    }
}

fn values(sysfs: &KsmSysfs) -> Vec<String> {
    Knob::ALL.iter().map(|knob| fs::read_to_string(sysfs.root().join(knob.file_name())).unwrap()).collect()
}

/// A process that holds pages of which every second one is equal to its neighbour.
struct Hoard(Child);

const HOARD: &str = r"
import ctypes, mmap, sys
assert ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) == 0
pages = int(sys.argv[1])
area = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(pages):
    area[page * mmap.PAGESIZE:page * mmap.PAGESIZE + 16] = b'advise%10d' % (page // 2)
print('held', flush=True)
sys.stdin.read()
";

impl Hoard {
    fn new(pages: u32) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", HOARD, &pages.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "held\n");
        Self(child)
    }
}

impl Drop for Hoard {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// Lets it work until `enough` says so of what was decided, or for two minutes.
fn until(advisor: &mut Advisor, mut enough: impl FnMut(&Advisor, Option<Decision>) -> bool) -> Vec<Event> {
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut all = Vec::new();
    loop {
        let (events, pause) = advisor.tick().unwrap();
        let decision = events.iter().rev().find_map(|event| match event {
            Event::Decided { decision, .. } => Some(*decision),
            _ => None,
        });
        all.extend(events);
        if enough(advisor, decision) {
            return all;
        }
        assert!(Instant::now() < deadline, "{all:?}");
        std::thread::sleep(pause);
    }
}

#[test]
fn passes_follow_the_goal_and_the_settings_come_back() {
    let Some(host) = Host::lock() else { return };
    let _hoards = [Hoard::new(12_000), Hoard::new(12_000)];
    let mut advisor = host.start(STEADY);
    host.assert_restored();
    let events = until(&mut advisor, |advisor, _| advisor.summary().passes >= 5);
    let Event::Decided { decision, .. } = events[0] else { panic!("{events:?}") };
    assert!(
        matches!(decision.turn, Some(Turn::Started { mergeable_pages }) if mergeable_pages >= 24_000),
        "{decision:?}"
    );
    // The first pass is not waited for: its length is known from the processes.
    assert!((24_000.0..60_000.0).contains(&decision.pass_pages), "{decision:?}");
    let summary = advisor.summary();
    assert!(summary.bytes_saved >= summary.bytes_saved_at_start, "{summary:?}");
    assert!(summary.merges >= 20_000 && summary.passes_held > 0, "{summary:?}");
    assert!(summary.ksmd_cpu_percent.unwrap() < 50.0, "{summary:?}");
    // How near the passes came to the goal on this machine now is printed and not judged: others run here too. The
    // judgement is made on a model of ksmd.
    println!("passes of {:?} s, goal 2 s: {summary:?}", summary.scan_time_seconds);
    advisor.stop().unwrap();
    host.assert_restored();
}

#[test]
fn it_rests_as_the_administrator_had_it_and_wakes_for_a_new_process() {
    let Some(host) = Host::lock() else { return };
    let _hoard = Hoard::new(8_000);
    let goals = Goals { boost: Some(0.5), rest: true, scan_time: Duration::from_millis(500), ..STEADY };
    let mut advisor = host.start(goals);
    let events = until(&mut advisor, |_, decision| decision.is_some_and(|decision| decision.phase == Phase::Idle));
    assert!(matches!(events[0], Event::Decided { decision: Decision { phase: Phase::Boost, .. }, .. }), "{events:?}");
    host.assert_restored();
    let newcomer = Hoard::new(12_000);
    let mut turn = None;
    until(&mut advisor, |_, decision| {
        turn = turn.or_else(|| decision?.turn.filter(|turn| matches!(turn, Turn::Grown { .. })));
        turn.is_some()
    });
    assert!(matches!(turn, Some(Turn::Grown { pages }) if pages >= 12_000), "{turn:?}");
    assert_ne!(values(&host.sysfs), host.before);
    drop(newcomer);
    drop(advisor);
    host.assert_restored();
}

#[test]
fn another_holder_that_asks_for_more_is_noticed_and_outlives_the_advisor() {
    let Some(host) = Host::lock() else { return };
    let _hoard = Hoard::new(8_000);
    let mut advisor = host.start(STEADY);
    let working = |_: &Advisor, decision: Option<Decision>| decision.is_some_and(|decision| decision.rate.is_some());
    until(&mut advisor, working);
    let theirs = Rate { pages_to_scan: 50_000, sleep_millisecs: 10 };
    let wanted = Wanted { run: Some(true), rate: Some(theirs), ..Wanted::default() };
    let (other, _) = Lease::acquire_at(&host.path(), &host.sysfs, wanted).unwrap();
    let overruled = Pace::Overruled { in_force: Some(theirs) };
    until(&mut advisor, |_, decision| decision.is_some_and(|decision| decision.pace == overruled));
    other.release().unwrap();
    until(&mut advisor, |_, decision| decision.is_some_and(|decision| decision.pace == Pace::ScanTime));
    advisor.stop().unwrap();
    host.assert_restored();
}

#[test]
fn a_setting_that_somebody_writes_by_hand_is_his() {
    let Some(host) = Host::lock() else { return };
    let _hoard = Hoard::new(8_000);
    let mut advisor = host.start(STEADY);
    until(&mut advisor, |_, decision| decision.is_some_and(|decision| decision.rate.is_some()));
    host.sysfs.write("pages_to_scan", "77").unwrap();
    let events = until(&mut advisor, |_, decision| {
        decision.is_some_and(|decision| {
            matches!(decision.pace, Pace::Overruled { in_force: Some(Rate { pages_to_scan: 77, .. }) })
        })
    });
    println!("{events:?}");
    let stopped = advisor.stop().unwrap();
    assert_eq!(host.sysfs.number("pages_to_scan").unwrap(), Some(77), "{stopped:?}");
    host.sysfs.write("pages_to_scan", host.before[1].trim()).unwrap();
    host.assert_restored();
}
