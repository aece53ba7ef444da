//! The lease on the real KSM of this host, by several processes that are killed at any moment.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pagefold_ksm::{
    Advisor, Knob, KsmError, KsmSysfs, Lease, ProcessId, Rate, Repaired, StatePath, Wanted, check_writable, guard,
    host_lock,
};

const ROOT: &str = "/sys/kernel/mm/ksm";

/// KSM's settings belong to the whole host: one test at a time, and put back whatever happens.
struct Host {
    _lock: File,
    before: Vec<(Knob, String)>,
    sysfs: KsmSysfs,
    temp: tempfile::TempDir,
}

impl Host {
    fn lock() -> Option<Self> {
        let sysfs = KsmSysfs::host();
        if let Err(missing) = check_writable(&sysfs) {
            println!("skipped: {missing}");
            return None;
        }
        let lock = host_lock().unwrap();
        let before = Knob::ALL
            .into_iter()
            .filter_map(|knob| Some((knob, fs::read_to_string(format!("{ROOT}/{knob}")).ok()?)))
            .collect();
        let host = Self { _lock: lock, before, sysfs, temp: tempfile::tempdir().unwrap() };
        for (name, value) in [
            ("advisor_mode", "none"),
            ("run", "0"),
            ("pages_to_scan", "100"),
            ("sleep_millisecs", "20"),
            ("smart_scan", "1"),
        ] {
            host.write(name, value);
        }
        Some(host)
    }

    fn state(&self) -> StatePath {
        StatePath::at(self.temp.path().join("lease.json"))
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(format!("{ROOT}/{name}")).unwrap().trim().to_owned()
    }

    fn write(&self, name: &str, value: &str) {
        fs::write(format!("{ROOT}/{name}"), value).unwrap();
    }

    /// Everything that a lease may change, as the kernel shows it.
    fn all(&self) -> Vec<String> {
        Knob::ALL.iter().map(|knob| format!("{knob} {}", self.read(knob.file_name()))).collect()
    }

    fn acquire(&self, wanted: Wanted) -> Lease {
        Lease::acquire_at(&self.state(), &self.sysfs, wanted).unwrap().0
    }

    /// Another process that holds the lease.
    fn holder(&self, how: &str) -> Child {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_holder", "--ignored", "--nocapture"])
            .env("LEASE_STATE", self.state().as_path())
            .env("LEASE_HOW", how)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        assert!(out.lines().map_while(Result::ok).any(|line| line.contains("holding")), "the child holds nothing");
        child
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::write(format!("{ROOT}/run"), "0");
        let _ = fs::write(format!("{ROOT}/advisor_mode"), "none");
        for (knob, text) in &self.before {
            let value = match knob {
                Knob::AdvisorMode if text.contains("[scan-time]") => "scan-time",
                Knob::AdvisorMode => "none",
                _ => text.trim(),
            };
            let _ = fs::write(format!("{ROOT}/{knob}"), value);
        }
    }
}

fn fast() -> Wanted {
    Wanted {
        run: Some(true),
        rate: Some(Rate { pages_to_scan: 777, sleep_millisecs: 5 }),
        smart_scan: Some(false),
        use_zero_pages: Some(true),
        ..Wanted::default()
    }
}

fn slow() -> Wanted {
    Wanted { run: Some(true), rate: Some(Rate { pages_to_scan: 50, sleep_millisecs: 50 }), ..Wanted::default() }
}

#[test]
#[ignore = "the other process of the tests below"]
fn child_holder() {
    let Some(path) = std::env::var_os("LEASE_STATE") else { return };
    let path = StatePath::at(PathBuf::from(path));
    let sysfs = KsmSysfs::host();
    if std::env::var("LEASE_HOW").unwrap() == "churn" {
        println!("holding");
        loop {
            let (lease, _) = Lease::acquire_at(&path, &sysfs, slow()).unwrap();
            lease.update(fast()).unwrap();
            lease.update(Wanted::default()).unwrap();
            lease.update(Wanted { rate: None, advisor: Some(ADVISOR), ..fast() }).unwrap();
            drop(lease);
        }
    }
    let _lease = Lease::acquire_at(&path, &sysfs, slow()).unwrap();
    println!("holding");
    std::thread::sleep(Duration::from_secs(60));
}

const ADVISOR: Advisor = Advisor { target_scan_time: 10, max_cpu: 50, min_pages_to_scan: 600, max_pages_to_scan: 9000 };

#[test]
fn the_last_holder_gives_the_administrators_values_back() {
    let Some(host) = Host::lock() else { return };
    let before = host.all();
    let first = host.acquire(slow());
    assert_eq!(
        (host.read("run"), host.read("pages_to_scan"), host.read("sleep_millisecs")),
        ("1".into(), "50".into(), "50".into())
    );
    let second = host.acquire(fast());
    assert_eq!((host.read("pages_to_scan"), host.read("sleep_millisecs")), ("777".into(), "5".into()));
    assert_eq!((host.read("smart_scan"), host.read("use_zero_pages")), ("0".into(), "1".into()));
    assert_eq!(Lease::holders_at(&host.state()).unwrap().len(), 2);
    drop(second);
    assert_eq!(
        (host.read("run"), host.read("pages_to_scan"), host.read("smart_scan")),
        ("1".into(), "50".into(), "1".into())
    );
    first.update(Wanted::default()).unwrap();
    assert_eq!(host.all(), before, "a holder that asks for nothing changes nothing");
    first.update(fast()).unwrap();
    let repaired = first.release().unwrap();
    assert!(repaired.foreign.is_empty() && repaired.refused.is_empty(), "{repaired}");
    assert_eq!(host.all(), before);
    assert!(!host.state().as_path().exists(), "nothing is held, so nothing is recorded");
}

#[test]
fn the_kernels_order_with_the_advisor_on_is_kept() {
    let Some(host) = Host::lock() else { return };
    if !host.all().iter().any(|line| line.starts_with("advisor_mode")) {
        return println!("skipped: no advisor in this kernel");
    }
    host.write("advisor_mode", "scan-time");
    assert!(
        fs::write(format!("{ROOT}/pages_to_scan"), "9").is_err(),
        "the kernel refuses this while the advisor is on"
    );
    let before = host.all();
    let lease = host.acquire(fast());
    assert_eq!(host.read("advisor_mode"), "[none] scan-time");
    assert_eq!(host.read("pages_to_scan"), "777");
    lease.release().unwrap();
    assert_eq!(host.all(), before);
    host.write("advisor_mode", "none");
    // The other way round: the kernel resets pages_to_scan when the advisor goes, and the administrator's comes back.
    host.write("pages_to_scan", "123");
    let before = host.all();
    let lease = host.acquire(Wanted { run: Some(true), advisor: Some(ADVISOR), ..Wanted::default() });
    assert_eq!((host.read("advisor_mode"), host.read("advisor_max_cpu")), ("none [scan-time]".into(), "50".into()));
    let both = host.acquire(fast());
    assert_eq!((host.read("advisor_mode"), host.read("pages_to_scan")), ("[none] scan-time".into(), "777".into()));
    drop(both);
    assert_eq!(host.read("advisor_mode"), "none [scan-time]");
    let repaired = lease.release().unwrap();
    assert!(repaired.foreign.is_empty() && repaired.refused.is_empty(), "{repaired}");
    assert_eq!(host.all(), before);
}

#[test]
fn what_somebody_else_wrote_is_left_and_reported() {
    let Some(host) = Host::lock() else { return };
    let lease = host.acquire(fast());
    host.write("pages_to_scan", "4242");
    let repaired = lease.update(slow()).unwrap();
    assert_eq!(repaired.foreign.len(), 1);
    assert_eq!(
        (repaired.foreign[0].knob, repaired.foreign[0].ours, repaired.foreign[0].found),
        (Knob::PagesToScan, 777, 4242)
    );
    assert_eq!((host.read("pages_to_scan"), host.read("sleep_millisecs")), ("4242".into(), "50".into()));
    host.write("run", "0");
    let repaired = lease.release().unwrap();
    assert_eq!(repaired.foreign.len(), 1, "{repaired}");
    assert_eq!(
        (host.read("run"), host.read("pages_to_scan"), host.read("sleep_millisecs")),
        ("0".into(), "4242".into(), "20".into())
    );
}

/// Seen to fail: whoever looked first, as each `pagefold` command does, took the news away from who holds.
#[test]
fn each_holder_hears_of_a_foreign_write_once_whoever_looks_first() {
    let Some(host) = Host::lock() else { return };
    let (first, second) = (host.acquire(fast()), host.acquire(slow()));
    let mut killed = host.holder("hold");
    host.write("pages_to_scan", "4242");
    let seen = |repaired: &Repaired| repaired.foreign.iter().map(|foreign| foreign.found).collect::<Vec<_>>();
    assert_eq!(seen(&Lease::repair_at(&host.state(), &host.sysfs).unwrap()), [4242]);
    assert!(Lease::repair_at(&host.state(), &host.sysfs).unwrap().is_clean());
    let repaired = first.update(fast()).unwrap();
    assert_eq!((seen(&repaired), repaired.left), (vec![4242], vec![Knob::PagesToScan]));
    let repaired = first.update(fast()).unwrap();
    assert_eq!((seen(&repaired), repaired.left), (vec![], vec![Knob::PagesToScan]), "heard, and not to be had still");
    let (late, repaired) = Lease::acquire_at(&host.state(), &host.sysfs, fast()).unwrap();
    assert_eq!((seen(&repaired), repaired.left), (vec![], vec![Knob::PagesToScan]));
    late.release().unwrap();
    assert_eq!(seen(&second.release().unwrap()), [4242]);
    assert_eq!(seen(&first.release().unwrap()), [0; 0]);
    killed.kill().unwrap();
    killed.wait().unwrap();
    let repaired = Lease::repair_at(&host.state(), &host.sysfs).unwrap();
    assert_eq!((seen(&repaired), repaired.dead.len()), (vec![4242], 1), "the dead one's news go to who finds it");
    assert_eq!(host.read("pages_to_scan"), "4242");
}

/// Seen to fail: a wish that was in force already had never been written, so the stop was undone at the next change.
#[test]
fn a_setting_that_was_as_wished_already_is_left_to_who_writes_it() {
    let Some(host) = Host::lock() else { return };
    host.write("run", "1");
    let lease = host.acquire(slow());
    host.write("run", "0");
    let repaired = lease.update(fast()).unwrap();
    let foreign = repaired.foreign.iter().map(|foreign| (foreign.knob, foreign.ours, foreign.found));
    assert_eq!(foreign.collect::<Vec<_>>(), [(Knob::Run, 1, 0)]);
    assert_eq!((host.read("run"), host.read("pages_to_scan")), ("0".into(), "777".into()));
    // Written once more: it is his already.
    host.write("run", "1");
    assert!(lease.update(slow()).unwrap().foreign.is_empty());
    host.write("run", "0");
    assert!(lease.release().unwrap().foreign.is_empty());
    assert_eq!(host.read("run"), "0");
}

#[test]
fn a_value_that_was_never_ours_follows_the_administrator() {
    let Some(host) = Host::lock() else { return };
    let lease = host.acquire(slow());
    host.write("smart_scan", "0");
    assert!(lease.update(slow()).unwrap().foreign.is_empty());
    lease.update(fast()).unwrap();
    lease.release().unwrap();
    assert_eq!(host.read("smart_scan"), "0");
}

#[test]
fn a_holder_killed_is_found_by_the_next_use_and_by_repair() {
    let Some(host) = Host::lock() else { return };
    let before = host.all();
    let mut dead = host.holder("hold");
    dead.kill().unwrap();
    // Not yet reaped: a zombie holds nothing either.
    let deadline = Instant::now() + Duration::from_secs(5);
    while ProcessId::of(i32::try_from(dead.id()).unwrap()).is_some() && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(host.read("pages_to_scan"), "50");
    let (lease, repaired) = Lease::acquire_at(&host.state(), &host.sysfs, fast()).unwrap();
    assert_eq!(repaired.dead.len(), 1);
    assert_eq!(repaired.dead[0].process.pid, i32::try_from(dead.id()).unwrap());
    lease.release().unwrap();
    assert_eq!(host.all(), before, "the dead one's values were not taken for the administrator's");
    dead.wait().unwrap();

    let mut dead = host.holder("hold");
    dead.kill().unwrap();
    dead.wait().unwrap();
    let repaired = Lease::repair_at(&host.state(), &host.sysfs).unwrap();
    assert_eq!((repaired.dead.len(), repaired.changed.len()), (1, 3), "{repaired}");
    assert_eq!(host.all(), before);
    assert!(Lease::repair_at(&host.state(), &host.sysfs).unwrap().is_clean());
}

#[test]
fn kills_at_any_moment_of_two_holders_lose_no_value() {
    let Some(host) = Host::lock() else { return };
    host.write("pages_to_scan", "123");
    host.write("sleep_millisecs", "33");
    let before = host.all();
    let mut found = 0;
    let mut pause = 1_u64;
    for round in 0..60 {
        let mut pair = [host.holder("churn"), host.holder("churn")];
        // Anything between nothing and 12 ms, without a pattern.
        pause = pause.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_micros(pause >> 33 & 0x1fff));
        pair[round % 2].kill().unwrap();
        std::thread::sleep(Duration::from_micros(pause >> 50 & 0xfff));
        pair[1 - round % 2].kill().unwrap();
        for child in &mut pair {
            child.wait().unwrap();
        }
        let repaired = Lease::repair_at(&host.state(), &host.sysfs).unwrap();
        found += usize::from(!repaired.dead.is_empty());
        assert!(repaired.foreign.is_empty(), "round {round}: our own writes taken for another's: {repaired}");
        assert_eq!(host.all(), before, "round {round}: {repaired}");
    }
    assert!(found > 20, "only {found} of 60 kills hit a holder: the test tests nothing");
}

#[test]
fn the_guardian_ends_the_lease_of_a_killed_holder() {
    let Some(host) = Host::lock() else { return };
    let before = host.all();
    let mut holders = [host.holder("hold"), host.holder("hold")];
    let processes: Vec<_> =
        holders.iter().map(|child| ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap()).collect();
    let (path, sysfs) = (host.state(), host.sysfs.clone());
    let guardian = std::thread::spawn(move || {
        let mut seen = Vec::new();
        guard(&path, &sysfs, &processes, |ended| seen.push(ended.repaired.dead.len())).unwrap();
        seen
    });
    holders[0].kill().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(host.read("run"), "1", "the other one still holds");
    holders[1].kill().unwrap();
    assert_eq!(guardian.join().unwrap(), [1, 1]);
    assert_eq!(host.all(), before);
    for child in &mut holders {
        child.wait().unwrap();
    }
}

#[test]
fn a_setting_that_the_kernel_refuses_is_reported() {
    let Some(host) = Host::lock() else { return };
    let before = host.all();
    // Refused while pages are merged (EBUSY); taken otherwise, and given back.
    let busy = host.read("pages_shared") != "0";
    let (lease, repaired) =
        Lease::acquire_at(&host.state(), &host.sysfs, Wanted { max_page_sharing: Some(300), ..Wanted::default() })
            .unwrap();
    assert_eq!(repaired.refused.len(), usize::from(busy), "{repaired}");
    lease.release().unwrap();
    assert_eq!(host.all(), before);
    let gone = check_writable(&KsmSysfs::at(host.temp.path().join("nowhere")));
    assert!(matches!(gone, Err(KsmError::Missing { .. })));
}
