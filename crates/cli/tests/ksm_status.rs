//! `pagefold ksm status`, `set`, `restore` and `trace` as a user meets them.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use kernel::tracefs::Tracefs;
use kernel::{Pid, Pidfd, Signal};
use ksm::{Knob, KsmSysfs, Lease, StatePath, check_writable, host_lock};
use serde_json::Value;

/// KSM's settings belong to the whole host: one test at a time, and put back whatever happens.
struct Host {
    _lock: File,
    before: Vec<(Knob, String)>,
}

impl Host {
    fn lock() -> Option<Self> {
        if let Err(missing) = check_writable(&KsmSysfs::host()) {
            println!("skipped: {missing}");
            return None;
        }
        let lock = host_lock().unwrap();
        Lease::repair(&KsmSysfs::host()).unwrap();
        Some(Self { _lock: lock, before: settings() })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for (knob, value) in &self.before {
            let _ = KsmSysfs::host().write(knob.file_name(), value);
        }
        let _ = pagefold(&["restore"]).output();
    }
}

fn settings() -> Vec<(Knob, String)> {
    let sysfs = KsmSysfs::host();
    Knob::ALL.into_iter().filter_map(|knob| Some((knob, sysfs.knob(knob.file_name()).unwrap()?))).collect()
}

fn pagefold(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagefold"));
    command.arg("ksm").args(words).stdin(Stdio::null());
    command
}

fn output(words: &[&str]) -> Output {
    pagefold(words).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn signal(child: &Child, signal: Signal) {
    Pidfd::open(Pid(child.id().cast_signed())).unwrap().send_signal(signal).unwrap();
}

#[test]
fn status_tells_the_host_a_process_and_who_is_not_there() {
    if !KsmSysfs::host().exists() {
        return println!("skipped: no KSM");
    }
    let own = std::process::id().to_string();
    let seen = output(&["status", "--pid", &own, "--vmas", "--json"]);
    assert!(seen.status.success(), "{seen:?}");
    let document = json(&seen);
    assert!(document["host"]["counters"]["pages_sharing"].is_u64() && document["host"]["settings"]["run"].is_u64());
    assert_eq!(document["processes"][0]["pid"], std::process::id());
    assert!(document["processes"][0]["ksm_rmap_items"].is_u64(), "{document}");
    assert!(text(&output(&["status"]).stdout).contains("pages_volatile"));
    let missing = output(&["status", "--pid", "2147483647"]);
    assert_eq!(missing.status.code(), Some(1), "{missing:?}");
    assert!(text(&missing.stdout).contains("no such process"));
    for wrong in [["status", "--pid", "0"], ["status", "--watch", "0"], ["status", "--vmas", "1"]] {
        assert_eq!(output(&wrong).status.code(), Some(2), "{wrong:?}");
    }
    let nowhere = output(&["status", "--cgroup", "/no/such"]);
    assert!(nowhere.status.code() == Some(1) && text(&nowhere.stderr).contains("no cgroup /no/such"), "{nowhere:?}");
}

#[test]
fn a_watch_gives_a_line_each_time_and_ends_by_a_signal_or_without_a_reader() {
    if !KsmSysfs::host().exists() {
        return println!("skipped: no KSM");
    }
    let mut watch = pagefold(&["status", "--watch", "0.2", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        let document: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert!(document["now"]["seconds"].as_f64().unwrap() > 0.0, "{document}");
    }
    signal(&watch, Signal::INT);
    assert!(watch.wait().unwrap().success());
    // Seen to fail: the reader's end was noticed at the next look only.
    let mut watch = pagefold(&["status", "--watch", "60"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(watch.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("sharing"), "{line}");
    let pidfd = Pidfd::open(Pid(watch.id().cast_signed())).unwrap();
    let ended = pidfd.wait_exited(Duration::from_secs(20)).unwrap();
    // Whatever it does, nothing is left of it.
    let _ = watch.kill();
    assert!(watch.wait().unwrap().success() && ended, "nobody reads any more");
}

/// Seen to fail: it waited, and said nothing.
#[test]
fn who_waits_for_the_settings_says_for_whom() {
    let Some(_host) = Host::lock() else { return };
    assert!(output(&["set", "pages_to_scan=321"]).status.success());
    let lock = File::options().write(true).open(StatePath::for_this_user().as_path().with_extension("lock")).unwrap();
    lock.lock().unwrap();
    let mut waiting = pagefold(&["restore"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = waiting.stderr.take().unwrap();
    kernel::pidfd::poll_in(stderr.as_fd(), Some(Duration::from_secs(10))).unwrap();
    lock.unlock().unwrap();
    let mut line = String::new();
    stderr.read_to_string(&mut line).unwrap();
    assert!(waiting.wait().unwrap().success());
    let who = format!("({}), who is at KSM's settings", std::process::id());
    assert!(line.contains(&who) && line.contains("ksm-lease.lock"), "{line}");
}

#[test]
fn settings_are_checked_set_listed_and_put_back() {
    let Some(_host) = Host::lock() else { return };
    let before = settings();
    for wrong in [
        &["set", "pages_to_scan"][..],
        &["set", "pages_to_scan=-1"],
        &["set", "full_scans=0"],
        &["set", "pages_to_scan=1", "pages_to_scan=2"],
        &["set", "run=2"],
        &["set", "--unmerge-host"],
        &["set", "run=2", "pages_to_scan=5", "--unmerge-host"],
    ] {
        let refused = output(wrong);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(!refused.stderr.is_empty());
    }
    assert_eq!(settings(), before);
    let set = output(&["set", "pages_to_scan=321", "sleep_millisecs=33ms", "--json"]);
    assert!(set.status.success(), "{set:?}");
    assert_eq!(json(&set)["changed"]["pages_to_scan"]["to"], "321");
    let listed = json(&output(&["set", "--json"]));
    assert_eq!(listed["sleep_millisecs"]["value"], "33");
    let was = &before.iter().find(|(knob, _)| *knob == Knob::SleepMillisecs).unwrap().1;
    assert_eq!(listed["sleep_millisecs"]["before"], **was);
    // Somebody else comes between.
    KsmSysfs::host().write("pages_to_scan", "4242").unwrap();
    let back = output(&["restore"]);
    assert_eq!(back.status.code(), Some(1), "{back:?}");
    assert!(text(&back.stdout).contains("pages_to_scan left at 4242"), "{back:?}");
    let back = output(&["restore", "--force"]);
    assert!(back.status.success(), "{back:?}");
    assert_eq!(settings(), before);
    assert_eq!(text(&output(&["restore"]).stdout), "nothing to change\n");
}

#[test]
fn a_user_without_rights_sees_and_does_not_set() {
    if !rustix::process::geteuid().is_root() || !KsmSysfs::host().exists() {
        return println!("skipped: root, to become another");
    }
    // The binary may lie where only root goes: a copy, and nobody's group and user.
    let temp =
        tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir().unwrap();
    let copy = temp.path().join("pagefold");
    testing::copy_program(env!("CARGO_BIN_EXE_pagefold"), &copy);
    let as_nobody = |words: &[&str]| {
        let mut command = Command::new(&copy);
        command.env("XDG_RUNTIME_DIR", "/nonexistent").arg("ksm").args(words);
        std::os::unix::process::CommandExt::uid(&mut command, 65_534);
        command.output().unwrap()
    };
    let seen = as_nobody(&["status", "--json"]);
    assert!(seen.status.success(), "{seen:?}");
    assert!(json(&seen)["unreadable"].as_u64().unwrap() > 0 && json(&seen)["host"]["bytes_of_ended"].is_null());
    let denied = as_nobody(&["status", "--pid", "1"]);
    assert_eq!(denied.status.code(), Some(3), "{denied:?}");
    for words in [&["set", "pages_to_scan=5"][..], &["restore"], &["trace", "--for", "1"]] {
        let denied = as_nobody(words);
        assert!(denied.status.code() == Some(3) && text(&denied.stderr).contains("root"), "{denied:?}");
    }
}

/// A trace that says that it is under way.
fn tracing() -> Child {
    let mut trace = pagefold(&["trace", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(trace.stderr.as_mut().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("merged")), "it says nothing");
    trace
}

#[test]
fn a_trace_ends_by_a_signal_and_what_a_killed_one_left_is_removed_by_the_next() {
    if let Err(error) = Tracefs::open() {
        return println!("skipped: {error}");
    }
    let mut trace = tracing();
    signal(&trace, Signal::TERM);
    let mut said = String::new();
    trace.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(trace.wait().unwrap().success());
    let document: Value = serde_json::from_str(&said).unwrap();
    assert!(document["lost_events"] == 0 && document["buffer_bytes"].as_u64().unwrap() > 0, "{document}");
    let mut killed = tracing();
    killed.kill().unwrap();
    killed.wait().unwrap();
    let next = output(&["trace", "--for", "0.3"]);
    assert!(next.status.success(), "{next:?}");
    let left = format!("pagefold-{}-", killed.id());
    assert!(text(&next.stderr).contains(&format!("removed {left}")), "{next:?}");
    assert!(Tracefs::open().unwrap().remove_dead().unwrap().iter().all(|name| !name.starts_with(&left)));
}
