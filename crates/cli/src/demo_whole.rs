//! Part (c) of `pagefold demo`: the same workers, who mark nothing, managed whole by the store (`run --scope all`).

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ksm::Layout;
use serde::Serialize;

use crate::demo_fleet::{self, Fleet, NO_INTERPRETER, anonymous_and_shared, mib, saved};
use crate::demo_interpreter::Interpreter;
use crate::say;
use crate::store_run::Managed;

/// What has stayed unwritten for so long is merged: somebody is watching.
const STABLE: Duration = Duration::from_millis(500);
/// Longest that one layout may take to settle.
const SETTLE: Duration = Duration::from_secs(20);
/// It has settled when what is saved has not grown by a hundredth for so long.
const STILL: Duration = Duration::from_secs(2);

/// What was seen. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PartC {
    /// Why it could not be done here; everything below is empty then.
    pub(crate) skipped: Option<String>,
    /// Workers in each round.
    pub(crate) workers: usize,
    /// What ran them.
    pub(crate) interpreter: Option<String>,
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
    /// What the same workers add to the host's AnonPages and Shmem without pagefold.
    pub(crate) growth_bytes: u64,
    /// What the managed ones do, with the page store and whoever manages them, at work.
    pub(crate) growth_after_bytes: u64,
    /// 1 - after / before where the rest of the host kept still, else `saved_by_pss`.
    pub(crate) saved: f64,
    /// Both growths are the workers' own and their managers'.
    pub(crate) host_was_still: bool,
    /// The same by the workers' proportional shares (Pss), which others on the host do not touch; without the store's
    /// pages that nobody maps and without the broker.
    pub(crate) saved_by_pss: f64,
    /// Growth after every worker has read all that it holds.
    pub(crate) growth_checked_bytes: u64,
    /// Workers that were managed.
    pub(crate) managed: u64,
    /// Why others were not.
    pub(crate) refused: Vec<String>,
    /// Pages merged, ever.
    pub(crate) merges: u64,
    /// From the last worker's having loaded until nothing new was merged.
    pub(crate) settle_seconds: f64,
    /// False if that was cut short.
    pub(crate) settled: bool,
    /// CPU time of broker and helpers.
    pub(crate) cpu_seconds: f64,
    /// Longest that pages were frozen.
    pub(crate) frozen_seconds_max: f64,
    /// Rounds of reading and writing that each worker did meanwhile.
    pub(crate) work_rounds: u64,
    /// Workers whose digests before and after are equal, equal to everybody's, and whose writes are as they must be.
    pub(crate) workers_right: usize,
}

impl PartC {
    /// Every worker of both rounds held and wrote what it should have; `None` if it could not be done here.
    pub(crate) fn digests_equal(&self) -> Option<bool> {
        let right = |round: &Option<Round>| round.as_ref().is_some_and(|round| round.workers_right == self.workers);
        self.skipped.is_none().then(|| right(&self.shared_layout) && right(&self.default_layout))
    }
}

impl fmt::Display for PartC {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = &self.skipped {
            return writeln!(f, "workers managed whole: not shown here: {why}");
        }
        let interpreter = self.interpreter.as_deref().unwrap_or("");
        writeln!(f, "{} workers of {interpreter} that mark nothing, managed whole by the store", self.workers)?;
        writeln!(f, "  layout   saved    host before      after  CPU time  longest wait  managed  workers right")?;
        let rounds = [("shared", &self.shared_layout), ("default", &self.default_layout)];
        for (name, round) in rounds.into_iter().filter_map(|(name, round)| Some((name, round.as_ref()?))) {
            writeln!(
                f,
                "  {name:<7} {:>4.0} %  {:>9.1} MiB {:>6.1} MiB  {:>6.1} s  {:>9.1} ms  {} of {}  {} of {}{}",
                100.0 * round.saved,
                mib(round.growth_bytes),
                mib(round.growth_after_bytes),
                round.cpu_seconds,
                round.frozen_seconds_max * 1e3,
                round.managed,
                self.workers,
                round.workers_right,
                self.workers,
                if round.host_was_still { "" } else { "  (others use the host: saved by Pss)" },
            )?;
            for why in &round.refused {
                writeln!(f, "          {why}")?;
            }
        }
        Ok(())
    }
}

/// Shows it, or says why it cannot be shown here.
///
/// # Errors
/// What kept it from being finished once it was begun.
pub(crate) fn part_c(workers: usize, quiet: bool) -> anyhow::Result<PartC> {
    let started = Instant::now();
    let skipped = |why: String| PartC {
        skipped: Some(why),
        workers,
        interpreter: None,
        shared_layout: None,
        default_layout: None,
        elapsed_seconds: started.elapsed().as_secs_f64(),
    };
    if let Some(why) = demo_fleet::no_room()? {
        return Ok(skipped(why));
    }
    let Some(interpreter) = Interpreter::find() else { return Ok(skipped(NO_INTERPRETER.to_owned())) };
    let layout = match Layout::draw() {
        Ok(layout) => layout,
        Err(error) => return Ok(skipped(format!("no shared layout: {error}"))),
    };
    // Before there are workers. Helpers are to be this process's children.
    kernel::task::set_child_subreaper(true)?;
    if let Err(error) = Managed::whole(STABLE) {
        return Ok(skipped(format!("{error:#}")));
    }
    let files = interpreter.corpus();
    let of = |name, layout| round(name, layout, &interpreter, &files, workers, quiet);
    let (shared_layout, default_layout) = (of("shared", layout)?, of("default", Layout::Default)?);
    Ok(PartC {
        skipped: None,
        workers,
        interpreter: Some(interpreter.program.display().to_string()),
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
    count: usize,
    quiet: bool,
) -> anyhow::Result<Round> {
    let tell = |text: fmt::Arguments<'_>| {
        if !quiet {
            say::lines(&format!("{name} layout, managed whole: {text}\n"));
        }
    };
    let alone = |launch: &mut kernel::Launch| {
        launch.memory_merge(false);
        crate::store_run::without_agent(launch.command());
    };
    tell(format_args!("{count} workers load their data without pagefold, for comparison"));
    let base = anonymous_and_shared()?;
    let plain = Fleet::start(interpreter, files, layout, count, alone)?;
    let growth = anonymous_and_shared()?.saturating_sub(base);
    let pss = plain.pss()?;
    drop(plain);

    tell(format_args!("{:.0} MiB of memory; now the same, managed", mib(growth)));
    let base = anonymous_and_shared()?;
    let managed = Managed::whole(STABLE)?;
    let mut workers = Fleet::start(interpreter, files, layout, count, |launch| {
        launch.memory_merge(false);
        managed.enter(launch);
    })?;
    let began = Instant::now();
    let (mut work_rounds, mut best, mut since) = (0, 0, Instant::now());
    let settled = loop {
        // They read and write while it merges.
        work_rounds += workers.work()?;
        std::thread::sleep(Duration::from_millis(100));
        let saves = managed.summary()?.bytes_saved;
        if saves > best + best / 100 {
            (best, since) = (saves, Instant::now());
        }
        if best > 0 && since.elapsed() > STILL {
            break true;
        }
        if began.elapsed() > SETTLE {
            break false;
        }
    };
    let settle_seconds = began.elapsed().as_secs_f64();
    let growth_after = anonymous_and_shared()?.saturating_sub(base);
    let pss_after = workers.pss()?;
    let summary = managed.summary()?;
    tell(format_args!("{:.0} MiB are left; every worker checks all that it holds", mib(growth_after)));
    let workers_right = workers.check()?;
    let growth_checked = anonymous_and_shared()?.saturating_sub(base);
    drop(workers);
    drop(managed);
    // Whoever else takes or gives memory meanwhile shows up in the host's figures only. The managers take some of it.
    let still = growth.abs_diff(pss) < pss / 10 && growth_after > pss_after && growth_after - pss_after < pss / 4;
    Ok(Round {
        growth_bytes: growth,
        growth_after_bytes: growth_after,
        saved: if still { saved(growth, growth_after) } else { saved(pss, pss_after) },
        host_was_still: still,
        saved_by_pss: saved(pss, pss_after),
        growth_checked_bytes: growth_checked,
        managed: summary.processes,
        refused: summary.helper_refused,
        merges: summary.merges,
        settle_seconds,
        settled,
        cpu_seconds: summary.cpu_seconds,
        frozen_seconds_max: summary.frozen_seconds.max,
        work_rounds,
        workers_right,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn workers_that_mark_nothing_share_what_they_hold() {
        let part = part_c(4, true).unwrap();
        if let Some(why) = part.skipped {
            return println!("skipped: {why}");
        }
        let (shared, default) = (part.shared_layout.unwrap(), part.default_layout.unwrap());
        assert_eq!((shared.workers_right, default.workers_right), (4, 4));
        assert_eq!(shared.managed, 4, "{shared:?}");
        assert!(shared.saved_by_pss > 0.5, "{shared:?}");
        assert!(shared.saved_by_pss > default.saved_by_pss, "{default:?}");
    }
}
