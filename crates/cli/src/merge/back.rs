//! `pagefold unmerge`.

use std::process::ExitCode;
use std::time::Instant;

use kernel::Bytes;
use ksm::request::{self, Unmerge, UnmergeEnd, UnmergeReport};
use ksm::set::{SetError, unmerge_host_at};
use ksm::{KsmSysfs, StatePath};

use super::{Watched, processes, refused, table};
use crate::args::merge::UnmergeArgs;
use crate::say;

/// Un-merges and reports.
pub(crate) fn unmerge(args: &UnmergeArgs) -> anyhow::Result<ExitCode> {
    if args.host {
        return host(args);
    }
    let mut watched = Watched::new(args.json || args.quiet)?;
    let pids = match processes(&args.pid, args.children) {
        Ok(pids) => pids,
        Err(status) => return Ok(status),
    };
    let request =
        Unmerge { processes: pids, ranges: args.range.clone(), step: Bytes::from_mib(args.step), all: args.all };
    let result = request::unmerge(&request, &mut |stage| watched.tell(stage));
    watched.bar.clear();
    let report = match result {
        Ok(report) => report,
        Err(error) => return refused(error),
    };
    if args.json {
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else if !args.quiet {
        say::lines(&table::unmerged(&report)?);
    }
    warn(&report);
    let left = report.processes.iter().any(|process| process.left.is_some() && !process.gone);
    Ok(watched.end(ExitCode::from(u8::from(left || report.end != UnmergeEnd::Done))))
}

/// What is not as it was asked for is said whatever else is.
fn warn(report: &UnmergeReport) {
    for process in &report.processes {
        if let Some(left) = &process.left {
            say::note(format_args!("process {}: {left}", process.pid));
        }
        if process.ksm_merge_any == Some(true) && process.left.is_none() {
            say::note(format_args!(
                "process {}: KSM is on for the whole process, so its new memory will be merged again; \
                 `unmerge --all` or `disable` ends that",
                process.pid
            ));
        }
    }
    match report.end {
        UnmergeEnd::Done => {}
        UnmergeEnd::ShortOfMemory => {
            say::note("stopped before memory runs out; what is done stays so, and the same command goes on from there");
        }
        UnmergeEnd::Interrupted => {
            say::note("interrupted; what is done stays so, and the same command goes on from there");
        }
    }
}

/// Everything on this machine.
fn host(args: &UnmergeArgs) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let unmerged = match unmerge_host_at(&StatePath::for_this_user(), &KsmSysfs::host(), false) {
        Ok(unmerged) => unmerged,
        Err(SetError::Ksm(error)) => return refused(error.into()),
        Err(error) => return Err(error.into()),
    };
    let seconds = begun.elapsed().as_secs_f64();
    if args.json {
        let document = serde_json::json!({ "pages_unmerged": unmerged.pages, "elapsed_seconds": seconds, "run": 2 });
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    } else if !args.quiet {
        say::note(format_args!("{} pages un-merged in {seconds:.2} s; ksmd is stopped", unmerged.pages));
    }
    Ok(ExitCode::SUCCESS)
}
