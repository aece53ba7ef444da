//! Passes in which nothing can change any more are repeated and not played.

use super::scan::Model;

/// Passes after which smart scan visits a page every ninth pass and no other.
const SMART_SETTLED: u64 = 31;
/// Passes between two visits of an old page.
const SMART_PERIOD: usize = 9;

/// What a pass did, to be repeated where nothing changes any more.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tally {
    pub(super) scanned: u64,
    pub(super) skipped: u64,
    /// Processor time without what each batch costs.
    pub(super) cpu: u64,
    pub(super) merges: u64,
    pub(super) unshared: u64,
}

impl Tally {
    pub(super) const NONE: Self = Self { scanned: 0, skipped: 0, cpu: 0, merges: 0, unshared: 0 };
}

impl Model<'_> {
    /// Whether no later pass can change what is merged: the last look has come, and since then there were enough
    /// passes for every page to be visited twice more after the last merge.
    pub fn settled(&self) -> bool {
        let (held, quiet) = if self.settings.smart_scan { (SMART_SETTLED, 2 * SMART_PERIOD) } else { (4, 2) };
        let merges = |tally: &Tally| tally.merges > 0;
        self.next_look == u64::MAX && self.held >= held && !self.past.iter().rev().take(quiet).any(merges)
    }

    /// Takes a pass that has ended into account.
    pub(super) fn remember(&mut self, tally: Tally) {
        if self.past.len() == 2 * SMART_PERIOD {
            self.past.pop_front();
        }
        self.past.push_back(tally);
        self.held += 1;
    }

    /// The pass that comes next is as the one a period ago.
    pub(super) fn next_tally(&self) -> Tally {
        let period = if self.settings.smart_scan { SMART_PERIOD } else { 1 };
        self.past[self.past.len() - period]
    }

    fn repeat_batches(&self, tally: &Tally) -> u64 {
        tally.scanned / u64::from(self.pages_to_scan) + 1
    }

    pub(super) fn repeat_cpu(&self, tally: &Tally) -> u64 {
        tally.cpu + self.repeat_batches(tally) * self.costs.batch
    }

    pub(super) fn repeat_time(&self, tally: &Tally) -> u64 {
        let batches = self.repeat_batches(tally);
        let work = self.repeat_cpu(tally) / batches;
        batches * (self.costs.wake(self.now + work, self.settings.sleep_millisecs) - self.now).max(1)
    }

    pub(super) fn repeat(&mut self, tally: Tally) {
        let (time, cpu) = (self.repeat_time(&tally), self.repeat_cpu(&tally));
        self.pass += 1;
        self.pass_start = self.now;
        self.cpu += cpu;
        self.scanned += tally.scanned;
        self.skipped += tally.skipped;
        self.unshared = tally.unshared;
        // The advisor is asked before the last batch's sleep.
        let batches = self.repeat_batches(&tally);
        self.now += time / batches * (batches - 1) + cpu / batches;
        self.advise();
        self.now = self.pass_start + time;
        self.remember(tally);
    }
}
