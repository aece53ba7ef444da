//! Requests at a fixed pace, and how long they take.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde::Serialize;

use super::interrupt;
use super::worker::Worker;

/// Each worker gets a request so often.
const EVERY: Duration = Duration::from_millis(500);
/// How often `meanwhile` is called.
const TICK: Duration = Duration::from_millis(200);

/// What the requests ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// A small request every half second. All data is read at the end only.
    Rare,
    /// A request every half second that reads all data of a worker.
    Busy,
}

impl Load {
    /// The name in options and reports.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Rare => "rare",
            Self::Busy => "busy",
        }
    }
}

/// Requests of one worker or of all.
#[derive(Clone, Debug, Default)]
pub(super) struct Served {
    /// When each began, in seconds from the start of the load, and how long it took, in seconds.
    pub(super) requests: Vec<(f64, f64)>,
    /// Answers that were not what they must be.
    pub(super) wrong: u64,
}

/// Middle, 99th of 100 and longest, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Latency {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

/// Sends requests to all workers for so long, each from a thread of its own, and calls `meanwhile` again and again.
///
/// # Errors
/// When a worker is gone, or what `meanwhile` says.
pub(super) fn serve(
    workers: &mut [Box<dyn Worker>],
    load: Load,
    time: Duration,
    mut meanwhile: impl FnMut(Duration) -> Result<()>,
) -> Result<Served> {
    let begun = Instant::now();
    let count = u32::try_from(workers.len().max(1)).context("few workers")?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(workers)
            // Not all at the same moment.
            .map(|(number, worker)| {
                scope.spawn(move || one(worker.as_mut(), load, begun, EVERY * number / count, time))
            })
            .collect();
        let mut watched = Ok(());
        while watched.is_ok() && threads.iter().any(|thread| !thread.is_finished()) {
            watched = interrupt::go_on().and_then(|()| meanwhile(begun.elapsed()));
            std::thread::sleep(TICK);
        }
        let mut all = Served::default();
        for thread in threads {
            let served =
                thread.join().map_err(|_panic| anyhow::anyhow!("a thread that sent requests has panicked"))??;
            all.requests.extend(served.requests);
            all.wrong += served.wrong;
        }
        watched.map(|()| all)
    })
}

fn one(worker: &mut dyn Worker, load: Load, begun: Instant, first: Duration, time: Duration) -> Result<Served> {
    let mut served = Served::default();
    let mut due = first;
    let mut number = 0;
    while due < time {
        interrupt::go_on()?;
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
        let asked = begun.elapsed();
        let right = match load {
            Load::Rare => worker.small(number)?,
            Load::Busy => worker.all()?,
        };
        served.requests.push((asked.as_secs_f64(), (begun.elapsed() - asked).as_secs_f64()));
        served.wrong += u64::from(!right);
        number += 1;
        // A worker that does not keep up gets less, not everything at once later.
        due = (due + EVERY).max(begun.elapsed());
    }
    Ok(served)
}

impl Served {
    /// Times of the requests that began in that span.
    pub(super) fn latency(&self, from: f64) -> Latency {
        let mut times: Vec<f64> =
            self.requests.iter().filter(|(asked, _)| *asked >= from).map(|(_, took)| *took).collect();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (times.len() as f64 * share).ceil() as usize;
            times.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Latency { p50: at(0.5), p99: at(0.99), max: times.last().copied().unwrap_or(0.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_ranks() {
        let requests = (0..100).map(|number| (f64::from(number), f64::from(99 - number))).collect();
        let served = Served { requests, wrong: 0 };
        assert_eq!(served.latency(0.0), Latency { p50: 49.0, p99: 98.0, max: 99.0 });
        assert_eq!(served.latency(90.0), Latency { p50: 4.0, p99: 9.0, max: 9.0 });
        assert_eq!(Served::default().latency(0.0), Latency::default());
    }
}
