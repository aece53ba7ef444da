//! `pagefold ksm status`: what KSM does, for whom, and what it comes to.

use std::io::IsTerminal as _;
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kernel::signals::SignalFd;
use kernel::{Pid, Signal, pidfd};
use ksm::status::{Meter, Request, Status};
use ksm::{KsmSysfs, StatePath};

use crate::args::ksm_status::StatusArgs;
use crate::{NOT_HERE, say};

mod table;
mod words;

/// How long ksmd is watched in a single look.
const LOOK: Duration = Duration::from_secs(1);

/// Looks once, or again and again.
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let sysfs = KsmSysfs::host();
    if !sysfs.exists() {
        say::note(format_args!(
            "no KSM here: {} is missing; it needs a kernel with CONFIG_KSM and a mounted /sys (`pagefold doctor`)",
            sysfs.root().display()
        ));
        return Ok(ExitCode::from(NOT_HERE));
    }
    let mut looker = Looker {
        request: Request {
            pids: args.pid.iter().copied().map(Pid).collect(),
            cgroups: args.cgroup.clone(),
            all: args.all,
            vmas: args.vmas,
        },
        path: StatePath::for_this_user(),
        meter: Meter::new(&sysfs)?,
        sysfs,
    };
    if let Some(seconds) = args.watch {
        return watch(&mut looker, Duration::from_secs_f64(seconds), args.json);
    }
    // A ksmd that stands still has no speed to wait for.
    if looker.sysfs.number("run")? == Some(1) {
        std::thread::sleep(LOOK);
    }
    let status = looker.look()?;
    let text = match args.json {
        true => format!("{}\n", serde_json::to_string_pretty(&status)?),
        false => table::table(&status)?,
    };
    say::answer(&text)?;
    Ok(code(&looker.request, &status))
}

struct Looker {
    request: Request,
    path: StatePath,
    meter: Meter,
    sysfs: KsmSysfs,
}

impl Looker {
    fn look(&mut self) -> anyhow::Result<Status> {
        Ok(Status::look(&self.sysfs, &self.path, &self.request, Some(&mut self.meter))?)
    }
}

/// A failure if none of those that were named could be looked at.
fn code(request: &Request, status: &Status) -> ExitCode {
    if request.pids.is_empty() || !status.processes.is_empty() {
        return ExitCode::SUCCESS;
    }
    ExitCode::from(if status.skipped.iter().any(|skipped| skipped.denied) { NOT_HERE } else { 1 })
}

/// Looks again and again until a signal says that it is enough, or nobody reads any more.
fn watch(looker: &mut Looker, pause: Duration, json: bool) -> anyhow::Result<ExitCode> {
    let signals = SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP]).context("cannot block signals")?;
    let begun = Instant::now();
    let live = !json && std::io::stdout().is_terminal();
    // The first look has nothing to compare with: it waits a moment, so that its speeds are some.
    let mut next = begun + pause.min(LOOK);
    loop {
        let rest = next.saturating_duration_since(Instant::now());
        let ended = pidfd::poll_in_or_left(signals.as_fd(), std::io::stdout().as_fd(), Some(rest));
        if ended.context("cannot wait for signals")? {
            return Ok(ExitCode::SUCCESS);
        }
        let status = looker.look()?;
        let text = if json {
            format!("{}\n", serde_json::to_string(&status)?)
        } else if live {
            // Home, then all below is cleared: nothing flickers.
            format!("\x1b[H\x1b[2J{}", table::table(&status)?)
        } else {
            table::lines(&status, begun.elapsed())?
        };
        if !say::read_on(&text)? {
            return Ok(ExitCode::SUCCESS);
        }
        // A slow look is not followed by others in a hurry.
        next = Instant::now() + pause;
    }
}
