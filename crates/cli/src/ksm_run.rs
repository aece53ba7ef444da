//! `pagefold run --backend ksm`: a command whose memory the kernel's KSM may merge, with ksmd driven while it runs.
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use kernel::launch::{LaunchError, Launched};
use ksm::{Applied, Drive, DriveSettings, KsmError, KsmSysfs, Layout, StackLimit, StatePath, Tree};

use crate::guarded::Guardian;
use crate::ksm_report::Report;
use crate::say;
use crate::start::{Ready, not_started, told};
use crate::watch::{Seen, Watch, pass_on};

/// What `run --backend ksm` was asked for.
#[derive(Clone, Debug)]
pub(crate) struct KsmRun {
    /// Name in reports.
    pub(crate) partition: Option<String>,
    /// One address-space layout for all members.
    pub(crate) shared_layout: bool,
    /// What becomes of the stack limit that makes the shared layout.
    pub(crate) stack: StackLimit,
    /// Where the summary goes.
    pub(crate) summary: Option<PathBuf>,
    /// Nothing on stderr but errors that keep the command from being started.
    pub(crate) quiet: bool,
    /// The program and its arguments.
    pub(crate) command: Vec<OsString>,
}

const SUMMARY_INTERVAL: Duration = Duration::from_secs(10);

/// Runs the command and passes its status on; a signal that ended it ends this process too.
pub(crate) fn run(args: KsmRun) -> anyhow::Result<ExitCode> {
    let ready = match Ready::get(args.summary.as_deref()) {
        Ok(ready) => ready,
        Err(status) => return Ok(status),
    };
    let mut report = Report::new(&args, ready.summary.as_ref());
    let launched = match launch(&args, &ready, &mut report) {
        Ok(launched) => launched,
        Err(error) => return Ok(not_started(error)),
    };
    report.write(None);
    let mut driven = match Driven::start(args.quiet) {
        Ok(driven) => Some(driven),
        Err(error) => {
            report.refuse(
                reason(&error),
                &format!("ksmd is not driven, so memory is merged only if it runs already: {error:#}"),
            );
            None
        }
    };
    let status = watch(&mut Watch::new(launched, &ready.signals), &mut driven, &mut report)?;
    let last = driven.as_ref().map(|driven| driven.drive.last_progress());
    if let Some(driven) = driven {
        driven.stop(&mut report);
    }
    report.write(last.as_ref());
    report.last_line(last.as_ref());
    Ok(pass_on(status))
}

/// Starts the command with merging and the layout; goes on without what this kernel or this user cannot have.
fn launch(args: &KsmRun, ready: &Ready, report: &mut Report<'_>) -> Result<Launched, LaunchError> {
    let layout = match args.shared_layout {
        true => Layout::of_partition().unwrap_or_else(|error| {
            report.refuse("layout", &format!("no shared layout: {error:#}"));
            Layout::Default
        }),
        false => Layout::Default,
    };
    let mut spawned = spawn(args, ready, layout, report);
    if layout != Layout::Default
        && let Err(error) = &spawned
        && error.is_scarcity()
    {
        // The layout takes a thread and descriptors of its own.
        report.refuse("layout", &format!("no shared layout: {}", told(error)));
        spawned = spawn(args, ready, Layout::Default, report);
    }
    let (launched, applied) = spawned?;
    match applied {
        Applied::Default | Applied::Shared => {}
        Applied::SharedWithRaisedLimit(error) => {
            report.refuse("stack_limit", &format!("the stack limit stays raised: {error}"));
        }
        Applied::Privileged => {
            report.refuse("layout", "no shared layout: the program raises its privileges");
        }
    }
    Ok(launched)
}

/// With merging if the kernel takes it.
fn spawn(
    args: &KsmRun,
    ready: &Ready,
    layout: Layout,
    report: &mut Report<'_>,
) -> Result<(Launched, Applied), LaunchError> {
    let mut launch = ready.launch(&args.command)?;
    launch.memory_merge(true);
    match layout.spawn(launch, args.stack) {
        Err(LaunchError::Setup { what: "samepage merging", source }) => {
            report.refuse("prctl", &format!("the kernel does not take the command's memory for merging: {source}"));
            layout.spawn(ready.launch(&args.command)?, args.stack)
        }
        other => other,
    }
}

/// A short word for a summary.
fn reason(error: &anyhow::Error) -> &'static str {
    match error.downcast_ref::<KsmError>() {
        Some(KsmError::Missing { .. }) => "no_ksm",
        Some(KsmError::ReadOnly { .. }) => "ksm_read_only",
        _ => "ksm",
    }
}

/// ksmd at work under the lease, with the guardian beside it.
pub(crate) struct Driven {
    pub(crate) drive: Drive,
    guardian: Guardian,
    next_tick: Instant,
}

impl Driven {
    /// Drives ksmd for everything below this process.
    fn start(quiet: bool) -> anyhow::Result<Self> {
        Self::start_with(&KsmSysfs::host(), DriveSettings::default(), quiet)
    }

    /// As above with other settings.
    pub(crate) fn start_with(sysfs: &KsmSysfs, settings: DriveSettings, quiet: bool) -> anyhow::Result<Self> {
        ksm::check_writable(sysfs)?;
        let path = StatePath::for_this_user();
        // First the guardian, then the lease: at no moment is there a lease that nobody would end.
        let guardian = Guardian::start(&path, sysfs, quiet)?;
        let tree = Tree::below_self().without(guardian.pid());
        match Drive::start_at(&path, sysfs, settings, tree) {
            Ok((drive, repaired)) => {
                // An ordinary start changes settings too: only what was left by others is news.
                if !quiet && (!repaired.dead.is_empty() || !repaired.foreign.is_empty()) {
                    say::note(&repaired);
                }
                Ok(Self { drive, guardian, next_tick: Instant::now() })
            }
            Err(error) => {
                guardian.end();
                Err(error.into())
            }
        }
    }

    fn stop(self, report: &mut Report<'_>) {
        let (released, guardian) = self.release();
        match released {
            Ok(repaired) => {
                for foreign in &repaired.foreign {
                    let (knob, found) = (foreign.knob, foreign.found);
                    report.say(&format!("{knob} was set to {found} by somebody else meanwhile and is left so"));
                }
                guardian.end();
            }
            // The guardian stays and tries once more when this process is gone.
            Err(error) => report.refuse("release", &format!("KSM's settings are not restored yet: {error}")),
        }
    }

    /// Gives the lease back and ends the guardian, in this order.
    pub(crate) fn finish(self) -> Result<(), KsmError> {
        let (released, guardian) = self.release();
        released.map(|_| guardian.end())
    }

    fn release(self) -> (Result<ksm::Repaired, KsmError>, Guardian) {
        (self.drive.stop(), self.guardian)
    }
}

/// Runs until the command has ended.
fn watch(watch: &mut Watch<'_>, driven: &mut Option<Driven>, report: &mut Report<'_>) -> anyhow::Result<ExitStatus> {
    let mut next_summary = Instant::now() + SUMMARY_INTERVAL;
    loop {
        match watch.look()? {
            Seen::Ended(status) => return Ok(status),
            Seen::Runs { asked: true } => {
                report.state(driven.as_mut().and_then(|driven| driven.drive.progress().ok()).as_ref());
            }
            Seen::Runs { asked: false } => {}
        }
        let now = Instant::now();
        if let Some(on) = driven.as_mut().filter(|driven| driven.next_tick <= now) {
            match on.drive.tick() {
                Ok(pause) => {
                    on.next_tick = Instant::now() + pause;
                    report.seen(&on.drive.last_progress());
                }
                Err(error) => {
                    report.refuse("drive", &format!("ksmd is not driven any more: {error:#}"));
                    if let Some(driven) = driven.take() {
                        driven.stop(report);
                    }
                }
            }
        }
        if next_summary <= now {
            next_summary = now + SUMMARY_INTERVAL;
            report.write(driven.as_ref().map(|driven| driven.drive.last_progress()).as_ref());
        }
        watch.wait(driven.as_ref().map_or(next_summary, |driven| driven.next_tick.min(next_summary)))?;
    }
}
