//! `pagefold run --backend ksm`: a command whose memory the kernel's KSM may merge, with ksmd driven while it runs.
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kernel::Signal;
use kernel::launch::{Launch, LaunchError, Launched};
use kernel::signals::{self, SignalFd};
use ksm::{
    Applied, Drive, DriveSettings, KsmError, KsmSysfs, Layout, ProcessId, Progress, StackLimit, StatePath, Tree,
};
use serde::Serialize;

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

/// The hidden subcommand under which this binary is its own guardian.
pub(crate) const GUARDIAN: &str = "ksm-guardian";

/// Statuses of env(1).
const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

const SUMMARY_INTERVAL: Duration = Duration::from_secs(10);

/// Runs the command and passes its status on; a signal that ended it ends this process too.
pub(crate) fn run(args: KsmRun) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let mut report = Report::new(&args, started);
    if let Err(error) = report.write(None) {
        eprintln!("pagefold: {error:#}");
        return Ok(ExitCode::from(FAILED));
    }
    // Before anything is started: what arrives from now on is forwarded, not lost.
    let signals = SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::CHILD])
        .context("cannot take signals")?;
    // Children that leave their parent stay below this process and are counted.
    kernel::task::set_child_subreaper(true).context("cannot become a child subreaper")?;
    let launched = match launch(&args, &signals, &mut report) {
        Ok(launched) => launched,
        Err(error) => {
            let status = match &error {
                LaunchError::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
                LaunchError::Exec { .. } => NOT_EXECUTABLE,
                _ => FAILED,
            };
            eprintln!("pagefold: {:#}", anyhow::Error::new(error));
            report.remove();
            return Ok(ExitCode::from(status));
        }
    };
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
    let status = watch(launched, &signals, &mut driven, &mut report)?;
    let last = driven.as_ref().map(|driven| driven.drive.last_progress());
    if let Some(driven) = driven {
        driven.stop(&mut report);
    }
    if let Err(error) = report.write(last.as_ref()) {
        report.say(&format!("{error:#}"));
    }
    report.last_line(last.as_ref());
    Ok(pass_on(status))
}

/// Starts the command with merging and the layout; goes on without what this kernel or this user cannot have.
fn launch(args: &KsmRun, signals: &SignalFd, report: &mut Report) -> Result<Launched, LaunchError> {
    let (program, arguments) = args.command.split_first().ok_or_else(|| LaunchError::Exec {
        program: OsString::new(),
        source: io::Error::from(io::ErrorKind::NotFound),
    })?;
    let prepare = |merge: bool| {
        let mut command = Command::new(program);
        command.args(arguments);
        signals.restore_in(&mut command);
        let mut launch = Launch::new(command);
        if merge {
            launch.memory_merge(true);
        }
        launch
    };
    let layout = match args.shared_layout {
        // A member that starts members gives them the layout that it has.
        true => Layout::inherited().map_or_else(Layout::draw, Ok).unwrap_or_else(|error| {
            report.refuse("layout", &format!("no shared layout: {error:#}"));
            Layout::Default
        }),
        false => Layout::Default,
    };
    let (launched, applied) = match layout.spawn(prepare(true), args.stack) {
        Err(LaunchError::Setup { what: "samepage merging", source }) => {
            report.refuse("prctl", &format!("the kernel does not take the command's memory for merging: {source}"));
            layout.spawn(prepare(false), args.stack)?
        }
        other => other?,
    };
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
    guardian: Child,
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
        let mut guardian = start_guardian(&path, sysfs, quiet)?;
        let tree = Tree::below_self().without(guardian.id().cast_signed());
        match Drive::start_at(&path, sysfs, settings, tree) {
            Ok((drive, repaired)) => {
                // An ordinary start changes settings too: only what was left by others is news.
                if !quiet && (!repaired.dead.is_empty() || !repaired.foreign.is_empty()) {
                    eprintln!("pagefold: {repaired}");
                }
                Ok(Self { drive, guardian, next_tick: Instant::now() })
            }
            Err(error) => {
                let _ = guardian.kill();
                let _ = guardian.wait();
                Err(error.into())
            }
        }
    }

    fn stop(self, report: &mut Report) {
        let (released, guardian) = self.release();
        match released {
            Ok(repaired) => {
                for foreign in &repaired.foreign {
                    let (knob, found) = (foreign.knob, foreign.found);
                    report.say(&format!("{knob} was set to {found} by somebody else meanwhile and is left so"));
                }
                end(guardian);
            }
            // The guardian stays and tries once more when this process is gone.
            Err(error) => report.refuse("release", &format!("KSM's settings are not restored yet: {error}")),
        }
    }

    /// Gives the lease back and ends the guardian, in this order.
    pub(crate) fn finish(self) -> Result<(), KsmError> {
        let (released, guardian) = self.release();
        released.map(|_| end(guardian))
    }

    fn release(self) -> (Result<ksm::Repaired, KsmError>, Child) {
        (self.drive.stop(), self.guardian)
    }
}

fn end(mut guardian: Child) {
    // Both fail only if it is gone already.
    let _ = guardian.kill();
    let _ = guardian.wait();
}

/// Runs until the command has ended.
fn watch(
    mut launched: Launched,
    signals: &SignalFd,
    driven: &mut Option<Driven>,
    report: &mut Report,
) -> anyhow::Result<ExitStatus> {
    let mut next_summary = Instant::now() + SUMMARY_INTERVAL;
    loop {
        while let Some(arrived) = signals.take().context("cannot read signals")? {
            match arrived.signal {
                Signal::CHILD => {}
                Signal::USR1 => report.state(driven.as_mut().and_then(|driven| driven.drive.progress().ok()).as_ref()),
                // A key of the terminal has reached the command too, which is of the same process group.
                _ if arrived.sender.is_none() => {}
                signal => {
                    // Gone already: the next round sees it.
                    let _ = launched.pidfd.send_signal(signal);
                }
            }
        }
        if let Some(status) = launched.child.try_wait().context("cannot wait for the command")? {
            return Ok(status);
        }
        signals::reap_others(launched.pid());
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
            let progress = driven.as_ref().map(|driven| driven.drive.last_progress());
            if let Err(error) = report.write(progress.as_ref()) {
                report.say(&format!("{error:#}"));
            }
        }
        let next = driven.as_ref().map_or(next_summary, |driven| driven.next_tick.min(next_summary));
        kernel::pidfd::poll_in(signals.as_fd(), Some(next.saturating_duration_since(Instant::now())))
            .context("cannot wait for signals")?;
    }
}

/// Ends as the command ended.
pub(crate) fn pass_on(status: ExitStatus) -> ExitCode {
    if let Some(code) = status.code() {
        return ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX));
    }
    let number = status.signal().unwrap_or(0);
    if let Some(signal) = Signal::from_named_raw(number) {
        signals::die_by(signal);
    }
    // As a shell says it, where the signal did not end this process.
    ExitCode::from(u8::try_from(128 + number).unwrap_or(u8::MAX))
}

/// What is told to people and to the summary file.
struct Report {
    summary: Summary,
    path: Option<PathBuf>,
    quiet: bool,
    started: Instant,
}

/// The summary document. Pages and bytes are of the command's processes; while they run together with other users of
/// KSM, `pages_shared`, `pages_sharing` and `bytes_saved` are their proportional part.
#[derive(Clone, Debug, Serialize)]
struct Summary {
    partition: Option<String>,
    backend: &'static str,
    layout: &'static str,
    processes: u64,
    processes_peak: u64,
    pages_managed: u64,
    pages_shared: u64,
    pages_sharing: u64,
    zero_pages: u64,
    bytes_saved: u64,
    bytes_saved_peak: u64,
    merges: u64,
    /// Of the whole host: the kernel counts copies of merged pages nowhere else.
    unshared_by_write: u64,
    /// Under KSM every copy of a merged page has diverged until ksmd merges it again.
    diverged: u64,
    refused: BTreeMap<&'static str, u64>,
    frozen_seconds: Frozen,
    /// ksmd's, and this process's own.
    cpu_seconds: f64,
    elapsed_seconds: f64,
    /// KSM's own counters at the last look.
    ksm: Option<Progress>,
}

/// KSM freezes nobody.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Frozen {
    p50: Option<f64>,
    p99: Option<f64>,
    max: Option<f64>,
}

impl Report {
    fn new(args: &KsmRun, started: Instant) -> Self {
        let summary = Summary {
            partition: args.partition.clone(),
            backend: "ksm",
            layout: if args.shared_layout { "shared" } else { "default" },
            processes: 0,
            processes_peak: 0,
            pages_managed: 0,
            pages_shared: 0,
            pages_sharing: 0,
            zero_pages: 0,
            bytes_saved: 0,
            bytes_saved_peak: 0,
            merges: 0,
            unshared_by_write: 0,
            diverged: 0,
            refused: BTreeMap::new(),
            frozen_seconds: Frozen::default(),
            cpu_seconds: 0.0,
            elapsed_seconds: 0.0,
            ksm: None,
        };
        Self { summary, path: args.summary.clone(), quiet: args.quiet, started }
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            eprintln!("pagefold: {text}");
        }
    }

    /// Something that was asked for and cannot be had.
    fn refuse(&mut self, reason: &'static str, text: &str) {
        *self.summary.refused.entry(reason).or_default() += 1;
        self.say(text);
    }

    fn seen(&mut self, progress: &Progress) {
        self.summary.processes_peak = self.summary.processes_peak.max(progress.tree.processes);
    }

    /// Rewrites the summary file, if there is to be one.
    fn write(&mut self, progress: Option<&Progress>) -> anyhow::Result<()> {
        let summary = &mut self.summary;
        summary.elapsed_seconds = self.started.elapsed().as_secs_f64();
        summary.cpu_seconds = kernel::sched::usage(kernel::sched::Whose::Own).cpu().as_secs_f64();
        if let Some(progress) = progress {
            summary.processes = progress.tree.processes;
            summary.processes_peak = summary.processes_peak.max(progress.tree.processes);
            summary.pages_managed = progress.tree.ksm_rmap_items;
            summary.pages_shared = progress.pages_shared;
            summary.pages_sharing = progress.pages_sharing;
            summary.zero_pages = progress.tree.ksm_zero_pages;
            summary.bytes_saved = progress.bytes_saved;
            summary.bytes_saved_peak = progress.bytes_saved_peak;
            summary.merges = progress.merges;
            summary.unshared_by_write = progress.unshared_by_write;
            summary.diverged = progress.unshared_by_write;
            summary.cpu_seconds += progress.ksmd_cpu_seconds.unwrap_or(0.0);
            summary.ksm = Some(*progress);
        }
        let Some(path) = &self.path else { return Ok(()) };
        let mut text = serde_json::to_vec_pretty(summary).context("cannot write the summary")?;
        text.push(b'\n');
        replace(path, &text).with_context(|| format!("cannot write the summary {}", path.display()))
    }

    /// A command that was never started leaves no summary.
    fn remove(&self) {
        if let Some(path) = self.path.as_deref().filter(|path| path.is_file()) {
            let _ = fs::remove_file(path);
        }
    }

    /// The answer to SIGUSR1.
    fn state(&self, progress: Option<&Progress>) {
        match progress {
            Some(progress) => eprintln!(
                "pagefold: {:?}, {} processes, {} saved now, {} at most, {} pages merged, ksmd {:.1} s",
                progress.phase,
                progress.tree.processes,
                mib(progress.bytes_saved),
                mib(progress.bytes_saved_peak),
                progress.tree.ksm_merging_pages + progress.tree.ksm_zero_pages,
                progress.ksmd_cpu_seconds.unwrap_or(0.0),
            ),
            None => eprintln!("pagefold: nothing is merged"),
        }
    }

    fn last_line(&self, progress: Option<&Progress>) {
        if let Some(progress) = progress {
            self.say(&format!(
                "KSM saved up to {} in {} processes, for {:.1} s of ksmd in {:.1} s",
                mib(progress.bytes_saved_peak),
                self.summary.processes_peak,
                progress.ksmd_cpu_seconds.unwrap_or(0.0),
                self.started.elapsed().as_secs_f64(),
            ));
        }
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

/// Replaces a file as a whole; what is no regular file, as a terminal or a pipe, is written to.
pub(crate) fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    // A link keeps pointing at the file.
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if path.exists() && !path.is_file() {
        return fs::OpenOptions::new().write(true).open(path)?.write_all(text);
    }
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
    let mut new_name = OsString::from(".");
    new_name.push(name);
    new_name.push(format!(".{}", std::process::id()));
    let new = path.with_file_name(new_name);
    let result = fs::write(&new, text).and_then(|()| fs::rename(&new, path));
    if result.is_err() {
        let _ = fs::remove_file(&new);
    }
    result
}

/// Starts the guardian: this binary under its hidden name, in a process group of its own, so that a key of the terminal
/// does not end it together with whom it guards.
fn start_guardian(path: &StatePath, sysfs: &KsmSysfs, quiet: bool) -> anyhow::Result<Child> {
    let me = ProcessId::current()?;
    Command::new("/proc/self/exe")
        .arg0("pagefold-guardian")
        .arg(GUARDIAN)
        .args([me.pid.to_string(), me.start_time.to_string()])
        .args([path.as_path(), sysfs.root()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(if quiet { Stdio::null() } else { Stdio::inherit() })
        .process_group(0)
        .spawn()
        .context("cannot start the guardian")
}

/// The guardian: waits for the end of the process that started it and ends that one's lease. `args` are what follows
/// the hidden subcommand: pid, start time, state file, KSM's directory.
pub(crate) fn guardian_main(args: &[OsString]) -> anyhow::Result<ExitCode> {
    let [pid, start_time, state, sysfs] = args else { anyhow::bail!("the guardian takes four arguments") };
    let number = |text: &OsString| text.to_str().and_then(|text| text.parse::<u64>().ok()).context("not a number");
    let holder = ProcessId { pid: i32::try_from(number(pid)?)?, start_time: number(start_time)? };
    // Who ends a whole session politely ends the guarded one too, which then takes some time to leave.
    let _ignored =
        SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT]).context("cannot block signals")?;
    ksm::guard(&StatePath::at(state), &KsmSysfs::at(sysfs), &[holder], |ended| {
        if !ended.repaired.is_clean() {
            eprintln!("pagefold: {}", ended.repaired);
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
