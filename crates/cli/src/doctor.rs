//! `pagefold doctor`: what this kernel and this user's rights allow.

use std::fmt::Write as _;
use std::process::ExitCode;

use kernel::probe::{ExactCheck, Features, State};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::say;

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    kernel: String,
    features: &'a [kernel::probe::Feature],
    live_merge: bool,
    exact_check: bool,
    /// Which it is.
    check: Option<ExactCheck>,
    retake: bool,
    drive_ksm: bool,
}

/// Prints the probe.
pub(crate) fn doctor(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let features = Features::probe();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    if args.json {
        let document = Document {
            kernel,
            features: features.list(),
            live_merge: features.live_merge().is_ok(),
            exact_check: features.exact_check().is_ok(),
            check: features.exact_check().ok(),
            retake: features.retake().is_ok(),
            drive_ksm: features.drive_ksm().is_ok(),
        };
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    say::answer(&table(&features, &kernel)?)?;
    Ok(ExitCode::SUCCESS)
}

fn table(features: &Features, kernel: &str) -> Result<String, std::fmt::Error> {
    let mut text = format!("Linux {kernel}\n\n");
    let width = features.list().iter().map(|feature| feature.name.text().len()).max().unwrap_or(0);
    for feature in features.list() {
        let name = feature.name.text();
        match &feature.state {
            State::Yes { .. } => writeln!(text, "  yes  {name:width$}  {}", feature.needed_for)?,
            State::No { reason, remedy } => {
                writeln!(text, "  no   {name:width$}  {}", feature.needed_for)?;
                writeln!(text, "       {:width$}  {reason}", "")?;
                writeln!(text, "       {:width$}  -> {remedy}", "")?;
            }
            State::Unknown { reason, remedy } => {
                writeln!(text, "  ?    {name:width$}  {}", feature.needed_for)?;
                writeln!(text, "       {:width$}  {reason}", "")?;
                if !remedy.is_empty() {
                    writeln!(text, "       {:width$}  -> {remedy}", "")?;
                }
            }
        }
    }
    writeln!(text)?;
    let check = match features.exact_check() {
        Ok(ExactCheck::Bpf) => "exact reference check (by BPF)",
        Ok(ExactCheck::Collapse) => "exact reference check (by MADV_COLLAPSE)",
        Err(_) => "exact reference check",
    };
    for (what, verdict) in [
        ("merging live (run, library)", features.live_merge()),
        ("merging memory at rest (library)", features.rest_merge()),
        (check, features.exact_check().map(|_| ())),
        ("taking diverged pages again", features.retake()),
        ("driving kernel KSM (run --backend ksm)", features.drive_ksm()),
    ] {
        match verdict {
            Ok(()) => writeln!(text, "  can   {what}")?,
            Err(missing) if missing.remedy.is_empty() => writeln!(text, "  can't {what}: {}", missing.reason)?,
            Err(missing) => writeln!(text, "  can't {what}: {}; {}", missing.reason, missing.remedy)?,
        }
    }
    Ok(text)
}
