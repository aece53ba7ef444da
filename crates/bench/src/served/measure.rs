//! One way to merge, on fresh workers of one program under one load.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ksm::{Counters, KsmSysfs, Wanted};
use serde::Serialize;
use serde_json::Value;

use super::group::{Group, Merging};
use super::interrupt;
use super::kind::{Kind, Program};
use super::knobs::Knobs;
use super::load::{Latency, Load, serve};
use super::look::Look;
use super::way::Way;
use super::worker::Worker;
use crate::advisor::prime;
use crate::sides::Scanner;
use crate::vm::host::median;

/// How often memory is looked at.
const EVERY: Duration = Duration::from_secs(2);
/// Passes of ksmd after which what stays is merged: it remembers a page in the first, and finds its equal in the second.
const PASSES: u64 = 3;
/// Requests for all data after the first: the shortest says what one takes when nothing else is in its way.
const READ_AGAIN: u32 = 10;

/// What came of it. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    pub(super) program: Kind,
    pub(super) load: Load,
    pub(super) way: Way,
    /// From 1.
    pub(super) round: u16,
    pub(super) workers: usize,
    /// From the start of the workers until all had loaded their data.
    pub(super) loading_seconds: f64,
    /// How long they served.
    pub(super) seconds: f64,
    /// Memory and CPU time meanwhile.
    pub(super) looks: Vec<Look>,
    /// The middle of the last third of them: private memory of the workers with the store, the store alone, and what
    /// broker and guardian have, or ksmd keeps about pages.
    pub(super) private_bytes: f64,
    pub(super) store_bytes: f64,
    pub(super) managers_bytes: f64,
    /// Private memory of the workers after each has read all that it holds.
    pub(super) private_checked_bytes: u64,
    /// CPU time of ksmd, or of broker, guardian and helpers, from the start of the workers to the end of serving.
    pub(super) cpu_seconds: f64,
    /// Passes that ksmd has ended while they served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ksmd_passes: Option<u64>,
    /// What each worker said after loading that it holds.
    pub(super) digests: Vec<String>,
    /// CPU time of the workers while they served.
    pub(super) workers_cpu_seconds: f64,
    /// Requests that were answered.
    pub(super) requests: u64,
    pub(super) requests_per_second: f64,
    /// For a CPU second of the workers.
    pub(super) requests_per_cpu_second: f64,
    /// The same in the last third of the time.
    pub(super) settled_requests_per_cpu_second: f64,
    pub(super) latency: Latency,
    /// That of the requests of the last third of the time.
    pub(super) settled_latency: Latency,
    /// How long a request took that read all data, afterwards, with one worker at a time at work: the first one, to
    /// which merged pages may have to come back, and the shortest of those that followed. Medians of the workers.
    pub(super) read_all_first_seconds: f64,
    pub(super) read_all_again_seconds: f64,
    /// Answers that were wrong.
    pub(super) wrong_answers: u64,
    /// Workers that had not loaded what they must, or did not prove at the end that they hold it.
    pub(super) wrong_workers: u64,
    /// KSM's counters at the end of serving.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ksm: Option<Counters>,
    /// KSM's settings while they served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ksm_settings: Option<Knobs>,
    /// The last summary of `pagefold run`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) summary: Option<Value>,
}

/// What is to be measured.
#[derive(Clone, Debug)]
pub(super) struct Measurement {
    pub(super) merging: Merging,
    pub(super) load: Load,
    /// From 1.
    pub(super) round: u16,
    pub(super) count: usize,
    /// How long the workers serve.
    pub(super) time: Duration,
    /// Goal of the kernel's advisor, in seconds.
    pub(super) scan_time: u32,
    /// What each worker has to hold.
    pub(super) expected: Vec<String>,
    /// For the workers' files.
    pub(super) folder: PathBuf,
}

impl Outcome {
    /// Everything was right.
    pub(super) fn right(&self) -> bool {
        self.wrong_answers + self.wrong_workers == 0
    }

    /// ksmd has seen each page often enough to merge what it can, or it is not ksmd who merged.
    pub(super) fn is_settled(&self) -> bool {
        self.ksmd_passes.is_none_or(|passes| passes >= PASSES)
    }

    /// MiB less than `plain`.
    pub(super) fn saved_mib(&self, plain: &Self) -> f64 {
        (plain.private_bytes - self.private_bytes) / f64::from(1 << 20)
    }

    /// The same as a share of the private memory that the workers have in `plain`.
    pub(super) fn saved_share(&self, plain: &Self) -> f64 {
        if plain.private_bytes > 0.0 { 1.0 - self.private_bytes / plain.private_bytes } else { 0.0 }
    }

    /// What is saved for a CPU second of whoever merged.
    pub(super) fn saved_mib_per_cpu_second(&self, plain: &Self) -> f64 {
        if self.cpu_seconds > 0.0 { self.saved_mib(plain) / self.cpu_seconds } else { 0.0 }
    }

    /// CPU time that the workers take more than with `plain`, as a share of one CPU.
    pub(super) fn added_cpu(&self, plain: &Self) -> f64 {
        self.workers_cpu_seconds / self.seconds - plain.workers_cpu_seconds / plain.seconds
    }

    /// How much more CPU time a request takes than with `plain`, as a share.
    pub(super) fn slowdown(&self, plain: &Self) -> f64 {
        let (ours, theirs) = (self.requests_per_cpu_second, plain.requests_per_cpu_second);
        if ours > 0.0 { theirs / ours - 1.0 } else { 0.0 }
    }
}

/// Why a way cannot be gone here.
pub(super) fn missing(way: Way) -> Option<String> {
    if way.is_ours() {
        let features = kernel::probe::Features::probe();
        return features.live_merge().err().map(|missing| missing.to_string());
    }
    way.wanted(1)?;
    let sysfs = KsmSysfs::host();
    if let Err(missing) = ksm::check_writable(&sysfs) {
        return Some(missing.to_string());
    }
    if kernel::ksm_sysfs::memory_merge().is_err() {
        return Some("PR_SET_MEMORY_MERGE is missing (Linux 6.4)".to_owned());
    }
    let no_advisor = way == Way::KsmAdvisor && !sysfs.root().join("advisor_mode").exists();
    no_advisor.then(|| "this kernel's ksmd has no advisor (Linux 6.8)".to_owned())
}

impl Measurement {
    /// Measures, with KSM's settings leased where ksmd merges.
    ///
    /// # Errors
    /// When KSM cannot be driven, or a worker ends or does not answer.
    pub(super) fn run(&self, program: &Program) -> Result<Outcome> {
        let Some(wanted) = self.merging.way.wanted(self.scan_time) else { return self.serve(program, None) };
        let lock = interrupt::wait_for(ksm::host_lock)?.context("cannot take the lock of host-wide settings")?;
        let scanner = Scanner::acquire_under(lock)?;
        let outcome = self.serve_under(&scanner, wanted, program);
        // Until ksmd has been there, the workers that have ended count as if they were alive.
        let clean = scanner.forget_the_dead();
        let released = scanner.release();
        let outcome = outcome?;
        clean?;
        released?;
        Ok(outcome)
    }

    fn serve_under(&self, scanner: &Scanner, wanted: Wanted, program: &Program) -> Result<Outcome> {
        scanner.forget_the_dead()?;
        if self.merging.way == Way::KsmAdvisor {
            prime(scanner, wanted, interrupt::go_on)?;
        } else {
            scanner.ask(wanted)?;
        }
        self.serve(program, Some(scanner))
    }

    fn serve(&self, program: &Program, scanner: Option<&Scanner>) -> Result<Outcome> {
        let ksmd_before = scanner.map(Scanner::cpu);
        let begun = Instant::now();
        let mut group = Group::start(program, &self.merging, self.count, &self.folder)?;
        let loading_seconds = begun.elapsed().as_secs_f64();
        let (root, launcher) = (group.root(), group.launcher());
        let mut looks = vec![Look::take(root, Duration::ZERO)?];
        let passes_before = scanner.map(Scanner::counters).transpose()?.map(|counters| counters.full_scans);
        let mut ksm_settings = scanner.map(|scanner| Knobs::look(scanner.sysfs())).transpose()?;
        let third = self.time.as_secs_f64() * 2.0 / 3.0;
        let every = EVERY.min(self.time / 6);
        let served = serve(&mut group.workers, self.load, self.time, |since| {
            // Whoever merges is gone with the command, and with him what he has in his store.
            launcher.alive()?;
            if since.as_secs_f64() >= looks.last().map_or(0.0, |look| look.seconds) + every.as_secs_f64() {
                looks.push(Look::take(root, since)?);
            }
            Ok(())
        })?;
        let begin = looks.first().copied().unwrap_or_default();
        let end = Look::take(root, begun.elapsed().saturating_sub(Duration::from_secs_f64(loading_seconds)))?;
        looks.push(end);
        let ksmd_cpu = scanner.zip(ksmd_before).map(|(scanner, before)| scanner.cpu().saturating_sub(before));
        let counters = scanner.map(Scanner::counters).transpose()?;
        if let (Some(scanner), Some(settings)) = (scanner, &mut ksm_settings) {
            settings.look_again(scanner.sysfs())?;
        }
        let readings = group.workers.iter_mut().map(|worker| read_all(worker.as_mut())).collect::<Result<Vec<_>>>()?;
        let reading = |of: fn(&Reading) -> f64| median(readings.iter().map(of).collect());
        let wrong_workers = group.wrong(&self.expected)?;
        let checked = Look::take(root, begun.elapsed())?;
        launcher.alive()?;
        let digests = group.digests().to_vec();
        let summary = group.end()?;
        anyhow::ensure!(summary.is_some() == self.merging.way.is_ours(), "pagefold run has left no summary");
        let settled: Vec<Look> = looks.iter().copied().filter(|look| look.seconds >= third).collect();
        let middle = |of: fn(&Look) -> u64| median(settled.iter().map(|look| of(look) as f64).collect());
        let per = |requests: usize, cpu: f64| if cpu > 0.0 { requests as f64 / cpu } else { 0.0 };
        let workers_cpu_seconds = (end.workers_cpu - begin.workers_cpu).max(0.0);
        // Of helpers that have ended too, but with the time after serving; the last look knows neither.
        let ended = summary.as_ref().and_then(|summary| summary["cpu_seconds"].as_f64()).unwrap_or(0.0);
        let from = settled.first().copied().unwrap_or(end);
        let late = served.requests.iter().filter(|(asked, _)| *asked >= from.seconds).count();
        Ok(Outcome {
            program: program.kind,
            load: self.load,
            way: self.merging.way,
            round: self.round,
            workers: self.count,
            loading_seconds,
            seconds: end.seconds,
            private_bytes: middle(|look| look.private),
            store_bytes: middle(|look| look.store),
            managers_bytes: middle(|look| look.managers),
            private_checked_bytes: checked.private,
            cpu_seconds: ksmd_cpu.map_or(end.managers_cpu.max(ended), |cpu| cpu.as_secs_f64()),
            ksmd_passes: counters
                .as_ref()
                .zip(passes_before)
                .map(|(now, before)| now.full_scans.saturating_sub(before)),
            digests,
            workers_cpu_seconds,
            requests: served.requests.len() as u64,
            requests_per_second: per(served.requests.len(), end.seconds),
            requests_per_cpu_second: per(served.requests.len(), workers_cpu_seconds),
            settled_requests_per_cpu_second: per(late, end.workers_cpu - from.workers_cpu),
            latency: served.latency(0.0),
            settled_latency: served.latency(third),
            read_all_first_seconds: reading(|reading| reading.first),
            read_all_again_seconds: reading(|reading| reading.again),
            wrong_answers: served.wrong + readings.iter().map(|reading| reading.wrong).sum::<u64>(),
            wrong_workers,
            ksm: counters,
            ksm_settings,
            summary,
            looks,
        })
    }
}

/// What requests for all data came to, in seconds.
struct Reading {
    first: f64,
    again: f64,
    wrong: u64,
}

fn read_all(worker: &mut dyn Worker) -> Result<Reading> {
    let mut timed = || {
        interrupt::go_on()?;
        let begun = Instant::now();
        let right = worker.all()?;
        anyhow::Ok((begun.elapsed().as_secs_f64(), u64::from(!right)))
    };
    let (first, mut wrong) = timed()?;
    let mut again = first;
    for _ in 0..READ_AGAIN {
        let (took, bad) = timed()?;
        again = again.min(took);
        wrong += bad;
    }
    Ok(Reading { first, again, wrong })
}

/// The file for `pagefold run`: the given one, or a copy where a program runs as another user, who may not reach it, or
/// where its processes would not be known by their name.
///
/// # Errors
/// When it cannot be copied.
pub(super) fn reachable(pagefold: &Path, program: &Program) -> Result<PathBuf> {
    if program.user.is_none() && pagefold.file_name().is_some_and(|name| name == "pagefold") {
        return Ok(pagefold.to_owned());
    }
    let copy = program.folder.join("pagefold");
    std::fs::copy(pagefold, &copy).with_context(|| format!("copy {}", pagefold.display()))?;
    Ok(copy)
}
