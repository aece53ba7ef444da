//! Programs of other people under `pagefold run --scope all`: they mark nothing, and must notice nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use kernel::Features;
use serde_json::Value;

mod redis;
mod stress;

const PAGEFOLD: &str = env!("CARGO_BIN_EXE_pagefold");

/// Says why a test cannot run here.
fn can_run(program: &str) -> bool {
    if let Err(missing) = Features::probe().live_merge() {
        println!("skipped: {missing}");
        return false;
    }
    let found = Command::new("which").arg(program).stdout(Stdio::null()).status().is_ok_and(|status| status.success());
    if !found {
        println!("skipped: no {program}");
    }
    found
}

/// `pagefold run --scope all` with a file for the summary.
fn run(summary: &Path) -> Command {
    let mut run = Command::new(PAGEFOLD);
    run.args(["run", "--quiet", "--scope", "all", "--stable", "0.3", "--summary"]).arg(summary);
    run.env_remove("PAGEFOLD_AGENT").env_remove("LD_PRELOAD");
    run
}

fn summary(file: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

fn number(summary: &Value, name: &str) -> u64 {
    summary[name].as_u64().unwrap_or_else(|| panic!("{name}: {summary:#}"))
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} within 30 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}
