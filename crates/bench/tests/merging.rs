//! The short forms of `merge`, `cow` and `stall`: everything is merged and verified, and the ratios are there. What
//! they come to is no condition: other tests run at the same time.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::Command;

use kernel::KsmSysfs;
use serde_json::Value;

/// Runs a scenario; `None` where this machine lacks what it needs.
fn scenario(arguments: &[&str]) -> Option<Value> {
    if let Err(missing) = kernel::probe::Features::probe().live_merge() {
        println!("skipped: {missing}");
        return None;
    }
    if let Err(error) = ksm::check_writable(&KsmSysfs::host()) {
        println!("skipped: {error}");
        return None;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_bench")).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["scenario"], arguments[0]);
    assert!(report["machine"]["cpus"].as_u64() > Some(0));
    for ratio in report["ratios"].as_array().unwrap() {
        for field in ["metric", "unit", "ours", "against", "theirs", "ratio", "goal", "met"] {
            assert!(!ratio[field].is_null(), "{field} is missing in {ratio}");
        }
    }
    Some(report)
}

/// What a field of all samples comes to.
fn sum(report: &Value, pointer: &str) -> f64 {
    report["samples"].as_array().unwrap().iter().filter_map(|sample| sample.pointer(pointer)?.as_f64()).sum()
}

#[test]
fn pairs_are_merged_by_both_and_verified() {
    let Some(report) = scenario(&["merge", "--quick", "--json", "--runs", "256,1", "--copies", "2"]) else { return };
    assert_eq!(report["samples"].as_array().unwrap().len(), 2);
    for side in ["store", "ksmd"] {
        assert_eq!(sum(&report, &format!("/{side}/wrong_words")), 0.0, "{side}");
        assert!(sum(&report, &format!("/{side}/start/pages_saved")) > 0.0, "{side}: {report}");
    }
    assert_eq!(report["ratios"].as_array().unwrap().len(), 10);
}

#[test]
fn writes_are_measured_on_both_sides() {
    let Some(report) = scenario(&["cow", "--quick", "--json"]) else { return };
    for sample in report["samples"].as_array().unwrap() {
        assert!(sample["nanoseconds"].as_array().unwrap().len() >= 1000);
        assert_eq!(sample["wrong_words"], 0);
    }
    assert_eq!(report["ratios"].as_array().unwrap().len(), 4);
}

#[test]
fn waits_are_measured_on_both_sides() {
    let Some(report) = scenario(&["stall", "--quick", "--json"]) else { return };
    assert_eq!(sum(&report, "/wrong_words"), 0.0);
    assert!(sum(&report, "/pages_merged_per_second") > 0.0);
    assert!(report["samples"].pointer("/0/reads/accesses").unwrap().as_u64() > Some(0));
}
