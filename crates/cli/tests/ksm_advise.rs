//! `pagefold ksm advise` as a user meets it.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kernel::{Pid, Pidfd, Signal};
use ksm::{Knob, KsmSysfs, Lease, check_writable, host_lock};
use serde_json::Value;

/// KSM's settings belong to the whole host: one test at a time.
struct Host(#[expect(dead_code, reason = "held")] File);

impl Host {
    fn lock() -> Option<Self> {
        if let Err(missing) = check_writable(&KsmSysfs::host()) {
            println!("skipped: {missing}");
            return None;
        }
        let lock = host_lock().unwrap();
        Lease::repair(&KsmSysfs::host()).unwrap();
        Some(Self(lock))
    }
}

fn settings() -> Vec<(Knob, String)> {
    let sysfs = KsmSysfs::host();
    Knob::ALL.into_iter().filter_map(|knob| Some((knob, sysfs.knob(knob.file_name()).unwrap()?))).collect()
}

fn advise(words: &[&str]) -> Command {
    let mut advise = Command::new(env!("CARGO_BIN_EXE_pagefold"));
    advise.args(["ksm", "advise"]).args(words);
    advise
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn lines(output: &Output) -> Vec<Value> {
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A process with 10,000 pages, pairs of equal ones, that is ended when this goes.
struct Hoard(Child);

impl Hoard {
    fn start() -> Self {
        const HOARD: &str = "import ctypes, mmap, time\n\
            assert ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) == 0\n\
            area = mmap.mmap(-1, 10000 * 4096, flags=34)\n\
            for page in range(10000): area[page * 4096:page * 4096 + 8] = b'%8d' % (page // 2)\n\
            print('held', flush=True)\n\
            time.sleep(600)\n";
        let mut child = Command::new("python3").args(["-c", HOARD]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "held\n");
        Self(child)
    }
}

impl Drop for Hoard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An advisor that runs until it is told to end.
fn started(words: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = advise(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

/// Reads lines until ksmd has been asked for something.
fn until_asked(out: &mut impl std::io::BufRead) {
    for line in out.lines() {
        let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
        if line["event"] == "decision" && !line["rate"].is_null() {
            return;
        }
    }
    panic!("it ended without having asked ksmd for anything");
}

#[test]
fn lines_and_a_summary_and_the_settings_come_back() {
    let Some(_host) = Host::lock() else { return };
    let before = settings();
    let _hoard = Hoard::start();
    let log = std::env::temp_dir().join(format!("pagefold-advise-{}.jsonl", std::process::id()));
    let words = ["--target-scan-time", "1", "--max-cpu", "40", "--for", "5", "--json", "--log", log.to_str().unwrap()];
    let output = advise(&words).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(settings(), before);
    let lines = lines(&output);
    assert_eq!(lines[0]["event"], "start");
    assert_eq!(lines[0]["max_cpu_percent"], 40.0);
    assert_eq!(lines[1]["event"], "decision");
    assert_eq!((lines[1]["phase"].as_str(), lines[1]["turn"]["reason"].as_str()), (Some("boost"), Some("started")));
    let summary = lines.last().unwrap();
    assert_eq!(summary["event"], "summary");
    assert!(summary["ksmd_cpu_seconds"].as_f64().unwrap() > 0.0, "{summary}");
    assert!(summary["pages_scanned"].as_u64().unwrap() > 10_000, "{summary}");
    assert_eq!(std::fs::read_to_string(&log).unwrap(), text(&output.stdout));
    std::fs::remove_file(log).unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("goal: a pass in 1 s") && said.contains("boost") && said.contains("pass time"), "{said}");
}

#[test]
fn politely_ended_and_killed_it_leaves_nothing_behind() {
    let Some(_host) = Host::lock() else { return };
    let before = settings();
    let _hoard = Hoard::start();
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let (mut child, mut out) = started(&["--target-scan-time", "1", "--json", "--no-rest"]);
        until_asked(&mut out);
        assert_ne!(settings(), before, "it drives ksmd");
        Pidfd::open(Pid(child.id().cast_signed())).unwrap().send_signal(signal).unwrap();
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        let status = child.wait().unwrap();
        if signal == Signal::KILL {
            // The guardian's part.
            let deadline = Instant::now() + Duration::from_secs(20);
            while settings() != before {
                assert!(Instant::now() < deadline, "{:?} and not {before:?}", settings());
                std::thread::sleep(Duration::from_millis(20));
            }
        } else {
            assert_eq!(status.code(), Some(0), "{signal:?}");
            assert_eq!(settings(), before, "{signal:?}");
            assert!(rest.lines().last().unwrap().contains("\"event\":\"summary\""), "{rest}");
        }
    }
}

#[test]
fn wrong_words_are_wrong_usage_and_change_nothing() {
    for words in [
        &["--target-scan-time", "0"][..],
        &["--target-scan-time", "-5"],
        &["--max-cpu", "101"],
        &["--max-cpu", "nan"],
        &["--boost", "yes"],
        &["--pressure", "io=5"],
        &["--for", "-1"],
        &["stray"],
    ] {
        let output = advise(words).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
    let output = advise(&["--log", "/nowhere/file", "--for", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/nowhere/file"), "{}", text(&output.stderr));
}

#[test]
fn without_rights_it_says_what_is_missing() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: root, to give it up");
        return;
    }
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--clear-groups", env!("CARGO_BIN_EXE_pagefold"), "ksm", "advise", "--for", "1"])
        .output()
        .unwrap();
    // Where others may not even execute the program there is nothing to see.
    if output.status.code() == Some(127) || text(&output.stderr).contains("failed to execute") {
        println!("skipped: a target folder that others may enter");
        return;
    }
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("root"), "{}", text(&output.stderr));
}
