//! The host's settings, and the command.

use std::fs::{self, File};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use kernel::{Pid, Range};
use ksm::{Knob, KsmSysfs, Lease, StatePath, check_writable, host_lock};
use serde_json::Value;

/// KSM's settings belong to the whole host: one test at a time, and put back whatever happens.
pub(crate) struct Host {
    _lock: File,
    /// The administrator's, which a test may change first.
    pub(crate) before: Vec<(Knob, String)>,
    at_start: Vec<(Knob, String)>,
}

impl Host {
    pub(crate) fn lock() -> Option<Self> {
        if let Err(missing) = check_writable(&KsmSysfs::host()) {
            println!("skipped: {missing}");
            return None;
        }
        let lock = host_lock().unwrap();
        Lease::repair(&KsmSysfs::host()).unwrap();
        Some(Self { _lock: lock, before: settings(), at_start: settings() })
    }

    /// Waits until the settings are what they were and no lease is left.
    pub(crate) fn wait_until_restored(&self) {
        let state = StatePath::for_this_user();
        wait_until("the settings are back", || settings() == self.before && !state.as_path().exists());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for (knob, value) in &self.at_start {
            let _ = KsmSysfs::host().write(knob.file_name(), value);
        }
    }
}

pub(crate) fn settings() -> Vec<(Knob, String)> {
    let sysfs = KsmSysfs::host();
    Knob::ALL.into_iter().filter_map(|knob| Some((knob, sysfs.knob(knob.file_name()).unwrap()?))).collect()
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `pagefold WORD --pid PID`.
pub(crate) fn pagefold(word: &str, pid: Pid) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagefold"));
    command.args([word, "--pid", &pid.to_string()]);
    command
}

/// `pagefold merge --backend ksm --wait`, of one range.
pub(crate) fn merge(pid: Pid, range: Range) -> Command {
    let mut command = pagefold("merge", pid);
    command.args(["--backend", "ksm", "--wait", "--range", &range.to_string()]);
    command
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The document that a command prints.
pub(crate) fn json(command: &mut Command) -> (Option<i32>, Value) {
    let output = command.arg("--json").output().unwrap();
    let document = serde_json::from_slice(&output.stdout);
    (output.status.code(), document.unwrap_or_else(|error| panic!("{error}: {}", all(&output))))
}

pub(crate) fn all(output: &Output) -> String {
    format!("{:?}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// Pages of a process that KSM shares now, by smaps.
pub(crate) fn merged_pages(pid: Pid) -> u64 {
    kernel::smaps::rollup(pid).unwrap().ksm.pages().get()
}

pub(crate) fn write(path: &std::path::Path, content: &str) {
    fs::write(path, content).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
