//! `pagefold doctor`: what this kernel and this user's rights allow.

use std::process::ExitCode;

use kernel::probe::{Features, State};
use serde::Serialize;

use crate::args::DoctorArgs;

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    kernel: String,
    features: &'a [kernel::probe::Feature],
    live_merge: bool,
    exact_check: bool,
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
            retake: features.retake().is_ok(),
            drive_ksm: features.drive_ksm().is_ok(),
        };
        println!("{}", serde_json::to_string_pretty(&document)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("Linux {kernel}\n");
    let width = features.list().iter().map(|feature| feature.name.text().len()).max().unwrap_or(0);
    for feature in features.list() {
        let name = feature.name.text();
        match &feature.state {
            State::Yes { .. } => println!("  yes  {name:width$}  {}", feature.needed_for),
            State::No { reason, remedy } => {
                println!("  no   {name:width$}  {}", feature.needed_for);
                println!("       {:width$}  {reason}", "");
                println!("       {:width$}  -> {remedy}", "");
            }
            other => {
                println!("  ?    {name:width$}  {}", feature.needed_for);
                println!("       {:width$}  {other:?}", "");
            }
        }
    }
    println!();
    for (what, verdict) in [
        ("merging live (run, library)", features.live_merge()),
        ("merging memory at rest (library)", features.rest_merge()),
        ("exact reference check", features.exact_check().map(|_| ())),
        ("taking diverged pages again", features.retake()),
        ("driving kernel KSM (run --backend ksm)", features.drive_ksm()),
    ] {
        match verdict {
            Ok(()) => println!("  can   {what}"),
            Err(missing) => println!("  can't {what}: {}; {}", missing.reason, missing.remedy),
        }
    }
    Ok(ExitCode::SUCCESS)
}
