//! `pagefold enable` and `disable`.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget};
use kernel::signals::SignalFd;
use kernel::{KsmSysfs, Pid, Signal};
use ksm::enable::{EnableError, Event, Goal, Report, Rules, Selection, apply_to_all};
use serde::Serialize;

use crate::args::enable::{DisableArgs, EnableArgs, Whom};
use crate::enable_table::Told;
use crate::{NOT_HERE, say};

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    action: &'static str,
    /// KSM's `run`: 1 while ksmd merges, 0 while it does not, 2 while it only un-merges.
    run: Option<i64>,
    #[serde(flatten)]
    report: &'a Report,
}

pub(crate) fn enable(args: &EnableArgs) -> anyhow::Result<ExitCode> {
    let users = rules::Users::host();
    let never = |pid: Pid| {
        let reason = rules::never_merge(&rules::facts(pid, &users)?)?;
        let way_out = "--ignore-never-merge enables it all the same";
        (!args.ignore_never_merge).then(|| format!("never merged ({}): {}; {way_out}", reason.name, reason.reason))
    };
    act("enable", &args.whom, &Goal { later: args.later, ..goal(Goal::enable(), &args.whom) }, &never)
}

pub(crate) fn disable(args: &DisableArgs) -> anyhow::Result<ExitCode> {
    act("disable", &args.whom, &goal(Goal::disable(), &args.whom), &|_| None)
}

fn goal(all: Goal, whom: &Whom) -> Goal {
    Goal { only: whom.vma.clone(), exclude: whom.exclude.clone(), ..all }
}

fn act(
    action: &'static str,
    whom: &Whom,
    goal: &Goal,
    never: &(dyn Fn(Pid) -> Option<String> + Sync),
) -> anyhow::Result<ExitCode> {
    let selection = Selection {
        pids: whom.pids.iter().map(|pid| Pid(*pid)).collect(),
        children: whom.children,
        cgroups: whom.cgroup.clone(),
    };
    let limit = Duration::from_secs_f64(whom.timeout);
    // Broken off between two calls: what was done by then is told.
    let signals = SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP]).context("cannot take signals")?;
    let stopped = AtomicBool::new(false);
    let stop = || {
        if matches!(signals.take(), Ok(Some(_))) {
            stopped.store(true, Ordering::Relaxed);
        }
        stopped.load(Ordering::Relaxed)
    };
    let rules = Rules { goal, force: whom.force, timeout: limit, stop: &stop, never };
    let progress = Progress::new(whom.quiet || whom.json);
    let report = match apply_to_all(&selection, &rules, limit, &mut |event| progress.tell(event)) {
        Ok(report) => report,
        Err(error) => {
            let not_here = matches!(error, EnableError::NoKsm | EnableError::NoProc);
            say::note(format_args!("{:#}", anyhow::Error::new(error)));
            return Ok(ExitCode::from(if not_here { NOT_HERE } else { 1 }));
        }
    };
    progress.0.finish_and_clear();
    let run = KsmSysfs::host().number("run").ok().flatten();
    if whom.json {
        let document = Document { action, run, report: &report };
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    } else if !whom.quiet {
        say::lines(&Told { report: &report, goal, run }.to_string());
    }
    Ok(status(&report))
}

/// Done; or some were not; or nobody, for want of a right.
fn status(report: &Report) -> ExitCode {
    let done = report.processes.iter().filter(|process| process.outcome.is_done()).count();
    if done == report.processes.len() && done + report.ended > 0 && report.complete {
        return ExitCode::SUCCESS;
    }
    let not_permitted = report.processes.iter().all(|process| process.outcome.is_not_permitted());
    ExitCode::from(if not_permitted && !report.processes.is_empty() { NOT_HERE } else { 1 })
}

/// How far it has come, on a terminal.
struct Progress(ProgressBar);

impl Progress {
    fn new(hidden: bool) -> Self {
        let shown = !hidden && std::io::stderr().is_terminal();
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self(ProgressBar::with_draw_target(None, target))
    }

    fn tell(&self, event: Event<'_>) {
        match event {
            Event::Listed(known) => self.0.set_length(known as u64),
            Event::Dealt(_) => self.0.inc(1),
        }
    }
}
