//! The short form of `workers`: Python workers serve requests in all ways of merging, hold what they must, and leave
//! nothing behind. What it comes to is no condition: other tests run at the same time.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
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
    let by_ksmd = samples.iter().any(|sample| sample["way"].as_str().unwrap().starts_with("ksm"));
    let rests = by_ksmd && settings().contains(&("run", "0".to_owned()));
    for sample in &samples {
        let number = |name: &str| sample[name].as_f64().unwrap_or_else(|| panic!("no {name} in {sample:#}"));
        assert!(number("private_bytes") > f64::from(3 << 20), "{sample:#}");
        assert!(number("requests") >= 3.0, "{sample:#}");
        assert!(number("read_all_again_seconds") > 0.0, "{sample:#}");
        assert_eq!(number("wrong_answers") + number("wrong_workers"), 0.0, "{sample:#}");
        let digests = sample["digests"].as_array().unwrap();
        assert!(digests.len() == 3 && (1..3).all(|at| !digests[..at].contains(&digests[at])), "{sample:#}");
        assert_eq!(sample["digests"], samples[0]["digests"]);
        assert!(has_settings_of_its_way(sample, rests), "{sample:#}");
        if sample["way"] == "shared" {
            assert!(sample["summary"]["processes_ever"].as_u64() >= Some(1), "{sample:#}");
        }
    }
    let compared = samples.iter().any(|sample| sample["way"] == "plain") && samples.iter().any(is_ours);
    assert_eq!(compared, !report["ratios"].as_array().unwrap().is_empty());
    (samples, skipped.len())
}

/// Whether a sample has the settings that its way asks for, where the administrator has ksmd resting.
fn has_settings_of_its_way(sample: &Value, rests: bool) -> bool {
    let asked: &[(&str, Value)] = match sample["way"].as_str().unwrap() {
        "ksm" => &[("pages_to_scan", 100.into()), ("sleep_millisecs", 20.into())],
        "ksm-flat-out" | "ksm-flat-out-shared" => &[("sleep_millisecs", 0.into())],
        "ksm-advisor" => &[("advisor_mode", "scan-time".into()), ("advisor_target_scan_time", 200.into())],
        _ => return sample["ksm_settings"].is_null(),
    };
    let names: Vec<_> = ksm::KsmSysfs::host().knobs().unwrap().into_iter().map(|(name, _)| name).collect();
    ["start", "end"].into_iter().all(|time| {
        let settings = &sample["ksm_settings"][time];
        let all = settings["run"] == 1 && names.iter().all(|name| !settings[name].is_null());
        // Whoever has ksmd run faster anyhow is not slowed down.
        all && (!rests || asked.iter().all(|(name, value)| settings[name] == *value))
    })
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

/// Processes below another one.
fn below(pid: kernel::Pid) -> Vec<kernel::Pid> {
    let all = kernel::status::processes().unwrap();
    all.into_iter().filter(|one| kernel::status::read(*one).is_ok_and(|status| status.ppid == pid.0)).collect()
}

/// A run that something happens to.
struct Run {
    folder: tempfile::TempDir,
    child: Child,
    said: BufReader<ChildStderr>,
    deadline: Instant,
}

impl Run {
    fn start(words: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = command(folder.path());
        let report = File::create(folder.path().join("report")).unwrap();
        command.arg("--json").args(words).stdout(report).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let said = BufReader::new(child.stderr.take().unwrap());
        Self { folder, child, said, deadline: Instant::now() + PATIENCE }
    }

    fn wait_for(&mut self, line: &str) {
        let mut lines = self.said.by_ref().lines().map(Result::unwrap);
        assert!(lines.any(|said| said == line), "it has not said {line:?}");
    }

    fn workers(&mut self) -> Vec<kernel::Pid> {
        let pid = kernel::Pid(self.child.id().cast_signed());
        loop {
            // The command that starts the workers is a child; those are the command's.
            let found: Vec<_> = below(pid).into_iter().flat_map(below).collect();
            if found.len() == 3 {
                return found;
            }
            assert!(
                Instant::now() < self.deadline && self.child.try_wait().unwrap().is_none(),
                "the workers were not started"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Interrupts it when nobody reads any more what it says to people; the report.
    fn interrupt(self) -> Value {
        let Self { folder, child, said, deadline } = self;
        drop(said);
        send(kernel::Pid(child.id().cast_signed()), Signal::INT);
        let (code, report) = Self::wait(&folder, child, deadline);
        assert_eq!((code, &report["interrupted"]), (Some(130), &Value::from(true)));
        report
    }

    /// Waits for its end; what it has said since, its status and the report.
    fn finish(mut self) -> (String, Option<i32>, Value) {
        let mut said = String::new();
        self.said.read_to_string(&mut said).unwrap();
        let (code, report) = Self::wait(&self.folder, self.child, self.deadline);
        assert_eq!(report["interrupted"], false);
        (said, code, report)
    }

    fn wait(folder: &tempfile::TempDir, mut child: Child, deadline: Instant) -> (Option<i32>, Value) {
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("it does not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(left(folder.path()).is_empty(), "{:?}", left(folder.path()));
        let report = serde_json::from_slice(&std::fs::read(folder.path().join("report")).unwrap()).unwrap();
        (status.code(), report)
    }
}

fn send(pid: kernel::Pid, signal: Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid.0).unwrap(), signal).unwrap();
}

/// Seen to fail: without a report, and with one that was not reached because nobody read the lines for people.
#[test]
fn an_interrupted_run_tells_what_it_knows_and_leaves_nothing_behind() {
    if !python() {
        return;
    }
    let mut run = Run::start(&["--seconds", "5", "--ways", "plain"]);
    run.wait_for("python busy: plain: 3 workers");
    let workers = run.workers();
    let report = run.interrupt();
    for worker in workers {
        assert!(kernel::stat::Stat::has_ended(worker), "worker {worker} is left");
    }
    let samples = report["samples"].as_array().unwrap();
    let words: Vec<_> = samples.iter().map(|sample| (&sample["load"], sample["interrupted"].is_string())).collect();
    assert_eq!(words, [(&Value::from("rare"), false), (&Value::from("busy"), true)], "{samples:#?}");
    assert!(samples[0]["requests"].as_u64() >= Some(3), "{samples:#?}");
}

/// That ksmd cannot be driven here, and why.
fn no_ksmd() -> bool {
    let missing = ksm::check_writable(&ksm::KsmSysfs::host()).err();
    if let Some(missing) = &missing {
        println!("skipped: {missing}");
    }
    missing.is_some()
}

/// KSM's settings while nobody has changed them for a test.
fn settings() -> Vec<(&'static str, String)> {
    let _lock = ksm::host_lock().unwrap();
    ksm::KsmSysfs::host().knobs().unwrap()
}

#[test]
fn an_interrupted_run_puts_ksms_settings_back() {
    if !python() || no_ksmd() {
        return;
    }
    let before = settings();
    let mut run = Run::start(&["--seconds", "600", "--ways", "ksm-flat-out"]);
    run.wait_for("python rare: ksmd flat out: 3 workers");
    run.workers();
    let during = ksm::KsmSysfs::host().knobs().unwrap();
    let report = run.interrupt();
    assert_eq!(settings(), before);
    assert_ne!(during, before);
    assert_eq!(report["samples"].as_array().unwrap().len(), 1, "{report:#}");
}

/// Seen to fail: it waited for the lock for as long as that was held.
#[test]
fn a_run_that_waits_for_ksm_can_be_interrupted() {
    if !python() || no_ksmd() {
        return;
    }
    let _lock = ksm::host_lock().unwrap();
    let mut run = Run::start(&["--seconds", "3", "--ways", "plain,ksm", "--load", "rare"]);
    run.wait_for("python rare: ksmd default: 3 workers");
    let report = run.interrupt();
    let samples = report["samples"].as_array().unwrap();
    assert_eq!((samples.len(), &samples[1]["way"]), (2, &Value::from("plain")), "{samples:#?}");
}

#[test]
fn a_way_that_fails_in_one_round_says_in_which() {
    if !python() {
        return;
    }
    let mut run = Run::start(&["--seconds", "4", "--ways", "plain", "--load", "rare", "--repeat", "3"]);
    run.wait_for("python rare, round 2 of 3: plain: 3 workers");
    send(run.workers()[0], Signal::KILL);
    let (said, code, report) = run.finish();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("python rare, round 2 of 3: plain: failed: "), "{said}");
    // The last line is about all rounds.
    let last = said.lines().last().unwrap();
    assert!(last.contains("2 of 3 rounds: ") && last.contains(" to ") && last.ends_with("wrong 0"), "{said}");
    let samples = report["samples"].as_array().unwrap();
    let rounds: Vec<_> = samples.iter().map(|one| (one["round"].as_u64(), one["failed"].is_string())).collect();
    assert_eq!(rounds, [(Some(2), true), (Some(1), false), (Some(3), false)], "{samples:#?}");
}
