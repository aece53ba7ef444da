//! stress-ng, which checks itself.

use crate::{PAGEFOLD, can_run, number, run, said, summary};
use std::process::Command;

/// The lines that let it be managed: it holds an `int 0x80`, which nobody uses here.
fn trust(folder: &tempfile::TempDir) -> std::path::PathBuf {
    let report = Command::new(PAGEFOLD).args(["doctor", "--proof", "stress-ng", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
    let lines: Vec<&str> =
        report["trust_lines"].as_array().unwrap().iter().filter_map(serde_json::Value::as_str).collect();
    let file = folder.path().join("trust");
    std::fs::write(&file, lines.join("\n")).unwrap();
    file
}

fn stress(words: &[&str], merges_wanted: u64) {
    if !can_run("stress-ng") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("summary");
    let seconds = std::env::var("STRESS_SECONDS").unwrap_or_else(|_| "12".to_owned());
    let mut command = run(&file);
    command.arg("--trust").arg(trust(&folder)).args(["--", "stress-ng", "--verify", "-t", &seconds]).args(words);
    let output = command.current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let text = said(&output);
    assert!(!text.contains("fail:") && !text.contains("error:"), "{text}");
    let summary = summary(&file);
    assert!(number(&summary, "processes_ever") > 0, "{summary:#}");
    assert!(number(&summary, "merges") >= merges_wanted, "{summary:#}\n{text}");
}

#[test]
fn malloc() {
    stress(&["--malloc", "2", "--malloc-bytes", "128M"], 0);
}

#[test]
fn mremap() {
    stress(&["--mremap", "2", "--mremap-bytes", "32M"], 0);
}

#[test]
fn pthread() {
    stress(&["--pthread", "2", "--pthread-max", "64"], 0);
}

#[test]
fn vm() {
    stress(&["--vm", "2", "--vm-bytes", "128M", "--vm-method", "all"], 1);
}
