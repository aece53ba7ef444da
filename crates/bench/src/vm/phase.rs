//! One way to merge the memory of fresh guests, watched for a while.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use ksm::{Counters, KsmSysfs, Ksmd, Lease, Rate, Wanted};
use serde::Serialize;
use serde_json::Value;

use super::disturb::{Disturbance, Disturbed};
use super::host::{self, Memory, median};
use crate::guest::{Fleet, GuestOptions, Kernel};

/// How long a guest may take to boot or to go one round on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);
/// How often the host is looked at.
const EVERY: Duration = Duration::from_secs(2);

/// A way to merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// No merging.
    Plain,
    /// Kernel KSM with the kernel's own settings: 100 pages every 20 ms.
    KsmDefault,
    /// Kernel KSM with 20,000 pages every 20 ms.
    KsmFlatOut,
    /// `pagefold run`.
    Pagefold,
}

impl Phase {
    /// The name in reports.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::KsmDefault => "ksmd default",
            Self::KsmFlatOut => "ksmd flat out",
            Self::Pagefold => "pagefold",
        }
    }

    fn rate(self) -> Option<Rate> {
        match self {
            Self::KsmDefault => Some(Rate { pages_to_scan: 100, sleep_millisecs: 20 }),
            Self::KsmFlatOut => Some(Rate { pages_to_scan: 20_000, sleep_millisecs: 20 }),
            Self::Plain | Self::Pagefold => None,
        }
    }
}

/// The guests of a phase.
#[derive(Clone, Debug)]
pub(crate) struct Guests {
    pub(crate) kernel: Kernel,
    pub(crate) initramfs: PathBuf,
    pub(crate) count: u32,
    pub(crate) memory_mib: u32,
    pub(crate) files_mib: u32,
    pub(crate) disk_mib: u64,
    /// How long they are watched once all are ready.
    pub(crate) time: Duration,
    /// The binary for `pagefold run`, with its options.
    pub(crate) pagefold: Vec<OsString>,
    pub(crate) disturb: bool,
}

/// What came of a phase.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) phase: Phase,
    /// The host over time.
    pub(crate) memory: Vec<Memory>,
    /// The middle of the last third of it.
    pub(crate) settled_host: f64,
    pub(crate) settled_tree: f64,
    /// Rounds in which everything was right.
    pub(crate) rounds_ok: u64,
    /// Files and blocks read and compared, and how many were wrong.
    pub(crate) checks: u64,
    pub(crate) checks_bad: u64,
    /// Processor seconds of ksmd, or of broker and helpers, from the start of the guests.
    pub(crate) cpu_seconds: f64,
    /// From the start of the guests to the end of the watch.
    pub(crate) elapsed_seconds: f64,
    /// KSM's counters at the end of the watch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ksm: Option<Counters>,
    /// The summary of `pagefold run` at the end of the watch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) summary: Option<Value>,
    /// What was done to the guests meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) disturbed: Option<Disturbed>,
}

impl Outcome {
    /// Mebibytes less than `plain`, for a processor second.
    pub(crate) fn saved_per_second(&self, plain: f64) -> f64 {
        let saved = (plain - self.settled_tree) / f64::from(1 << 20);
        if self.cpu_seconds > 0.0 { saved / self.cpu_seconds } else { 0.0 }
    }

    /// A number of the summary, by its path.
    pub(crate) fn of_summary(&self, pointer: &str) -> f64 {
        self.summary.as_ref().and_then(|summary| summary.pointer(pointer)).and_then(Value::as_f64).unwrap_or(0.0)
    }
}

impl Guests {
    /// Options of all guests, with their disks in `folder`.
    pub(crate) fn options(&self, folder: &Path) -> Result<Vec<GuestOptions>> {
        (0..self.count)
            .map(|number| {
                let name = format!("guest{number}");
                let mut guest = GuestOptions::new(&name, &self.kernel, &self.initramfs);
                guest.memory_mib = self.memory_mib;
                guest.append = format!("check.mib={}", self.files_mib);
                if self.disk_mib > 0 {
                    let image = folder.join(format!("{name}.disk"));
                    File::create(&image)?.set_len(self.disk_mib << 20)?;
                    guest.disk = Some(image);
                }
                Ok(guest)
            })
            .collect()
    }

    /// Starts them, below `pagefold run` or not.
    pub(crate) fn start(&self, folder: &Path, pagefold: bool) -> Result<Fleet> {
        let mut prefix = Vec::new();
        if pagefold {
            prefix.extend(self.pagefold.iter().cloned());
            prefix.extend(["--summary".into(), summary_file(folder).into_os_string(), "--".into()]);
        }
        Fleet::start(&prefix, folder, self.options(folder)?)
    }

    /// Runs one phase on fresh guests.
    pub(crate) fn run(&self, phase: Phase) -> Result<Outcome> {
        let folder = tempfile::Builder::new().prefix("vm").tempdir().context("create a folder for the guests")?;
        let lease = phase.rate().map(|rate| {
            let wanted = Wanted { run: Some(true), rate: Some(rate), ..Wanted::default() };
            Lease::acquire(&KsmSysfs::host(), wanted)
        });
        let lease = lease.transpose().context("drive ksmd")?;
        let ksmd = lease.as_ref().and_then(|_| Ksmd::find()).and_then(|ksmd| Some((ksmd, ksmd.cpu_time()?)));
        let before = host::host()?;
        let begun = Instant::now();
        let mut fleet = self.start(folder.path(), phase == Phase::Pagefold)?;
        let boot = fleet.wait_ready(PATIENCE)?;
        eprintln!("{}: ready after {:.0?}", phase.name(), boot);
        let disturbance = self.disturb.then(|| Disturbance::start(&mut fleet)).transpose()?;
        let ready = Instant::now();
        let mut memory = Vec::new();
        while ready.elapsed() < self.time {
            memory.push(Memory::look(fleet.launcher(), before, ready.elapsed())?);
            if let Some(last) = memory.last().filter(|_| memory.len() % 10 == 1) {
                eprintln!("{}: {}", phase.name(), line(last, &summary(folder.path())));
            }
            std::thread::sleep(EVERY.min(self.time.saturating_sub(ready.elapsed())));
        }
        let elapsed_seconds = begun.elapsed().as_secs_f64();
        let disturbed = disturbance.map(Disturbance::stop).transpose()?;
        let now = ksmd.and_then(|(ksmd, before)| Some((ksmd.cpu_time()?.saturating_sub(before)).as_secs_f64()));
        let counters = lease.as_ref().map(|lease| Counters::read(lease.sysfs())).transpose()?;
        let verdicts = fleet.verdicts(PATIENCE)?;
        let rounds_ok = fleet.guests.iter().map(|guest| Ok(guest.checks()?.rounds_ok)).sum::<Result<u64>>()?;
        for guest in &fleet.guests {
            guest.checks()?.bad.iter().for_each(|line| eprintln!("{}: {line}", phase.name()));
        }
        let status = fleet.stop(PATIENCE)?;
        let summary = (phase == Phase::Pagefold).then(|| summary(folder.path()));
        if let Some(lease) = lease {
            let repaired = lease.release().context("give KSM's settings back")?;
            if !repaired.is_clean() {
                eprintln!("{}: {repaired}", phase.name());
            }
        }
        let checks_bad = verdicts.iter().map(|verdict| verdict.bad).sum();
        if !status.success() && checks_bad == 0 {
            let log = std::fs::read_to_string(folder.path().join("launcher.log")).unwrap_or_default();
            bail!("{} ended with {status}\n{log}", phase.name());
        }
        let last = memory.get(memory.len() * 2 / 3..).unwrap_or_default();
        let cpu = summary.as_ref().and_then(|summary| summary.pointer("/cpu_seconds")).and_then(Value::as_f64);
        Ok(Outcome {
            phase,
            settled_host: median(last.iter().map(|memory| memory.host as f64).collect()),
            settled_tree: median(last.iter().map(|memory| memory.tree as f64).collect()),
            memory,
            rounds_ok,
            checks: verdicts.iter().map(|verdict| verdict.files).sum(),
            checks_bad,
            cpu_seconds: cpu.or(now).unwrap_or(0.0),
            elapsed_seconds,
            ksm: counters,
            summary,
            disturbed,
        })
    }
}

/// Where `pagefold run` writes its summary.
pub(crate) fn summary_file(folder: &Path) -> PathBuf {
    folder.join("summary.json")
}

/// The last summary; empty where there is none yet.
pub(crate) fn summary(folder: &Path) -> Value {
    let text = std::fs::read(summary_file(folder)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

fn line(memory: &Memory, summary: &Value) -> String {
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let mut text = format!(
        "{:.0} s: host {:.0} MiB, tree {:.0} MiB, store {:.0} MiB, huge {:.0} MiB",
        memory.seconds,
        mib(memory.host as f64),
        mib(memory.tree as f64),
        mib(memory.store as f64),
        mib(memory.huge as f64)
    );
    if summary.get("merges").is_some() {
        let fields = [
            "pages_shared",
            "pages_sharing",
            "zero_pages",
            "merges",
            "diverged",
            "retaken",
            "held_back_seconds",
            "cpu_seconds",
        ];
        fields.iter().for_each(|field| text.push_str(&format!(", {field} {}", summary[*field])));
        text.push_str(&format!(", refused {}", summary["refused"]));
    }
    text
}
