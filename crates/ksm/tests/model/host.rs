//! The host's KSM, stepped, and children whose pages are dictated.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use kernel::Pid;
use kernel::ksm_sysfs::{KsmCounters, ksm_stat};
use page::ksmd::{Advisor, Settings};
use pagefold_ksm::{KsmSysfs, Ksmd, Lease, check_writable, host_lock};

/// Sleeps that only a write ends.
const ASLEEP: [&str; 2] = ["3600000", "3600001"];

/// KSM's settings, for one test at a time, and put back whatever happens. Made before the children, so that these are
/// gone first.
pub(crate) struct Host {
    _lock: File,
    sysfs: KsmSysfs,
    before: Vec<(&'static str, String)>,
    steps: usize,
    cpu_before: Option<Duration>,
}

impl Host {
    pub(crate) fn lock() -> Option<Self> {
        let sysfs = KsmSysfs::host();
        if let Err(missing) = check_writable(&sysfs) {
            println!("skipped: {missing}");
            return None;
        }
        if Command::new("python3").arg("--version").output().is_err() {
            println!("skipped: no python3 for the processes to merge");
            return None;
        }
        let lock = host_lock().unwrap();
        Lease::repair(&sysfs).unwrap();
        let before = sysfs.knobs().unwrap();
        Some(Self { _lock: lock, sysfs, before, steps: 0, cpu_before: None })
    }

    /// Writes one setting.
    pub(crate) fn write(&self, knob: &str, value: &str) {
        self.sysfs.write(knob, value).unwrap_or_else(|error| panic!("{error}"));
    }

    pub(crate) fn read(&self, name: &str) -> String {
        self.sysfs.read(name).unwrap().unwrap()
    }

    /// `ksm_zero_pages` with its sign.
    pub(crate) fn zero_pages(&self) -> Option<i64> {
        self.sysfs.number("ksm_zero_pages").unwrap()
    }

    pub(crate) fn counters(&self) -> KsmCounters {
        self.sysfs.counters().unwrap()
    }

    /// Gives ksmd these settings except for its speed: every [`Host::step`] is a pass. Says so and is false where other
    /// memory of the host is mergeable.
    pub(crate) fn step_only(&mut self, settings: &Settings) -> bool {
        self.stop();
        self.write("pages_to_scan", "4000000000");
        self.clean();
        if !self.alone() {
            return false;
        }
        self.write_policy(settings);
        true
    }

    /// Gives ksmd these settings and lets it run. False as for [`Host::step_only`].
    pub(crate) fn run(&mut self, settings: &Settings) -> bool {
        self.stop();
        self.write("pages_to_scan", "4000000000");
        self.clean();
        self.write("run", "0");
        if !self.alone() {
            return false;
        }
        self.write_policy(settings);
        self.write("pages_to_scan", &settings.pages_to_scan.to_string());
        if let Advisor::ScanTime(advisor) = settings.advisor {
            self.write("advisor_max_cpu", &advisor.max_cpu.to_string());
            self.write("advisor_min_pages_to_scan", &advisor.min_pages_to_scan.to_string());
            self.write("advisor_max_pages_to_scan", &advisor.max_pages_to_scan.to_string());
            self.write("advisor_target_scan_time", &advisor.target_scan_time.to_string());
            self.write("advisor_mode", "scan-time");
        }
        self.cpu_before = Ksmd::find().and_then(|ksmd| ksmd.cpu_time());
        self.write("run", "1");
        self.write("sleep_millisecs", &settings.sleep_millisecs.to_string());
        true
    }

    fn write_policy(&self, settings: &Settings) {
        self.write("smart_scan", if settings.smart_scan { "1" } else { "0" });
        self.write("use_zero_pages", if settings.use_zero_pages { "1" } else { "0" });
        self.write("max_page_sharing", &settings.max_page_sharing.to_string());
    }

    fn stop(&self) {
        self.write("run", "0");
        self.write("advisor_mode", "none");
    }

    /// Finishes a pass that somebody left, and has ksmd forget the processes that are gone.
    fn clean(&mut self) {
        let scans = self.full_scans();
        self.write("sleep_millisecs", ASLEEP[0]);
        self.write("run", "1");
        self.until_after(scans);
        self.step();
        self.step();
    }

    /// ksmd's processor time since boot when [`Host::run`] let it go.
    pub(crate) fn cpu_before(&self) -> Option<Duration> {
        self.cpu_before
    }

    /// One whole pass.
    pub(crate) fn step(&mut self) {
        let scans = self.full_scans();
        self.steps += 1;
        self.write("sleep_millisecs", ASLEEP[self.steps % 2]);
        self.until_after(scans);
    }

    fn full_scans(&self) -> u64 {
        self.counters().full_scans.unwrap()
    }

    fn until_after(&self, scans: u64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.full_scans() == scans {
            assert!(Instant::now() < deadline, "ksmd does not end its pass");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.full_scans(), scans + 1, "a wake is one pass");
    }

    /// Whether nothing but the children of this process is mergeable.
    fn alone(&self) -> bool {
        let own = std::process::id().to_string();
        for entry in fs::read_dir("/proc").unwrap() {
            let Some(pid) = entry.unwrap().file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Ok(stat) = ksm_stat(Pid(pid)) else { continue };
            let marked = [stat.ksm_merge_any, stat.ksm_mergeable].contains(&Some(true));
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            if (marked || stat.ksm_rmap_items > Some(0)) && parent.map(str::trim) != Some(own.as_str()) {
                println!("skipped: process {pid} has mergeable memory, the counters are not the children's alone");
                return false;
            }
        }
        true
    }

    /// ksmd's records of the children's pages.
    pub(crate) fn rmap_items(&self, children: &[Hoard]) -> u64 {
        children.iter().map(|child| ksm_stat(child.pid()).unwrap().ksm_rmap_items.unwrap()).sum()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Without a pass ksmd goes on counting the children, and refuses another max_page_sharing.
        let _ = self.sysfs.write("advisor_mode", "none");
        let _ = self.sysfs.write("run", "1");
        let deadline = Instant::now() + Duration::from_secs(20);
        let _ = self.sysfs.write("pages_to_scan", "4000000000");
        while self.counters().pages_shared.unwrap_or(0) > 0 && Instant::now() < deadline {
            self.steps += 1;
            let _ = self.sysfs.write("sleep_millisecs", ASLEEP[self.steps % 2]);
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.sysfs.write("run", "0");
        for (knob, value) in &self.before {
            // pages_to_scan is refused under an advisor, which sets it itself.
            let _ = self.sysfs.write(knob, value);
        }
    }
}

/// A process with one mergeable area whose pages hold what it is told.
pub(crate) struct Hoard {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

/// Reads lines of `page:content`. Content 0 gives the page back, 1 is zeros, others are written at its start and end.
const HOARD: &str = r"
import mmap, sys
size, pages = mmap.PAGESIZE, int(sys.argv[1])
area = mmap.mmap(-1, pages * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
area.madvise(mmap.MADV_MERGEABLE)
print('here', flush=True)
for line in sys.stdin:
    for word in line.split():
        page, content = map(int, word.split(':'))
        at = page * size
        if content == 0:
            area.madvise(mmap.MADV_DONTNEED, at, size)
        else:
            tag = (0 if content == 1 else content).to_bytes(8, 'big')
            area[at:at + size] = tag + bytes(size - 16) + tag
    print('done', flush=True)
";

impl Hoard {
    pub(crate) fn new(pages: u64) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", HOARD, &pages.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut hoard = Self { child, to, from };
        hoard.expect("here\n");
        hoard
    }

    fn expect(&mut self, line: &str) {
        let mut said = String::new();
        self.from.read_line(&mut said).unwrap();
        assert_eq!(said, line);
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(self.child.id().cast_signed())
    }

    /// Writes the pages that differ.
    pub(crate) fn change(&mut self, before: &[u64], now: &[u64]) {
        let changes = before.iter().zip(now).enumerate().filter(|(_, (before, now))| before != now);
        let words: Vec<String> = changes.map(|(page, (_, content))| format!("{page}:{content}")).collect();
        writeln!(self.to.as_mut().unwrap(), "{}", words.join(" ")).unwrap();
        self.expect("done\n");
    }
}

impl Drop for Hoard {
    fn drop(&mut self) {
        self.to = None;
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}
