//! `pagefold demo` as a user meets it.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};

use ksm::{KsmSysfs, Lease, check_writable, host_lock};
use serde_json::Value;

const PAGEFOLD: &str = env!("CARGO_BIN_EXE_pagefold");

/// KSM's settings belong to the whole host: one test at a time.
fn lock_ksm() -> Option<File> {
    if let Err(missing) = check_writable(&KsmSysfs::host()) {
        println!("skipped: {missing}");
        return None;
    }
    let lock = host_lock().unwrap();
    Lease::repair(&KsmSysfs::host()).unwrap();
    Some(lock)
}

/// A folder for PATH with a `python3` that is none: what it says to `check` is given.
struct FakePython(PathBuf);

impl FakePython {
    fn new(name: &str, check: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("pagefold-demo-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let script = format!(
            "#!/bin/sh\n\
             case \"$2\" in *sysconfig*) echo \"$0\"; echo /usr/include; echo numpy; exit;; esac\n\
             echo digest\n\
             while read -r word rest; do\n\
             case $word in work) echo worked;; check) echo {check};; esac\n\
             done\n"
        );
        let program = folder.join("python3");
        testing::write_program(&program, script);
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        Self(folder)
    }

    fn demo(&self, words: &[&str]) -> Output {
        let path = format!("{}:{}", self.0.display(), std::env::var("PATH").unwrap());
        Command::new(PAGEFOLD).args(["demo", "--json"]).args(words).env("PATH", path).output().unwrap()
    }
}

impl Drop for FakePython {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn document(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

/// Seen to fail: only the store part was asked, so that workers with wrong memory gave status 0 and `digests_equal: true`,
/// and a store part that had not run was said to have saved 0 bytes.
#[test]
fn the_ksm_part_is_part_of_the_proof() {
    let Some(_lock) = lock_ksm() else { return };
    for (name, check, right) in [("right", "digest right", true), ("wrong", "digest WRONG", false)] {
        let output = FakePython::new(name, check).demo(&["--part", "ksm", "--workers", "2"]);
        let found = document(&output);
        assert_eq!(found["ksm"]["skipped"], Value::Null, "{found:#}");
        let expected = if right { 2 } else { 0 };
        for round in ["shared_layout", "default_layout"] {
            assert_eq!(found["ksm"][round]["workers_right"], expected, "{found:#}");
        }
        assert_eq!(found["digests_equal"], right, "{found:#}");
        assert_eq!(output.status.code(), Some(i32::from(!right)), "{found:#}");
        assert_eq!((&found["bytes_saved"], &found["store"]), (&Value::Null, &Value::Null), "{found:#}");
    }
}

/// A demo in a mount namespace of its own, where something cannot be written.
fn demo_where(change: &str, words: &[&str]) -> Output {
    let script = format!("{change} || exit 77; exec \"$0\" demo \"$@\"");
    Command::new("unshare").args(["--mount", "sh", "-c", &script, PAGEFOLD]).args(words).output().unwrap()
}

/// Seen to fail: status 1 and nothing of the store part.
#[test]
fn a_ksm_part_that_cannot_be_shown_takes_nothing_from_the_store_part() {
    let Some(_lock) = lock_ksm() else { return };
    let read_only = "mount -t tmpfs -o ro none /run";
    let small = ["--workers", "2", "--size", "2"];
    let output = demo_where(read_only, &[&["--json"], &small[..]].concat());
    let found = document(&output);
    let skipped = found["ksm"]["skipped"].as_str().unwrap_or_default();
    assert!(skipped.contains("Read-only file system"), "{found:#}");
    assert_eq!((output.status.code(), &found["digests_equal"]), (Some(0), &Value::Bool(true)), "{found:#}");
    let output = demo_where(read_only, &small);
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(words.contains("merged through the library") && words.contains("not shown here"), "{words}");
}

/// Seen to fail: root was told to be root.
#[test]
fn why_ksm_cannot_be_driven_is_the_kernels_own_word() {
    let Some(_lock) = lock_ksm() else { return };
    let output = demo_where("mount -o remount,bind,ro /sys", &["--json", "--part", "ksm", "--workers", "2"]);
    let found = document(&output);
    let skipped = found["ksm"]["skipped"].as_str().unwrap_or_default();
    assert!(skipped.contains("Read-only file system") && !skipped.contains("root"), "{found:#}");
    assert_eq!((output.status.code(), &found["digests_equal"]), (Some(0), &Value::Null), "{found:#}");
}

/// Seen to fail: `this process has an agent already`, `a worker has ended` and status 1.
#[test]
fn a_demo_inside_a_run_shows_what_it_shows_outside() {
    let inner = [PAGEFOLD, "demo", "--json", "--part", "store", "--workers", "2", "--size", "2"];
    let output = Command::new(PAGEFOLD).args(["run", "--quiet", "--"]).args(inner).output().unwrap();
    let found = document(&output);
    assert_eq!((output.status.code(), &found["digests_equal"]), (Some(0), &Value::Bool(true)), "{found:#}");
    assert!(found["store"]["pages_merged"].as_u64().unwrap() > 0, "{found:#}");
}
