//! `pagefold merge`.

use std::process::ExitCode;
use std::time::Duration;

use ksm::request::{self, End, Report, Request};
use ksm::{Knob, KsmSysfs, StatePath};
use serde::Serialize;

use super::{Watched, processes, refused, table};
use crate::args::Backend;
use crate::args::merge::MergeArgs;
use crate::guarded::Guardian;
use crate::{NOT_HERE, say};

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    backend: &'static str,
    page_size: u64,
    #[serde(flatten)]
    report: &'a Report,
}

/// Marks, merges and reports.
pub(crate) fn merge(args: &MergeArgs) -> anyhow::Result<ExitCode> {
    if args.backend == Backend::Store {
        // The default, as in `run`: whoever gives partitions up is to say so.
        say::note(
            "the page store merges only what `pagefold run` has started; `--backend ksm` merges running processes, \
             without partitions: KSM has one tree for the whole host",
        );
        return Ok(ExitCode::from(NOT_HERE));
    }
    let mut watched = Watched::new(args.json || args.quiet)?;
    let pids = match processes(&args.pid, args.children) {
        Ok(pids) => pids,
        Err(status) => return Ok(status),
    };
    let request = Request {
        processes: pids,
        ranges: args.range.clone(),
        within: args.within,
        never_merge_anyway: args.never_merge_anyway,
        split_huge: args.split_huge,
        wait: args.wait.then(|| Duration::from_secs_f64(args.timeout)),
    };
    let (sysfs, path) = (KsmSysfs::host(), StatePath::for_this_user());
    // First the guardian, then the lease: at no moment is there a lease that nobody would end.
    let guardian = match args.wait && ksm::check_writable(&sysfs).is_ok() {
        true => Some(Guardian::start(&path, &sysfs, args.quiet)?),
        false => None,
    };
    let result = request::merge(&request, &sysfs, &path, &mut |stage| watched.tell(stage));
    watched.bar.clear();
    let report = match result {
        Ok(report) => {
            if let Some(guardian) = guardian {
                guardian.end();
            }
            report
        }
        // The guardian stays: if a lease was not given back, it does that when this process is gone.
        Err(error) => return refused(error),
    };
    if args.json {
        let document = Document { backend: "ksm", page_size: kernel::page_size(), report: &report };
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    } else if !args.quiet {
        say::lines(&table::merged(&report)?);
    }
    if !args.quiet {
        warn(&report, &sysfs);
    }
    Ok(watched.end(status(&report)))
}

/// What should be known beside the figures.
fn warn(report: &Report, sysfs: &KsmSysfs) {
    for process in &report.processes {
        if let Some(left) = &process.left {
            say::note(format_args!("process {}: {left}", process.pid));
        }
    }
    for setting in &report.settings_left {
        say::note(setting);
    }
    let runs = sysfs.number(Knob::Run.file_name()).ok().flatten() == Some(1);
    match report.end {
        End::Marked if report.pages_marked > 0 && !runs => {
            say::note(
                "pages are marked, and ksmd does not run: `--wait` drives it, or write 1 to /sys/kernel/mm/ksm/run",
            );
        }
        End::Marked | End::Done => {}
        End::Timeout => say::note("the time was over; KSM's settings are as before, and what is merged stays so"),
        End::Interrupted => say::note("interrupted; KSM's settings are as before, and what is merged stays so"),
        End::NotScanning => {
            say::note("ksmd does not scan, so nothing more is merged: has somebody written to /sys/kernel/mm/ksm/run?");
        }
    }
}

/// Failed is what ended early, and what left out a process that was named and lives.
fn status(report: &Report) -> ExitCode {
    let ended_early = matches!(report.end, End::Timeout | End::NotScanning | End::Interrupted);
    let left_out = report.processes.iter().any(|process| process.left.is_some() && !process.gone);
    ExitCode::from(u8::from(ended_early || left_out))
}
