//! ksmd driven for real processes.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use pagefold_ksm::{Drive, DriveSettings, Knob, KsmSysfs, Phase, Rate, StatePath, Tree, check_writable, host_lock};

struct Host {
    _lock: File,
    sysfs: KsmSysfs,
    temp: tempfile::TempDir,
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
        Some(Self { _lock: lock, sysfs, temp: tempfile::tempdir().unwrap() })
    }

    fn start(&self, settings: DriveSettings) -> Drive {
        let path = StatePath::at(self.temp.path().join("lease.json"));
        Drive::start_at(&path, &self.sysfs, settings, Tree::below_self()).unwrap().0
    }

    fn values(&self) -> Vec<String> {
        Knob::ALL.iter().map(|knob| fs::read_to_string(self.sysfs.root().join(knob.file_name())).unwrap()).collect()
    }
}

/// A process whose memory KSM may merge: holds equal pages, and more on demand.
struct Hoard {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

const HOARD: &str = r"
import ctypes, mmap, sys
assert ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) == 0
held = []
for line in sys.stdin:
    pages, seed = map(int, line.split())
    area = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(pages):
        area[page * mmap.PAGESIZE:page * mmap.PAGESIZE + 16] = b'%8d%8d' % (seed, page)
    held.append(area)
    print('held', flush=True)
";

impl Hoard {
    fn new() -> Self {
        let mut child =
            Command::new("python3").args(["-c", HOARD]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, to, from }
    }

    fn hold(&mut self, pages: u32, seed: u32) {
        writeln!(self.to.as_mut().unwrap(), "{pages} {seed}").unwrap();
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        assert_eq!(line, "held\n");
    }
}

impl Drop for Hoard {
    fn drop(&mut self) {
        self.to = None;
        self.child.wait().unwrap();
    }
}

#[test]
fn equal_pages_are_merged_ksmd_rests_and_wakes_for_new_memory() {
    let Some(host) = Host::lock() else { return };
    let before = host.values();
    let mut pair = [Hoard::new(), Hoard::new()];
    for hoard in &mut pair {
        hoard.hold(8192, 1);
    }
    let mut drive = host.start(DriveSettings::default());
    assert_eq!(drive.phase(), Phase::Boost);
    assert!(!drive.settled());
    assert!(drive.until_settled(Duration::from_secs(60)).unwrap());
    let first = drive.progress().unwrap();
    assert_eq!(first.phase, Phase::Idle);
    assert!(first.tree.ksm_merging_pages >= 2 * 8192, "{first:?}");
    let page = rustix::param::page_size() as u64;
    assert!(first.bytes_saved >= 8192 * page && first.bytes_saved < 14_000 * page, "{first:?}");
    assert!(first.ksmd_cpu_seconds.is_some_and(|seconds| seconds > 0.0), "{first:?}");
    assert_eq!(host.values(), before, "an idle drive asks for nothing");

    // Idle: nothing is scanned. Then new memory, half as much again, which must be found.
    std::thread::sleep(Duration::from_millis(1500));
    drive.tick().unwrap();
    assert_eq!(drive.phase(), Phase::Idle);
    for hoard in &mut pair {
        hoard.hold(4096, 2);
    }
    drive.tick().unwrap();
    assert_eq!(drive.phase(), Phase::Boost);
    host.sysfs.write("sleep_millisecs", "7").unwrap();
    assert!(drive.until_settled(Duration::from_secs(60)).unwrap());
    let second = drive.progress().unwrap();
    assert!(second.tree.ksm_merging_pages >= first.tree.ksm_merging_pages + 2 * 4000, "{second:?}");
    assert!(second.merges >= second.tree.ksm_merging_pages && second.bytes_saved_peak >= second.bytes_saved);
    drop(pair);
    assert_eq!(drive.progress().unwrap().bytes_saved, 0);
    // Seen to fail: it was heard of when the drive came to rest, and told to nobody.
    let foreign = drive.stop().unwrap().foreign;
    assert_eq!(foreign.iter().map(|foreign| foreign.found).collect::<Vec<_>>(), [7], "{foreign:?}");
    host.sysfs.write("sleep_millisecs", before[2].trim()).unwrap();
    assert_eq!(host.values(), before);
}

#[test]
fn a_newcomer_that_stays_is_worth_a_pass_and_one_that_does_not_stay_is_not() {
    let Some(host) = Host::lock() else { return };
    let mut pair = [Hoard::new(), Hoard::new()];
    for hoard in &mut pair {
        hoard.hold(2048, 3);
    }
    let mut drive = host.start(DriveSettings::default());
    assert!(drive.until_settled(Duration::from_secs(60)).unwrap());
    for _ in 0..20 {
        assert!(Command::new("true").status().unwrap().success());
        drive.tick().unwrap();
        assert_eq!(drive.phase(), Phase::Idle);
    }
    let mut sleeper = Command::new("sleep").arg("20").spawn().unwrap();
    drive.tick().unwrap();
    assert_eq!(drive.phase(), Phase::Idle);
    let deadline = Instant::now() + Duration::from_secs(10);
    while drive.phase() == Phase::Idle {
        assert!(Instant::now() < deadline, "the newcomer was not seen");
        std::thread::sleep(Duration::from_millis(200));
        drive.tick().unwrap();
    }
    assert_eq!(drive.phase(), Phase::Steady);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
}

#[test]
fn flat_out_stays_flat_out() {
    let Some(host) = Host::lock() else { return };
    let before = host.values();
    let mut pair = [Hoard::new(), Hoard::new()];
    for hoard in &mut pair {
        hoard.hold(4096, 4);
    }
    let mut drive = host.start(DriveSettings::flat_out());
    assert!(drive.until_settled(Duration::from_secs(60)).unwrap());
    assert_eq!(drive.phase(), Phase::Boost);
    let read = |name: &str| fs::read_to_string(host.sysfs.root().join(name)).unwrap().trim().to_owned();
    assert_eq!(read("pages_to_scan"), Rate::FLAT_OUT.pages_to_scan.to_string());
    assert_eq!((read("sleep_millisecs"), read("smart_scan")), ("0".into(), "0".into()));
    assert!(drive.progress().unwrap().tree.ksm_merging_pages >= 2 * 4096);
    drop(drive);
    assert_eq!(host.values(), before);
}

#[test]
fn memory_that_comes_and_goes_does_not_keep_ksmd_busy() {
    const CHURN: &str = r"
import ctypes, os, time
assert ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) == 0
end = time.time() + 22
while time.time() < end:
    held = []
    for step in range(15):
        held.append([os.urandom(4096) for _ in range(1500)])
        time.sleep(0.1)
";
    let Some(host) = Host::lock() else { return };
    let mut churn = Command::new("python3").args(["-c", CHURN]).spawn().unwrap();
    let mut drive = host.start(DriveSettings::default());
    let begin = Instant::now();
    let mut at_half = None;
    while begin.elapsed() < Duration::from_secs(20) {
        let pause = drive.tick().unwrap();
        if begin.elapsed() > Duration::from_secs(12) && at_half.is_none() {
            at_half = drive.last_progress().ksmd_cpu_seconds;
        }
        std::thread::sleep(pause);
    }
    let whole = drive.last_progress().ksmd_cpu_seconds;
    churn.wait().unwrap();
    let (Some(half), Some(whole)) = (at_half, whole) else { return println!("skipped: ksmd cannot be seen here") };
    assert!(whole - half < 1.0, "ksmd used {half} s of 12 s and {} s of the next 8 s", whole - half);
}
