//! What ksmd's work costs here, learnt while it works.
use super::goals::Look;
use crate::wanted::Rate;

/// Seconds of processor time for a page before anything was measured: dear, so that a ceiling holds from the start.
const PAGE_COST: f64 = 3e-6;
/// By how much a sleep is longer than asked, in seconds, before it was measured: a tick or two.
const EXTRA: f64 = 5e-3;
/// The weight of what was measured last.
const WEIGHT: f64 = 0.3;
/// Batches that make a measurement of what a page costs: the first one soon, later ones steadier.
const FIRST_BATCHES: f64 = 10.0;
const BATCHES: f64 = 40.0;
/// Batches, or seconds and batches, that make one of how long a period is: it changes as soon as others want the
/// processors too.
const SOON_BATCHES: f64 = 8.0;
const SOON: f64 = 0.25;
const FEW_BATCHES: f64 = 3.0;

/// Costs, and what is being measured at the moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Estimate {
    /// Processor seconds for one compared page, with all that a batch and a pass need around it.
    pub(super) page: f64,
    /// Seconds by which a batch takes longer than its work and the sleep that was asked: ticks, and waiting for a
    /// processor.
    pub(super) extra: f64,
    learnt: bool,
    /// For what a page costs, and for the period.
    sum: Sum,
    soon: Sum,
}

/// Intervals taken together until there is enough to measure by.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    seconds: f64,
    cpu: Option<f64>,
    pages: f64,
    batches: f64,
    asleep: f64,
}

impl Sum {
    const NONE: Self = Self { seconds: 0.0, cpu: None, pages: 0.0, batches: 0.0, asleep: 0.0 };

    fn add(&mut self, seconds: f64, cpu: Option<f64>, pages: f64, rate: Rate) {
        let batches = pages / f64::from(rate.pages_to_scan.max(1));
        self.seconds += seconds;
        self.cpu = cpu.map(|cpu| cpu + self.cpu.unwrap_or(0.0));
        self.pages += pages;
        self.batches += batches;
        self.asleep += batches * f64::from(rate.sleep_millisecs) / 1e3;
    }
}

impl Estimate {
    pub(super) const NEW: Self = Self { page: PAGE_COST, extra: EXTRA, learnt: false, sum: Sum::NONE, soon: Sum::NONE };

    /// The time from batch to batch, in seconds.
    pub(super) fn period(&self, rate: Rate) -> f64 {
        let work = self.page * f64::from(rate.pages_to_scan);
        if rate.sleep_millisecs == 0 {
            return work.max(1e-6);
        }
        work + f64::from(rate.sleep_millisecs) / 1e3 + self.extra
    }

    /// Pages a second at a rate.
    pub(super) fn pages_per_second(&self, rate: Rate) -> f64 {
        f64::from(rate.pages_to_scan) / self.period(rate)
    }

    /// Share of one processor for so many pages a second.
    pub(super) fn share(&self, pages_per_second: f64) -> f64 {
        pages_per_second * self.page
    }

    /// Takes the time between two looks into account, in which ksmd ran at `rate` and compared `pages`.
    pub(super) fn learn(&mut self, before: &Look, now: &Look, rate: Rate, pages: f64) {
        let seconds = now.at.saturating_sub(before.at).as_secs_f64();
        let cpu = now.ksmd_cpu.zip(before.ksmd_cpu).map(|(now, before)| now.saturating_sub(before).as_secs_f64());
        self.sum.add(seconds, cpu, pages, rate);
        self.soon.add(seconds, cpu, pages, rate);
        let enough = if self.learnt { BATCHES } else { FIRST_BATCHES };
        if self.sum.batches >= enough || (self.sum.seconds >= 2.0 && self.sum.batches >= FEW_BATCHES) {
            let Sum { cpu, pages, .. } = std::mem::replace(&mut self.sum, Sum::NONE);
            let weight = if std::mem::replace(&mut self.learnt, true) { WEIGHT } else { 1.0 };
            if let Some(cpu) = cpu {
                let page = (cpu / pages).clamp(1e-8, 1e-2);
                self.page += weight * (page - self.page);
            }
        }
        if self.soon.batches >= SOON_BATCHES || (self.soon.seconds >= SOON && self.soon.batches >= FEW_BATCHES) {
            let Sum { seconds, pages, batches, asleep, .. } = std::mem::replace(&mut self.soon, Sum::NONE);
            if rate.sleep_millisecs > 0 {
                let extra = ((seconds - asleep - pages * self.page) / batches).clamp(0.0, 1.0);
                self.extra += 2.0 * WEIGHT * (extra - self.extra);
            }
        }
    }

    /// A pass took `factor` times as many pages in its time as was thought: where the kernel counts none, its passes
    /// are what there is to learn from.
    pub(super) fn correct(&mut self, factor: f64, rate: Rate) {
        let period = self.period(rate) / factor.clamp(0.2, 5.0);
        let known = self.page * f64::from(rate.pages_to_scan) + f64::from(rate.sleep_millisecs) / 1e3;
        self.extra = (period - known).clamp(0.0, 1.0);
    }
}
