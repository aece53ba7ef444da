//! What the command says, and its exit statuses.

use std::process::Command;

use kernel::{Pid, page_size};

use crate::host::{Host, all, json, merge, merged_pages, pagefold, text};
use crate::target::Target;

#[test]
fn half_of_the_pages_are_merged_in_one_call() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    let doubles = target.hold(16_384, 2, 11);
    let singles = target.hold(16_384, 1, 12);
    let mut command = merge(target.pid(), doubles);
    let (status, found) = json(command.args(["--range", &singles.to_string()]));
    assert_eq!(status, Some(0), "{found:#}");
    for (field, pages) in [("pages_read", 32_768), ("pages_with_partner", 16_384), ("pages_merged", 16_384)] {
        assert_eq!(found[field], pages, "{field}: {found:#}");
    }
    assert_eq!((found["end"].as_str(), found["backend"].as_str()), (Some("done"), Some("ksm")));
    assert_eq!(found["bytes_saved"], 8192 * page_size());
    assert_eq!(found["refused"], serde_json::json!({}));
    for field in ["elapsed_seconds", "look_seconds", "mark_seconds", "scan_seconds", "ksmd_cpu_seconds"] {
        assert!(found[field].as_f64().unwrap() > 0.0, "{field}: {found:#}");
    }
    let process = &found["processes"][0];
    assert_eq!((process["runs_marked"].as_u64(), process["stops"].as_u64()), (Some(1), Some(1)), "{found:#}");
    assert_eq!(merged_pages(target.pid()), 16_384);
    host.wait_until_restored();
    assert_eq!(target.wrong_words(), 0);
    // For people, and twice: there is nothing left to do.
    let output = merge(target.pid(), doubles).output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty(), "{}", all(&output));
    assert!(text(&output.stderr).contains("merged before"), "{}", all(&output));
    let quiet = merge(target.pid(), doubles).arg("--quiet").output().unwrap();
    assert!(quiet.status.success() && quiet.stderr.is_empty() && quiet.stdout.is_empty(), "{}", all(&quiet));
}

#[test]
fn without_wait_pages_are_marked_and_ksmd_is_left_alone() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    let range = target.hold(512, 2, 13);
    let output =
        pagefold("merge", target.pid()).args(["--backend", "ksm", "--range", &range.to_string()]).output().unwrap();
    assert!(output.status.success(), "{}", all(&output));
    assert!(text(&output.stderr).contains("ksmd does not run"), "{}", all(&output));
    assert_eq!(merged_pages(target.pid()), 0);
    let mut vmas = kernel::smaps::read(target.pid()).unwrap();
    vmas.retain(|vma| vma.flags.mergeable());
    assert_eq!(vmas.iter().map(|vma| vma.vma.range).collect::<Vec<_>>(), [range]);
    assert_eq!(crate::host::settings(), host.before);
}

#[test]
fn statuses_tell_what_was_wrong() {
    let program = env!("CARGO_BIN_EXE_pagefold");
    let this = Pid::this().to_string();
    for (status, words, says) in [
        (3, ["merge", "--pid", &this].as_slice(), "--backend ksm"),
        (2, &["merge", "--backend", "ksm"], "--pid"),
        (2, &["merge", "--backend", "ksm", "--pid", "0"], "--pid"),
        (2, &["merge", "--backend", "ksm", "--pid", "1", "--range", "1001-2000"], "page boundaries"),
        (2, &["merge", "--backend", "ksm", "--pid", "1", "--timeout", "3"], "--wait"),
        (2, &["merge", "--backend", "ksm", "--pid", "1", "--wait", "--timeout", "-1"], "--timeout"),
        (1, &["merge", "--backend", "ksm", "--pid", "2147483647"], "2147483647"),
        (1, &["merge", "--backend", "ksm", "--pid", "2"], "kernel"),
        (2, &["unmerge"], "--pid"),
        (2, &["unmerge", "--pid", "1", "--step", "0"], "--step"),
        (2, &["unmerge", "--pid", "1", "--host"], "--host"),
        (2, &["unmerge", "--pid", "1", "--all", "--range", "1000-2000"], "--all"),
        (1, &["unmerge", "--pid", "2147483647"], "2147483647"),
    ] {
        let output = Command::new(program).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{words:?}: {}", all(&output));
        assert!(text(&output.stderr).contains(says), "{words:?}: {}", all(&output));
    }
    for word in ["merge", "unmerge"] {
        let help = Command::new(program).args([word, "--help"]).output().unwrap();
        assert!(help.status.success() && text(&help.stdout).contains("--range"), "{}", all(&help));
    }
}

#[test]
fn whoever_may_not_is_told_what_is_missing() {
    let tried = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", env!("CARGO_BIN_EXE_pagefold")])
        .args(["merge", "--backend", "ksm", "--wait", "--pid", &Pid::this().to_string()])
        .output();
    let Some(output) = tried.ok().filter(|output| !text(&output.stderr).contains("setpriv:")) else {
        return println!("skipped: setpriv as root, and a program that everybody may execute");
    };
    assert_eq!(output.status.code(), Some(3), "{}", all(&output));
    assert!(text(&output.stderr).contains("permitted"), "{}", all(&output));
}

#[test]
fn when_the_time_is_over_the_settings_are_back() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    let range = target.hold(4096, 2, 14);
    let (status, found) = json(merge(target.pid(), range).args(["--timeout", "0"]));
    assert_eq!((status, found["end"].as_str()), (Some(1), Some("timeout")), "{found:#}");
    let not_visited = found["refused"]["not_visited"].as_u64().unwrap_or(0);
    assert_eq!(found["pages_merged"].as_u64().unwrap() + not_visited, 4096, "{found:#}");
    host.wait_until_restored();
    // What was marked goes on where it was.
    let (status, found) = json(&mut merge(target.pid(), range));
    assert_eq!((status, merged_pages(target.pid())), (Some(0), 4096), "{found:#}");
}
