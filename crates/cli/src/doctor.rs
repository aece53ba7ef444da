//! `pagefold doctor`: why nothing is merging, and what this kernel and this user's rights allow.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use eval::doctor::{Finding, HostFacts, Observed, Subject, diagnose};
use kernel::probe::{ExactCheck, Features, State};
use kernel::{KsmSysfs, Pid};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::doctor_whole::Whole;
use crate::{NOT_HERE, say};

/// How long ksmd is watched, if it runs.
const LOOK: Duration = Duration::from_millis(1500);

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    kernel: String,
    findings: &'a [Finding],
    /// What `run --scope all` would leave alone of each process that was asked for.
    whole: &'a [Whole],
    features: &'a [kernel::probe::Feature],
    live_merge: bool,
    exact_check: bool,
    /// Which it is.
    check: Option<ExactCheck>,
    retake: bool,
    drive_ksm: bool,
}

/// Prints what stands in the way, and the probe.
pub(crate) fn doctor(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    if let Some(word) = &args.proof {
        return crate::doctor_proof::proof(word, args);
    }
    let host = HostFacts::observe(&KsmSysfs::host(), LOOK).context("cannot look at KSM")?;
    let looks = args.pid.iter().map(|pid| Observed::observe(Pid(*pid)).context("cannot look at the process"));
    let processes = looks.collect::<anyhow::Result<Vec<Observed>>>()?;
    let findings = diagnose(&host, &processes);
    let whole = Whole::of(&args.pid);
    let features = Features::probe();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    if args.json {
        let document = Document {
            kernel,
            findings: &findings,
            whole: &whole,
            features: features.list(),
            live_merge: features.live_merge().is_ok(),
            exact_check: features.exact_check().is_ok(),
            check: features.exact_check().ok(),
            retake: features.retake().is_ok(),
            drive_ksm: features.drive_ksm().is_ok(),
        };
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
        return Ok(status(&processes));
    }
    let text = format!("Linux {kernel}\n\n{}\n{}{}", causes(&findings)?, Whole::text(&whole)?, table(&features)?);
    say::answer(&text)?;
    Ok(status(&processes))
}

/// A failure if none of those that were asked for could be looked at.
fn status(processes: &[Observed]) -> ExitCode {
    if processes.is_empty() || processes.iter().any(|process| process.facts().is_some()) {
        return ExitCode::SUCCESS;
    }
    let refused = processes.iter().any(|process| matches!(process, Observed::NotPermitted { .. }));
    ExitCode::from(if refused { NOT_HERE } else { 1 })
}

/// Two lines for each: what is so, and what helps.
fn causes(findings: &[Finding]) -> Result<String, std::fmt::Error> {
    if findings.is_empty() {
        return Ok("  nothing stands in the way of KSM\n".to_owned());
    }
    let whom = |finding: &Finding| match &finding.subject {
        Subject::Host => "host".to_owned(),
        Subject::Process { pid } => pid.to_string(),
    };
    let width = findings.iter().map(|finding| whom(finding).len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        writeln!(
            text,
            "  {:7}  {:width$}  {} [{}]",
            finding.severity.word(),
            whom(finding),
            finding.cause,
            finding.code.word()
        )?;
        writeln!(text, "  {:7}  {:width$}  -> {}", "", "", finding.remedy)?;
    }
    Ok(text)
}

fn table(features: &Features) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
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
