//! Whatever ends a merge, the administrator's settings come back.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use kernel::{Pid, Pidfd, Signal};
use ksm::{KsmSysfs, ProcessId, Tree};

use crate::host::{Host, merge, merged_pages, settings, wait_until};
use crate::target::Target;

/// The guardian of a merge.
fn guardians(merge: &Child) -> Vec<ProcessId> {
    let named = |process: &ProcessId| {
        fs::read(Path::new("/proc").join(process.pid.to_string()).join("cmdline"))
            .is_ok_and(|line| line.starts_with(b"pagefold-guardian"))
    };
    Tree::below(merge.id().cast_signed()).members().into_iter().map(|member| member.process).filter(named).collect()
}

fn kill(pid: i32) {
    if let Ok(pidfd) = Pidfd::open(Pid(pid)) {
        let _ = pidfd.send_signal(Signal::KILL);
    }
}

#[test]
fn a_merge_that_is_killed_anywhere_leaves_settings_and_process_as_they_should_be() {
    let Some(mut host) = Host::lock() else { return };
    let sysfs = KsmSysfs::host();
    sysfs.write("pages_to_scan", "123").unwrap();
    sysfs.write("sleep_millisecs", "33").unwrap();
    host.before = settings();
    let mut target = Target::start();
    let mut random = 4_321_u64;
    let (mut with_guardian, mut changed) = (0, 0);
    for round in 0..40 {
        let range = target.hold(4096, 2, 100 + round);
        let mut run = merge(target.pid(), range).stderr(Stdio::null()).spawn().unwrap();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if round % 2 == 0 {
            // While ksmd is driven, or shortly after.
            while settings() == host.before && run.try_wait().unwrap().is_none() {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_micros((random >> 33) % 50_000));
        } else {
            std::thread::sleep(Duration::from_micros((random >> 33) % 700_000));
        }
        let both = round % 3 == 2;
        if both {
            // The guardian first: it would see the other one's death.
            let guardians = guardians(&run);
            with_guardian += guardians.len();
            guardians.iter().for_each(|guardian| kill(guardian.pid));
        }
        run.kill().unwrap();
        run.wait().unwrap();
        changed += usize::from(settings() != host.before);
        if both {
            // What even the guardian could not, the next call does, whatever it is for.
            let next =
                std::process::Command::new(env!("CARGO_BIN_EXE_pagefold")).args(["merge", "--pid", "1"]).output();
            assert_eq!(next.unwrap().status.code(), Some(3));
            assert_eq!(settings(), host.before, "round {round}");
        }
        host.wait_until_restored();
        assert_eq!(target.ask("drop"), "dropped");
    }
    println!("{changed} of 40 kills found the settings changed, {with_guardian} took a guardian along");
    assert!(changed > 0 && with_guardian > 0, "nothing was tried");
    assert_eq!(target.wrong_words(), 0);
    // It can be merged as if nothing had been.
    let range = target.hold(1024, 2, 99);
    assert!(merge(target.pid(), range).stderr(Stdio::null()).status().unwrap().success());
    assert_eq!(merged_pages(target.pid()), 1024);
}

#[test]
fn a_signal_ends_it_politely() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    // Much enough that it is under way for a while.
    let range = target.hold(60_000, 2, 20);
    for signal in [Signal::INT, Signal::TERM] {
        let mut run = merge(target.pid(), range).stderr(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        while settings() == host.before && run.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(60), "ksmd is not driven");
            std::thread::sleep(Duration::from_millis(1));
        }
        Pidfd::open(Pid(run.id().cast_signed())).unwrap().send_signal(signal).unwrap();
        let status = run.wait().unwrap();
        assert_eq!(status.signal(), Some(signal.as_raw()), "{status:?}");
        host.wait_until_restored();
    }
    wait_until("the guardians have gone", || {
        !fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| line.starts_with(b"pagefold-guardian\0ksm-guardian"))
        })
    });
    assert_eq!(target.wrong_words(), 0);
}
