//! `pagefold ksm advise`: holds goals for ksmd until it is stopped.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kernel::Signal;
use kernel::signals::SignalFd;
use ksm::advise::{Advisor, Decision, Event, Goals, Pass, Summary};
use ksm::{KsmSysfs, Lease, Phase, StatePath};
use serde_json::json;

use super::advise_table::{line, table};
use super::refused::refused;
use crate::args::ksm_advise::{AdviseArgs, Boost};
use crate::guarded::Guardian;
use crate::say;

pub(crate) fn advise(args: &AdviseArgs) -> anyhow::Result<ExitCode> {
    hold(args).or_else(refused)
}

fn hold(args: &AdviseArgs) -> anyhow::Result<ExitCode> {
    // First of all: whatever ends this process politely from now on finds it tidy.
    let signals =
        SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT]).context("cannot take signals")?;
    let mut voice = Voice::new(args)?;
    let (sysfs, path, goals) = (KsmSysfs::host(), StatePath::for_this_user(), goals(args));
    ksm::check_writable(&sysfs)?;
    warn_of_others(&path, &voice);
    // First the guardian, then the lease: at no moment is there a lease that nobody would end.
    let guardian = Guardian::start(&path, &sysfs, args.quiet)?;
    let (mut advisor, repaired) = match Advisor::start_at(&path, &sysfs, goals) {
        Ok(started) => started,
        Err(error) => {
            guardian.end();
            return Err(error.into());
        }
    };
    if !repaired.is_clean() {
        voice.note(&repaired.to_string());
    }
    voice.start(&goals)?;
    let held = run(&mut advisor, &signals, args, &mut voice);
    let summary = advisor.summary();
    // Whatever went wrong, the settings are given back first. Failing that, the guardian tries again after us.
    let released = advisor.stop().context("KSM's settings are not restored yet");
    if released.is_ok() {
        guardian.end();
    }
    held?;
    for foreign in &released?.foreign {
        let (knob, found) = (foreign.knob, foreign.found);
        voice.note(&format!("{knob} was set to {found} by somebody else meanwhile and is left so"));
    }
    voice.summary(&summary)?;
    Ok(ExitCode::SUCCESS)
}

fn run(advisor: &mut Advisor, signals: &SignalFd, args: &AdviseArgs, voice: &mut Voice) -> anyhow::Result<()> {
    let end = args.duration.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds));
    loop {
        let (events, pause) = advisor.tick()?;
        for event in &events {
            voice.event(event)?;
        }
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(());
        }
        let pause = left.map_or(pause, |left| left.min(pause));
        if kernel::pidfd::poll_in(signals.as_fd(), Some(pause)).context("cannot wait for signals")?
            && signals.take().context("cannot read signals")?.is_some()
        {
            return Ok(());
        }
    }
}

fn goals(args: &AdviseArgs) -> Goals {
    let max_cpu = args.max_cpu / 100.0;
    Goals {
        scan_time: Duration::from_secs_f64(args.target_scan_time),
        max_cpu,
        boost: match args.boost {
            None => Some(max_cpu),
            Some(Boost::Off) => None,
            Some(Boost::Percent(percent)) => Some(percent / 100.0),
        },
        memory_pressure: args.pressure.memory,
        cpu_pressure: args.pressure.cpu,
        rest: !args.no_rest,
        keep_smart_scan: args.keep_smart_scan,
    }
}

/// Others may ask for a faster rate, which is then in force for all.
fn warn_of_others(path: &StatePath, voice: &Voice) {
    // Whoever cannot read the state hears of it in a moment, when the lease is taken.
    for holder in Lease::holders_at(path).unwrap_or_default() {
        let (who, pid) = (&holder.command, holder.process.pid);
        voice.note(&if holder.wanted.governs {
            format!(
                "another advisor ({who}, pid {pid}) holds goals of its own: of two rates the faster one is in force"
            )
        } else {
            format!("{who} (pid {pid}) drives ksmd too: while it asks for more than the goals do, they are not held")
        });
    }
}

/// Where it is said.
struct Voice {
    json: bool,
    quiet: bool,
    log: Option<(File, String)>,
    said: Instant,
}

/// A pass is worth a line to people if there was none for so long.
const SILENCE: Duration = Duration::from_secs(10);

impl Voice {
    fn new(args: &AdviseArgs) -> anyhow::Result<Self> {
        let log = args.log.as_ref().map(|path| {
            let name = path.display().to_string();
            let file = File::options().append(true).create(true).open(path);
            file.map(|file| (file, name)).with_context(|| format!("cannot write {}", path.display()))
        });
        Ok(Self { json: args.json, quiet: args.quiet, log: log.transpose()?, said: Instant::now() })
    }

    fn note(&self, text: &str) {
        if !self.quiet {
            say::note(text);
        }
    }

    fn tell(&mut self, text: &str) {
        self.said = Instant::now();
        if !self.quiet {
            say::lines(&format!("{text}\n"));
        }
    }

    fn document(&mut self, document: &serde_json::Value) -> anyhow::Result<()> {
        let text = format!("{document}\n");
        if let Some((file, name)) = &mut self.log
            && let Err(error) = file.write_all(text.as_bytes())
        {
            // A full disk is no reason to let ksmd go.
            say::note(format_args!("cannot write {name} any more: {error}"));
            self.log = None;
        }
        if self.json { say::answer(&text) } else { Ok(()) }
    }

    fn start(&mut self, goals: &Goals) -> anyhow::Result<()> {
        let boost = goals.boost.map(|boost| boost.max(goals.max_cpu) * 100.0);
        self.tell(&format!(
            "goal: a pass in {} s, at most {:.4} % of a CPU{}",
            goals.scan_time.as_secs_f64(),
            goals.max_cpu * 100.0,
            boost.map_or_else(String::new, |boost| format!(" ({boost:.4} % while new memory is looked at)"))
        ));
        self.document(&json!({
            "event": "start",
            "target_scan_time_seconds": goals.scan_time.as_secs_f64(),
            "max_cpu_percent": goals.max_cpu * 100.0,
            "boost_percent": boost,
            "memory_pressure_percent": goals.memory_pressure,
            "cpu_pressure_percent": goals.cpu_pressure,
            "rest": goals.rest,
            "keep_smart_scan": goals.keep_smart_scan,
        }))
    }

    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Decided { at, decision } => {
                self.tell(&line(*at, decision));
                self.document(&decided(*at, decision))
            }
            Event::Passed(pass) => {
                if self.said.elapsed() > SILENCE {
                    self.tell(&passed(pass));
                }
                let mut document = json!(pass);
                document["event"] = json!("pass");
                self.document(&document)
            }
            Event::Taken(foreign) => {
                let (knob, found) = (foreign.knob, foreign.found);
                self.note(&format!("{knob} was set to {found} by somebody else and is left so: goals may not be held"));
                self.document(&json!({"event": "taken", "knob": knob, "ours": foreign.ours, "found": found}))
            }
        }
    }

    fn summary(&mut self, summary: &Summary) -> anyhow::Result<()> {
        self.tell(&table(summary));
        let mut document = json!(summary);
        document["event"] = json!("summary");
        self.document(&document)
    }
}

fn decided(at: Duration, decision: &Decision) -> serde_json::Value {
    let why = match decision.turn {
        Some(turn) => format!("{turn}; {}", decision.pace),
        None => decision.pace.to_string(),
    };
    json!({
        "event": "decision",
        "at_seconds": at.as_secs_f64(),
        "phase": decision.phase,
        "turn": decision.turn,
        "pace": decision.pace,
        "rate": decision.rate,
        "pages_per_second": (decision.phase != Phase::Idle).then_some(decision.pages_per_second),
        "pass_pages": decision.pass_pages,
        "why": why,
    })
}

fn passed(pass: &Pass) -> String {
    let cpu = pass
        .ksmd_cpu_seconds
        .map_or_else(String::new, |cpu| format!(", {:.2} % of a CPU", cpu / pass.seconds.max(1e-9) * 100.0));
    format!("{:8.1} s  pass of {:.2} s, {} pages{cpu}", pass.at_seconds, pass.seconds, pass.pages_scanned)
}
