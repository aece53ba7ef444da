//! The short form of `workers`: Python workers serve requests in all ways of merging, hold what they must, and leave
//! nothing behind. What it comes to is no condition: other tests run at the same time.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A busy machine starts programs slowly.
const PATIENCE: Duration = Duration::from_secs(120);

fn python() -> bool {
    let found = Command::new("/usr/bin/python3").args(["-c", "import sqlite3"]).status();
    let there = found.is_ok_and(|status| status.success());
    if !there {
        println!("skipped: no /usr/bin/python3 with sqlite3");
    }
    there
}

/// Cargo builds the binaries of this package for its tests, but not those of another.
fn pagefold() -> PathBuf {
    let built = Command::new(env!("CARGO")).args(["build", "-q", "-p", "pagefold-cli"]).status().unwrap();
    assert!(built.success());
    let own = std::env::current_exe().unwrap();
    own.ancestors().skip(1).map(|folder| folder.join("pagefold")).find(|file| file.is_file()).unwrap()
}

/// The scenario with a folder of its own for whatever it leaves.
fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args(["workers", "--programs", "python", "--count", "3"]).env("TMPDIR", folder).stdin(Stdio::null());
    command
}

fn left(folder: &Path) -> Vec<PathBuf> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("workers")).collect()
}

/// Runs the scenario; what was measured, and how many ways were skipped.
fn measured(words: &[&str]) -> (Vec<Value>, usize) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = command(folder.path());
    let output = command.args(["--seconds", "3", "--json", "--pagefold"]).arg(pagefold()).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(left(folder.path()).is_empty(), "{:?}", left(folder.path()));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["scenario"], "workers");
    let (skipped, samples): (Vec<Value>, Vec<Value>) =
        report["samples"].as_array().unwrap().iter().cloned().partition(|sample| sample["skipped"].is_string());
    for sample in &skipped {
        println!("skipped: {}: {}", sample["way"], sample["skipped"]);
    }
    for sample in &samples {
        let number = |name: &str| sample[name].as_f64().unwrap_or_else(|| panic!("no {name} in {sample:#}"));
        assert!(number("private_bytes") > f64::from(3 << 20), "{sample:#}");
        assert!(number("requests") >= 3.0, "{sample:#}");
        assert!(number("read_all_again_seconds") > 0.0, "{sample:#}");
        assert_eq!(number("wrong_answers") + number("wrong_workers"), 0.0, "{sample:#}");
        let digests = sample["digests"].as_array().unwrap();
        assert!(digests.len() == 3 && (1..3).all(|at| !digests[..at].contains(&digests[at])), "{sample:#}");
        assert_eq!(sample["digests"], samples[0]["digests"]);
        if sample["way"] == "shared" {
            assert!(sample["summary"]["processes_ever"].as_u64() >= Some(1), "{sample:#}");
        }
    }
    let compared = samples.iter().any(|sample| sample["way"] == "plain") && samples.iter().any(is_ours);
    assert_eq!(compared, !report["ratios"].as_array().unwrap().is_empty());
    (samples, skipped.len())
}

fn is_ours(sample: &Value) -> bool {
    sample["way"] == "shared" || sample["way"] == "pagefold"
}

#[test]
fn workers_are_right_in_every_way() {
    if !python() {
        return;
    }
    let (samples, skipped) = measured(&["--load", "rare"]);
    assert_eq!(samples.len() + skipped, 7);
    // This one needs nothing.
    assert_eq!(samples[0]["way"], "plain");
}

#[test]
fn busy_workers_are_right() {
    if !python() {
        return;
    }
    let (samples, skipped) = measured(&["--load", "busy", "--ways", "shared"]);
    assert_eq!(samples.len() + skipped, 1);
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    if !python() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = command(folder.path());
    command.args(["--seconds", "600", "--ways", "plain", "--load", "rare"]).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let pid = kernel::Pid(child.id().cast_signed());
    // The command that starts the workers is its child; those are the command's.
    let below = |pid: kernel::Pid| -> Vec<kernel::Pid> {
        let all = kernel::status::processes().unwrap();
        all.into_iter().filter(|one| kernel::status::read(*one).is_ok_and(|status| status.ppid == pid.0)).collect()
    };
    let deadline = Instant::now() + PATIENCE;
    let workers = loop {
        // Not the one that warms up.
        let found: Vec<_> = below(pid).into_iter().flat_map(below).collect();
        if found.len() == 3 {
            break found;
        }
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "the workers were not started");
        std::thread::sleep(Duration::from_millis(20));
    };
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid.0).unwrap(), rustix::process::Signal::INT)
        .unwrap();
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!child.wait().unwrap().success());
    assert!(left(folder.path()).is_empty(), "{:?}", left(folder.path()));
    for worker in workers {
        assert!(kernel::stat::Stat::has_ended(worker), "worker {worker} is left");
    }
}
