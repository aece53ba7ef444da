//! Part (b) of `pagefold demo`: eight workers under the kernel's KSM, with the shared layout and with the default one.
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ksm::{DriveSettings, KsmSysfs, Layout, Pace, Rate};
use serde::Serialize;

use crate::demo_fleet::{self, Fleet, NO_INTERPRETER, anonymous_and_shared, mib, saved};
use crate::demo_interpreter::Interpreter;
use crate::ksm_run::Driven;
use crate::say;

/// Longest that one layout may take to settle.
const SETTLE: Duration = Duration::from_secs(6);

/// What the demonstration is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartBOptions {
    /// Workers in each of the two rounds.
    pub(crate) workers: usize,
    /// No progress on stderr.
    pub(crate) quiet: bool,
}

impl Default for PartBOptions {
    fn default() -> Self {
        Self { workers: 8, quiet: false }
    }
}

/// What was seen. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PartB {
    /// Why it could not be done here; everything below is empty then.
    pub(crate) skipped: Option<String>,
    /// Workers in each round.
    pub(crate) workers: usize,
    /// What ran them.
    pub(crate) interpreter: Option<String>,
    /// What they loaded.
    pub(crate) data: Option<String>,
    /// The round with one layout for all.
    pub(crate) shared_layout: Option<Round>,
    /// The round as the kernel lays out processes.
    pub(crate) default_layout: Option<Round>,
    /// All together.
    pub(crate) elapsed_seconds: f64,
}

/// One round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Round {
    /// What the workers added to the host's AnonPages and Shmem, before merging.
    pub(crate) growth_bytes: u64,
    /// The same after merging, at work.
    pub(crate) growth_after_bytes: u64,
    /// 1 - after / before.
    pub(crate) saved_on_host: f64,
    /// The headline: `saved_on_host` where the rest of the host kept still, else `saved_by_pss`.
    pub(crate) saved: f64,
    /// Both growths are the workers' own: the host's figures and the workers' proportional shares agree to a tenth.
    pub(crate) host_was_still: bool,
    /// Anonymous and shared memory of a worker by its proportional share (Pss), mean, before merging.
    pub(crate) pss_per_worker_bytes: u64,
    /// The same after merging.
    pub(crate) pss_per_worker_after_bytes: u64,
    /// 1 - after / before by Pss: what others do on the host does not touch this one.
    pub(crate) saved_by_pss: f64,
    /// Growth after every worker has read all that it holds.
    pub(crate) growth_checked_bytes: u64,
    /// KSM's pages of these workers.
    pub(crate) pages_shared: u64,
    /// Pages that they stand for.
    pub(crate) pages_sharing: u64,
    /// Zero pages.
    pub(crate) ksm_zero_pages: u64,
    /// From the start of ksmd until a pass brought nothing new.
    pub(crate) settle_seconds: f64,
    /// False if that was cut short.
    pub(crate) settled: bool,
    /// Processor time of ksmd.
    pub(crate) ksmd_cpu_seconds: Option<f64>,
    /// Rounds of reading and writing that each worker did meanwhile.
    pub(crate) work_rounds: u64,
    /// Workers whose digests before and after are equal, equal to everybody's, and whose writes are as they must be.
    pub(crate) workers_right: usize,
}

impl PartB {
    /// Every worker of both rounds held and wrote what it should have; `None` if it could not be done here.
    pub(crate) fn digests_equal(&self) -> Option<bool> {
        let right = |round: &Option<Round>| round.as_ref().is_some_and(|round| round.workers_right == self.workers);
        self.skipped.is_none().then(|| right(&self.shared_layout) && right(&self.default_layout))
    }

    fn skipped(options: PartBOptions, why: String, started: Instant) -> Self {
        Self {
            skipped: Some(why),
            workers: options.workers,
            interpreter: None,
            data: None,
            shared_layout: None,
            default_layout: None,
            elapsed_seconds: started.elapsed().as_secs_f64(),
        }
    }
}

impl fmt::Display for PartB {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = &self.skipped {
            return write!(f, "workers under KSM: not shown here: {why}");
        }
        let (interpreter, data) = (self.interpreter.as_deref().unwrap_or(""), self.data.as_deref().unwrap_or(""));
        writeln!(f, "{} workers of {interpreter} under KSM, each with {data}", self.workers)?;
        writeln!(f, "  layout   saved    host before      after  worker's Pss      after  workers right")?;
        let rounds = [("shared", &self.shared_layout), ("default", &self.default_layout)];
        for (name, round) in rounds.into_iter().filter_map(|(name, round)| Some((name, round.as_ref()?))) {
            writeln!(
                f,
                "  {name:<7} {:>4.0} %  {:>9.1} MiB {:>6.1} MiB  {:>8.1} MiB {:>6.1} MiB  {} of {}{}",
                100.0 * round.saved,
                mib(round.growth_bytes),
                mib(round.growth_after_bytes),
                mib(round.pss_per_worker_bytes),
                mib(round.pss_per_worker_after_bytes),
                round.workers_right,
                self.workers,
                if round.host_was_still { "" } else { "  (others use the host: saved by Pss)" },
            )?;
        }
        Ok(())
    }
}

/// Shows it, or says why it cannot be shown here.
///
/// # Errors
/// What kept it from being finished once it was begun.
pub(crate) fn part_b(options: PartBOptions) -> anyhow::Result<PartB> {
    let started = Instant::now();
    let sysfs = KsmSysfs::host();
    if let Err(missing) = ksm::check_writable(&sysfs) {
        let denied = matches!(&missing, ksm::KsmError::ReadOnly { source, .. }
            if source.kind() == std::io::ErrorKind::PermissionDenied);
        let way_out = if denied { "; run it as root" } else { "" };
        let why = format!("{:#}{way_out}", anyhow::Error::new(missing));
        return Ok(PartB::skipped(options, why, started));
    }
    if kernel::ksm_sysfs::memory_merge().is_err() {
        return Ok(PartB::skipped(options, "PR_SET_MEMORY_MERGE is missing (Linux 6.4)".to_owned(), started));
    }
    if let Some(why) = demo_fleet::no_room()? {
        return Ok(PartB::skipped(options, why, started));
    }
    let Some(interpreter) = Interpreter::find() else {
        return Ok(PartB::skipped(options, NO_INTERPRETER.to_owned(), started));
    };
    let layout = match Layout::draw() {
        Ok(layout) => layout,
        Err(error) => return Ok(PartB::skipped(options, format!("no shared layout: {error}"), started)),
    };
    // Before there are workers. It may fail as it does for the run: no guardian, no place for the lease's state.
    let tried = Driven::start_with(&sysfs, settings(), options.quiet).and_then(|driven| Ok(driven.finish()?));
    if let Err(error) = tried {
        return Ok(PartB::skipped(options, format!("ksmd cannot be driven: {error:#}"), started));
    }
    let files = interpreter.corpus();
    let shared_layout = round("shared", layout, &interpreter, &files, options)?;
    let default_layout = round("default", Layout::Default, &interpreter, &files, options)?;
    Ok(PartB {
        skipped: None,
        workers: options.workers,
        interpreter: Some(interpreter.program.display().to_string()),
        data: Some(interpreter.data().to_owned()),
        shared_layout: Some(shared_layout),
        default_layout: Some(default_layout),
        elapsed_seconds: started.elapsed().as_secs_f64(),
    })
}

fn round(
    name: &str,
    layout: Layout,
    interpreter: &Interpreter,
    files: &[PathBuf],
    options: PartBOptions,
) -> anyhow::Result<Round> {
    let tell = |text: fmt::Arguments<'_>| {
        if !options.quiet {
            say::lines(&format!("{name} layout: {text}\n"));
        }
    };
    let base = anonymous_and_shared()?;
    tell(format_args!("{} workers load their data", options.workers));
    let mut workers = Fleet::start(interpreter, files, layout, options.workers, |launch| {
        launch.memory_merge(true);
    })?;
    let growth = anonymous_and_shared()?.saturating_sub(base);
    let pss = workers.pss()?;
    tell(format_args!("{:.0} MiB of memory; now they work, and ksmd merges", mib(growth)));

    let began = Instant::now();
    let mut driven = Driven::start_with(&KsmSysfs::host(), settings(), options.quiet)?;
    let mut work_rounds = 0;
    loop {
        // They read and write while it merges.
        work_rounds += workers.work()?;
        let pause = driven.drive.tick()?;
        if driven.drive.settled() || began.elapsed() > SETTLE {
            break;
        }
        std::thread::sleep(pause.min(Duration::from_millis(100)));
    }
    let settle_seconds = began.elapsed().as_secs_f64();
    let progress = driven.drive.progress()?;
    let growth_after = anonymous_and_shared()?.saturating_sub(base);
    let pss_after = workers.pss()?;
    let settled = driven.drive.settled();
    driven.finish()?;

    tell(format_args!("{:.0} MiB are left; every worker checks all that it holds", mib(growth_after)));
    let workers_right = workers.check()?;
    let growth_checked = anonymous_and_shared()?.saturating_sub(base);
    let each = options.workers.max(1) as u64;
    // Whoever else takes or gives memory meanwhile shows up in the host's figures only.
    let still = growth.abs_diff(pss) < pss / 10 && growth_after.abs_diff(pss_after) < pss / 10;
    Ok(Round {
        growth_bytes: growth,
        growth_after_bytes: growth_after,
        saved_on_host: saved(growth, growth_after),
        saved: if still { saved(growth, growth_after) } else { saved(pss, pss_after) },
        host_was_still: still,
        pss_per_worker_bytes: pss / each,
        pss_per_worker_after_bytes: pss_after / each,
        saved_by_pss: saved(pss, pss_after),
        growth_checked_bytes: growth_checked,
        pages_shared: progress.pages_shared,
        pages_sharing: progress.pages_sharing,
        ksm_zero_pages: progress.tree.ksm_zero_pages,
        settle_seconds,
        settled,
        ksmd_cpu_seconds: progress.ksmd_cpu_seconds,
        work_rounds,
        workers_right,
    })
}

/// Somebody is watching: no slower pace for the rest.
fn settings() -> DriveSettings {
    let fast = Rate { pages_to_scan: 5000, sleep_millisecs: 2 };
    DriveSettings { pace: Pace::Adaptive { boost: fast, steady: fast }, use_zero_pages: true }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn one_layout_lets_workers_share_what_the_default_one_does_not() {
        let _lock = ksm::host_lock().unwrap();
        let part = part_b(PartBOptions { workers: 4, quiet: true }).unwrap();
        if let Some(why) = part.skipped {
            return println!("skipped: {why}");
        }
        let (shared, default) = (part.shared_layout.unwrap(), part.default_layout.unwrap());
        assert_eq!((shared.workers_right, default.workers_right), (4, 4));
        // Four copies can save three quarters of what is equal.
        assert!(shared.saved_by_pss > 0.6, "{shared:?}");
        assert!(shared.saved_by_pss > default.saved_by_pss, "{default:?}");
    }
}
