//! The cases of LTP's testcases/kernel/mem/ksm, on less memory: 8 MiB for each of three processes instead of 128.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kernel::Pid;
use pagefold_ksm::Wanted;

use super::stand::{Host, PATIENCE};
use super::worker::{Memory, Worker};

/// Pages of one process, and of all three.
const PAGES: u64 = 2048;
const ALL: u64 = 3 * PAGES;

/// A process's memory in one piece, or in several.
struct Process {
    worker: Worker,
    units: Vec<Memory>,
}

impl Process {
    fn new(units: u64, prepare: impl FnOnce(&mut Worker)) -> Self {
        let mut worker = Worker::new();
        prepare(&mut worker);
        let units = (0..units).map(|_| worker.map(PAGES / units, 0, true)).collect();
        Self { worker, units }
    }

    fn fill(&mut self, byte: u8, last: u8) {
        for unit in &self.units {
            self.worker.fill(*unit, byte);
        }
        let end = self.units.last().unwrap().range().end().0;
        self.worker.ask(&format!("byte {} {last}", end - 1));
    }

    fn holds(&mut self, byte: u8, last: u8) -> bool {
        let (end, units) = self.units.split_last().unwrap();
        units.iter().all(|unit| self.worker.check(*unit, byte, byte)) && self.worker.check(*end, byte, last)
    }
}

/// A phase of ksm01.
struct Phase {
    /// What each process writes: all bytes, and the last one.
    contents: [(u8, u8); 3],
    /// (shared, sharing, volatile, unshared) after three passes.
    expected: [u64; 4],
}

const PHASES: [Phase; 4] = [
    Phase { contents: [(b'c', b'c'), (b'a', b'a'), (b'a', b'a')], expected: [2, ALL - 2, 0, 0] },
    Phase { contents: [(b'c', b'c'), (b'b', b'b'), (b'a', b'a')], expected: [3, ALL - 3, 0, 0] },
    Phase { contents: [(b'd', b'd'), (b'd', b'd'), (b'd', b'd')], expected: [1, ALL - 1, 0, 0] },
    Phase { contents: [(b'd', b'd'), (b'd', b'e'), (b'd', b'd')], expected: [1, ALL - 2, 0, 1] },
];

fn phases(host: &Host, units: u64, prepare: impl Fn(&mut Worker)) {
    // All may share one page.
    let sharing = u32::try_from(ALL).unwrap();
    let wanted = Wanted { max_page_sharing: Some(sharing), merge_across_nodes: Some(true), ..Wanted::default() };
    // Before anything is merged: the kernel takes it at no other time, and it stays through all phases.
    let mut lease = Some(host.merge(wanted));
    let mut processes: Vec<Process> = (0..3).map(|_| Process::new(units, &prepare)).collect();
    for Phase { contents, expected } in PHASES {
        for (process, (byte, last)) in processes.iter_mut().zip(contents) {
            process.fill(byte, last);
        }
        let held = lease.take().unwrap_or_else(|| host.merge(wanted));
        host.scans(3);
        held.release().unwrap();
        assert_eq!(counted(host), expected, "{contents:?}: (shared, sharing, volatile, unshared)");
        for (process, (byte, last)) in processes.iter_mut().zip(contents) {
            assert!(process.holds(byte, last), "{contents:?}");
        }
    }
    host.unmerge();
    assert_eq!(counted(host), [0; 4]);
}

/// (shared, sharing, volatile, unshared), with ksmd standing still, so that they hold still too.
fn counted(host: &Host) -> [u64; 4] {
    let counters = host.counters();
    [counters.pages_shared, counters.pages_sharing, counters.pages_volatile, counters.pages_unshared]
}

#[test]
fn ksm01() {
    let Some(host) = Host::lock_alone() else { return };
    phases(&host, 8, |_| {});
}

#[test]
fn ksm01_1() {
    let Some(host) = Host::lock_alone() else { return };
    phases(&host, 1, |_| {});
}

/// A cgroup of a test's own, removed with it.
struct Cgroup(PathBuf);

impl Cgroup {
    /// In the hierarchy of this controller, of version 1 or 2; `None` if there is none.
    fn new(controller: &str, settings: &[(&str, &str)]) -> Option<Self> {
        let first = Path::new("/sys/fs/cgroup").join(controller);
        let second = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let root = std::iter::once(first)
            .filter(|root| root.join("tasks").exists())
            .chain(
                second
                    .into_iter()
                    .filter(|root| fs::write(root.join("cgroup.subtree_control"), format!("+{controller}")).is_ok()),
            )
            .next()?;
        let folder = root.join(format!("pagefold-conformance-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let cgroup = Self(folder);
        for (name, value) in settings {
            // The same limit has two names.
            let name = match *name {
                "memory.max" if !cgroup.0.join(name).exists() => "memory.limit_in_bytes",
                name => name,
            };
            fs::write(cgroup.0.join(name), value).unwrap();
        }
        Some(cgroup)
    }

    fn add(&self, pid: Pid) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        let members = kernel::membership::cgroup_members(&self.0).unwrap();
        assert!(members.contains(&pid));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its members are zombies until they are waited for.
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn cpuset() -> Option<Cgroup> {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    Cgroup::new("cpuset", &[("cpuset.cpus", online.trim()), ("cpuset.mems", "0")])
}

fn memory() -> Option<Cgroup> {
    Cgroup::new("memory", &[("memory.max", "268435456")])
}

/// As ksm01 with memory of one node, by mempolicy and then by a cpuset.
#[test]
fn ksm02() {
    let Some(host) = Host::lock_alone() else { return };
    let Some(cpuset) = cpuset() else { return println!("skipped: no cpuset controller") };
    phases(&host, 8, |worker| {
        worker.ask("bind 0");
    });
    phases(&host, 8, |worker| cpuset.add(worker.pid()));
}

#[test]
fn ksm02_1() {
    let Some(host) = Host::lock_alone() else { return };
    let Some(cpuset) = cpuset() else { return println!("skipped: no cpuset controller") };
    phases(&host, 1, |worker| cpuset.add(worker.pid()));
}

/// As ksm01 below a memory limit.
#[test]
fn ksm03() {
    let Some(host) = Host::lock_alone() else { return };
    let Some(memory) = memory() else { return println!("skipped: no memory controller") };
    phases(&host, 8, |worker| memory.add(worker.pid()));
}

#[test]
fn ksm03_1() {
    let Some(host) = Host::lock_alone() else { return };
    let Some(memory) = memory() else { return println!("skipped: no memory controller") };
    phases(&host, 1, |worker| memory.add(worker.pid()));
}

/// A memory limit, a mempolicy and a cpuset at once.
#[test]
fn ksm04() {
    let Some(host) = Host::lock_alone() else { return };
    let (Some(memory), Some(cpuset)) = (memory(), cpuset()) else {
        return println!("skipped: no memory or cpuset controller");
    };
    phases(&host, 8, |worker| {
        memory.add(worker.pid());
        cpuset.add(worker.pid());
        worker.ask("bind 0");
    });
}

/// CVE-2011-2183: a process that crashes while ksmd is at its memory. The kernel goes on, and so does ksmd.
#[test]
fn ksm05() {
    let Some(host) = Host::lock_alone() else { return };
    let tainted = || fs::read_to_string("/proc/sys/kernel/tainted").unwrap();
    let (before, lease) = (tainted(), host.merge(Wanted::default()));
    let mut worker = Worker::new();
    // Without anybody to scan ksmd sleeps.
    worker.map(128, 7, true);
    for _ in 0..100 {
        assert_eq!(worker.ask("crash 128"), "11", "the child crashes");
    }
    host.scans(1);
    lease.release().unwrap();
    assert_eq!(tainted(), before, "the kernel has warned");
}

/// Smart scan: a page that finds no equal is passed over at least every second time.
#[test]
fn ksm07() {
    let Some(host) = Host::lock_alone() else { return };
    let skipped = || host.sysfs.counters().unwrap().pages_skipped;
    let Some(first) = skipped() else { return println!("skipped: no smart scan in this kernel") };
    let mut worker = Worker::new();
    let page = worker.map(1, b'7', true);
    let lease = host.merge(Wanted { smart_scan: Some(true), ..Wanted::default() });
    let (begin, deadline) = (host.counters().full_scans, Instant::now() + PATIENCE);
    while host.counters().full_scans < begin + 100 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    lease.release().unwrap();
    let (skipped, scans) = (skipped().unwrap() - first, host.counters().full_scans - begin);
    assert!(skipped * 2 >= scans, "{skipped} times passed over in {scans} passes");
    assert!(worker.check(page, b'7', b'7'));
}
