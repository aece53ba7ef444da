//! Everybody who drives ksmd at once: two runs, an advisor and a sweep, each killed at a moment of its own.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kernel::{Pid, Pidfd, Signal};
use ksm::{Knob, KsmSysfs, Lease, StatePath, Tree, check_writable, host_lock};

const ROUNDS: u64 = 4;

fn settings() -> Vec<(Knob, String)> {
    let sysfs = KsmSysfs::host();
    Knob::ALL.into_iter().filter_map(|knob| Some((knob, sysfs.knob(knob.file_name()).unwrap()?))).collect()
}

fn pagefold(words: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_pagefold"))
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap()
}

/// Numbers that look random and are the same each time (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

const HOARD: &str = "import mmap, time\n\
    area = mmap.mmap(-1, 4000 * 4096, flags=34)\n\
    for page in range(4000): area[page * 4096:page * 4096 + 8] = b'%8d' % (page // 2)\n\
    time.sleep(60)\n";
const RUN: [&str; 8] = ["run", "--backend", "ksm", "--quiet", "--", "python3", "-c", HOARD];

fn wait_for_holders(number: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Lease::holders_at(&StatePath::for_this_user()).unwrap().len() < number {
        assert!(Instant::now() < deadline, "not all of them hold the settings");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for its turn, which lasts as long as the file is open; then the settings are the administrator's. `None` if they
/// cannot be written.
fn turn() -> Option<(File, Vec<(Knob, String)>)> {
    if let Err(missing) = check_writable(&KsmSysfs::host()) {
        println!("skipped: {missing}");
        return None;
    }
    let lock = host_lock().unwrap();
    Lease::repair(&KsmSysfs::host()).unwrap();
    Some((lock, settings()))
}

#[test]
fn the_administrators_settings_come_back_whoever_is_killed_when() {
    let Some((_lock, before)) = turn() else { return };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..ROUNDS {
        let advise = ["ksm", "advise", "--target-scan-time", "1", "--no-rest", "--quiet"];
        let sweep = ["ksm", "sweep", "--no-warm-up", "--quiet", "--for", "1", "--grid", "pages_to_scan=500,5000", "--"];
        let sweep = [&sweep[..], &["python3", "-c", HOARD]].concat();
        let mut all = vec![pagefold(&RUN), pagefold(&RUN), pagefold(&advise), pagefold(&sweep)];
        wait_for_holders(4);
        assert_ne!(settings(), before, "round {round}: ksmd is driven");
        let groups: Vec<_> = all.iter().map(rustix::process::Pid::from_child).collect();
        while !all.is_empty() {
            std::thread::sleep(Duration::from_millis(random.below(700)));
            let mut next = all.swap_remove(usize::try_from(random.below(all.len() as u64)).unwrap());
            next.kill().unwrap();
            next.wait().unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while settings() != before {
            assert!(Instant::now() < deadline, "round {round}: {:?} and not {before:?}", settings());
            std::thread::sleep(Duration::from_millis(20));
        }
        for group in groups {
            // The commands that lost who started them; some have ended.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        assert!(Lease::holders_at(&StatePath::for_this_user()).unwrap().is_empty(), "round {round}");
    }
}

#[test]
fn runs_that_are_killed_with_their_guardians_are_tidied_up_after_by_the_next_use() {
    let Some((_lock, before)) = turn() else { return };
    let mut runs = [pagefold(&RUN), pagefold(&RUN)];
    wait_for_holders(2);
    let kill = |pid: i32| Pidfd::open(Pid(pid)).unwrap().send_signal(Signal::KILL).unwrap();
    let is_guardian = |pid: &i32| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"pagefold-guardian"))
    };
    let below = |run: &Child| Tree::below(run.id().cast_signed()).members().into_iter().map(|one| one.process.pid);
    let guardians: Vec<i32> = runs.iter().flat_map(below).filter(is_guardian).collect();
    assert_eq!(guardians.len(), 2);
    // The guardians first: each would see the other ones' death.
    guardians.into_iter().for_each(kill);
    let groups: Vec<_> = runs.iter().map(rustix::process::Pid::from_child).collect();
    for run in &mut runs {
        run.kill().unwrap();
        run.wait().unwrap();
    }
    for group in groups {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
    assert_ne!(settings(), before, "nobody is left to put them back");
    let next = Command::new(env!("CARGO_BIN_EXE_pagefold")).args(["ksm", "status"]).output().unwrap();
    assert_eq!(settings(), before);
    let said = String::from_utf8_lossy(&next.stderr);
    assert!(next.status.success() && said.matches("had died holding KSM's settings").count() == 2, "{said}");
    assert!(Lease::holders_at(&StatePath::for_this_user()).unwrap().is_empty());
}
