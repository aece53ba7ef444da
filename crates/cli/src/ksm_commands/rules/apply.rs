//! `pagefold ksm rules apply` and `undo`.

use std::cell::Cell;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kernel::signals::SignalFd;
use kernel::{KsmSysfs, Signal};
use ksm::ProcessId;
use ksm::keeper::{Event, Keeper, Record, Standing, What};
use rules::Rules;
use serde::Serialize;

use super::{read_right, words};
use crate::args::ksm_rules::{ApplyArgs, UndoArgs};
use crate::{NOT_HERE, say};

/// Looks of a call without `--watch`: what is started by a process before it is enabled is found by the next one.
const LOOKS: usize = 5;
/// Events that the document keeps, the last ones.
const KEPT: usize = 10_000;

/// What `--json` prints.
#[derive(Default, Serialize)]
struct Document {
    /// Times that all processes were looked at.
    looks: u64,
    elapsed_seconds: f64,
    /// CPU time of this process.
    cpu_seconds: f64,
    enabled: u64,
    disabled: u64,
    refused: u64,
    dropped: u64,
    released: u64,
    /// Processes that are enabled by rules now.
    enabled_now: usize,
    /// What was done and noticed, the last 10,000 of it.
    events: Vec<Event>,
    /// Refusals for want of a right.
    #[serde(skip)]
    not_permitted: u64,
}

impl Document {
    fn add(&mut self, events: Vec<Event>, quiet: bool) {
        for event in events {
            match &event.what {
                What::Enabled => self.enabled += 1,
                What::Disabled => self.disabled += 1,
                What::Dropped { .. } => self.dropped += 1,
                What::Released => self.released += 1,
                What::Refused { reason, .. } => {
                    self.refused += 1;
                    self.not_permitted += u64::from(reason == "not_permitted");
                }
            }
            if !quiet {
                say::note(words::event(&event));
            }
            self.events.push(event);
        }
        if self.events.len() > 2 * KEPT {
            self.events.drain(..self.events.len() - KEPT);
        }
    }

    /// All were brought to where they are to be, or some were not, or none for want of a right.
    fn status(&self) -> ExitCode {
        if self.refused == 0 {
            return ExitCode::SUCCESS;
        }
        let none = self.enabled + self.disabled + self.dropped == 0;
        ExitCode::from(if none && self.not_permitted == self.refused { NOT_HERE } else { 1 })
    }

    fn finish(&mut self, keeper: &Keeper, begun: Instant, json: bool) -> anyhow::Result<()> {
        self.enabled_now = keeper.record().entries().filter(|entry| is_enabled(entry.standing)).count();
        self.elapsed_seconds = begun.elapsed().as_secs_f64();
        self.cpu_seconds = cpu_seconds();
        self.events.drain(..self.events.len().saturating_sub(KEPT));
        if json { say::answer(&format!("{}\n", serde_json::to_string_pretty(self)?)) } else { Ok(()) }
    }
}

fn is_enabled(standing: Standing) -> bool {
    matches!(standing, Standing::Enabled { .. })
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Takes the record. What keeps this from working on this host at all is said, with the status of that.
fn keeper(rules: Rules, timeout: Duration) -> anyhow::Result<Result<Keeper, ExitCode>> {
    let sysfs = KsmSysfs::host();
    if !sysfs.exists() {
        say::note(format_args!("this kernel has no KSM: {} is missing", sysfs.root().display()));
        return Ok(Err(ExitCode::from(NOT_HERE)));
    }
    if let Err(error) = ProcessId::current() {
        say::note(error);
        return Ok(Err(ExitCode::from(NOT_HERE)));
    }
    let record = Record::hold(&Record::path_for_this_user())?;
    Ok(Ok(Keeper::new(rules, record, timeout)))
}

pub(super) fn apply(args: &ApplyArgs) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let Some(rules) = read_right(&args.file)? else { return Ok(ExitCode::FAILURE) };
    let stop = Stop::new()?;
    let mut keeper = match keeper(rules, Duration::from_secs_f64(args.timeout))? {
        Ok(keeper) => keeper,
        Err(status) => return Ok(status),
    };
    let mut document = Document::default();
    match args.watch {
        Some(seconds) => watch(args, Duration::from_secs_f64(seconds), &stop, &mut keeper, &mut document)?,
        None => once(&stop, &mut keeper, &mut document, args.quiet)?,
    }
    document.finish(&keeper, begun, args.json)?;
    if !args.quiet {
        tell_end(&document);
    }
    Ok(document.status())
}

/// Until a look finds nothing more to do.
fn once(stop: &Stop, keeper: &mut Keeper, document: &mut Document, quiet: bool) -> anyhow::Result<()> {
    for _ in 0..LOOKS {
        let events = keeper.look(&|| stop.go_on())?;
        document.looks += 1;
        let more = events.iter().any(|event| !event.is_refusal());
        document.add(events, quiet);
        if !more || !stop.go_on() {
            break;
        }
    }
    Ok(())
}

fn watch(
    args: &ApplyArgs,
    interval: Duration,
    stop: &Stop,
    keeper: &mut Keeper,
    document: &mut Document,
) -> anyhow::Result<()> {
    let mut file = Watched::new(&args.file);
    while stop.go_on() {
        let next = Instant::now() + interval;
        match keeper.look(&|| stop.go_on()) {
            Ok(events) => document.add(events, args.quiet),
            // The record cannot be written, say: nothing was enabled, and the next look tries again.
            Err(error) if document.looks > 0 => say::note(format_args!("{:#}", anyhow::Error::new(error))),
            Err(error) => return Err(error.into()),
        }
        document.looks += 1;
        if document.looks == 1 && !args.quiet {
            tell_end(document);
            say::note(format_args!("looking again every {} s; SIGHUP has the file read again", interval.as_secs_f64()));
        }
        while stop.go_on() && Instant::now() < next {
            stop.wait(next)?;
            if stop.take_reload() {
                reload(args, keeper, &mut file);
                break;
            }
        }
        if !args.quiet {
            file.tell_change(&args.file);
        }
    }
    if args.undo {
        let events = keeper.undo()?;
        document.add(events, args.quiet);
    } else if !args.quiet {
        let count = keeper.record().entries().filter(|entry| is_enabled(entry.standing)).count();
        say::note(format_args!("{count} processes stay enabled; pagefold ksm rules undo disables them"));
    }
    Ok(())
}

/// Reads the file again. Rules with a mistake change nothing.
fn reload(args: &ApplyArgs, keeper: &mut Keeper, file: &mut Watched) {
    let seen = Watched::new(&args.file);
    match read_right(&args.file) {
        Ok(Some(rules)) => {
            if !args.quiet {
                say::note(format_args!("read {} again: {} rules", args.file.display(), rules.rules.len()));
            }
            keeper.set_rules(rules);
            *file = seen;
        }
        Ok(None) => say::note("the rules that were read before stay in force"),
        Err(error) => say::note(format_args!("{error:#}: the rules that were read before stay in force")),
    }
}

/// The file as it was read. It is not read again by itself when it changes: half of a file can be rules too, others.
struct Watched {
    read: Option<(u64, u64, std::time::SystemTime)>,
    told: Cell<bool>,
}

impl Watched {
    fn new(file: &Path) -> Self {
        Self { read: Self::look(file), told: Cell::new(false) }
    }

    fn look(file: &Path) -> Option<(u64, u64, std::time::SystemTime)> {
        use std::os::unix::fs::MetadataExt as _;
        let found = std::fs::metadata(file).ok()?;
        Some((found.ino(), found.len(), found.modified().ok()?))
    }

    fn tell_change(&self, file: &Path) {
        if !self.told.get() && Self::look(file) != self.read {
            self.told.set(true);
            say::note(format_args!(
                "{} has changed; kill -HUP {} has it read again",
                file.display(),
                std::process::id()
            ));
        }
    }
}

/// Signals that end this, or have the file read again.
struct Stop {
    signals: SignalFd,
    stop: Cell<bool>,
    reload: Cell<bool>,
}

impl Stop {
    fn new() -> anyhow::Result<Self> {
        let signals = SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP]).context("cannot take signals")?;
        Ok(Self { signals, stop: Cell::new(false), reload: Cell::new(false) })
    }

    /// False after Ctrl-C, SIGTERM, or when the terminal has gone. What is done to one process is finished first.
    fn go_on(&self) -> bool {
        while let Ok(Some(arrived)) = self.signals.take() {
            match arrived.signal() {
                // One of the kernel's own is a terminal that has gone.
                Some(Signal::HUP) if arrived.sender.is_some() => self.reload.set(true),
                _ => self.stop.set(true),
            }
        }
        !self.stop.get()
    }

    fn take_reload(&self) -> bool {
        self.go_on();
        self.reload.take()
    }

    fn wait(&self, until: Instant) -> anyhow::Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        kernel::pidfd::poll_in(self.signals.as_fd(), Some(left)).context("cannot wait for signals")?;
        Ok(())
    }
}

pub(super) fn undo(args: &UndoArgs) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let _stop = Stop::new()?;
    let mut keeper = match keeper(Rules::default(), Duration::from_secs_f64(args.timeout))? {
        Ok(keeper) => keeper,
        Err(status) => return Ok(status),
    };
    let mut document = Document { looks: 1, ..Document::default() };
    document.add(keeper.undo()?, args.quiet);
    document.finish(&keeper, begun, args.json)?;
    if !args.quiet {
        tell_end(&document);
    }
    Ok(document.status())
}

fn tell_end(document: &Document) {
    let Document { enabled, disabled, refused, .. } = document;
    say::note(format_args!("{enabled} enabled, {disabled} disabled, {refused} refused"));
    if *enabled > 0
        && let Some(note) = ksmd_note()
    {
        say::lines(&note);
    }
}

/// What has to be known where ksmd does nothing.
pub(super) fn ksmd_note() -> Option<String> {
    let run = KsmSysfs::host().number("run").ok().flatten()?;
    (run != 1).then(|| {
        format!(
            "pagefold: ksmd does not run (/sys/kernel/mm/ksm/run is {run}), so nothing is merged yet: pagefold ksm advise, or \
             pagefold ksm set run=1\n"
        )
    })
}
