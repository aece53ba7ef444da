//! The scan: ksmd's cursor, its clock, and what it does with a page.

use std::collections::VecDeque;
use std::time::Duration;

use super::advisor::Memory;
use super::capture::{ABSENT, Capture, Id, ZERO};
use super::item::Item;
use super::repeat::Tally;
use super::settings::{Advisor, Costs, Settings, nanos};
use super::state::State;
use super::tree::{NONE, Trees};

/// ksmd over a capture.
///
/// At time 0 ksmd meets the pages of the first look for the first time. While the clock runs, the contents are those of
/// the last look that has come; after the last look they stay. Counters go on as in the kernel.
///
/// Once nothing can change any more (nothing was merged for as long as smart scan takes to visit every page), passes
/// are no longer played but repeated, so that hours of idle scanning cost nothing.
#[derive(Clone, Debug)]
pub struct Model<'a> {
    capture: &'a Capture,
    pub(super) settings: Settings,
    pub(super) costs: Costs,
    ids: &'a [Id],
    look: usize,
    /// When the next look comes, in nanoseconds; never, after the last.
    pub(super) next_look: u64,
    items: Vec<Item>,
    trees: Trees,
    advisor: Memory,
    pub(super) pages_to_scan: u32,
    /// The next page, inside a pass.
    cursor: Option<usize>,
    /// Number of the pass, from 1.
    pub(super) pass: u32,
    pub(super) pass_start: u64,
    tally: Tally,
    pub(super) now: u64,
    pub(super) cpu: u64,
    /// Processor time of ksmd before the model's time 0.
    cpu_before: u64,
    pub(super) scanned: u64,
    pub(super) skipped: u64,
    pub(super) unshared: u64,
    /// Pages in the unstable tree of this pass; `unshared` counts those of the last pass until they are visited.
    in_tree: u64,
    zero_pages: u64,
    known: u64,
    /// Whole passes since the contents changed last.
    pub(super) held: u64,
    pub(super) past: VecDeque<Tally>,
}

impl<'a> Model<'a> {
    /// ksmd with these settings and the default costs, about to begin its first pass.
    pub fn new(capture: &'a Capture, settings: Settings) -> Self {
        Self::with_costs(capture, settings, Costs::default())
    }

    /// The same with costs of its own.
    pub fn with_costs(capture: &'a Capture, settings: Settings, costs: Costs) -> Self {
        let pages_to_scan = match settings.advisor {
            Advisor::None => settings.pages_to_scan,
            Advisor::ScanTime(advisor) => advisor.min_pages_to_scan,
        };
        Self {
            capture,
            settings,
            costs,
            ids: capture.looks.first().map_or(&[], |look| &look.pages),
            look: 0,
            next_look: capture.looks.get(1).map_or(u64::MAX, |look| nanos(look.at)),
            items: vec![Item::NONE; capture.pages()],
            trees: Trees::new(capture.contents, settings.max_page_sharing),
            advisor: Memory::default(),
            pages_to_scan: pages_to_scan.max(1),
            cursor: None,
            pass: 0,
            pass_start: 0,
            tally: Tally::NONE,
            now: 0,
            cpu: 0,
            cpu_before: 0,
            scanned: 0,
            skipped: 0,
            unshared: 0,
            in_tree: 0,
            zero_pages: 0,
            known: 0,
            held: 0,
            past: VecDeque::new(),
        }
    }

    /// ksmd has used `cpu` of processor time since boot when the model begins.
    ///
    /// An advisor that has just been chosen takes that for the first pass's. Where ksmd has worked before, it then
    /// finds itself far above its limit and scans 10 to 70 pages in a batch during the whole second pass.
    pub fn ksmd_has_used(mut self, cpu: Duration) -> Self {
        self.cpu_before = nanos(cpu);
        self
    }

    /// What KSM's files would show now.
    pub fn state(&self) -> State {
        let counted = self.trees.shared + self.trees.sharing + self.unshared;
        State {
            at: Duration::from_nanos(self.now),
            cpu: Duration::from_nanos(self.cpu),
            full_scans: u64::from(self.pass) - u64::from(self.cursor.is_some()),
            pages_to_scan: self.pages_to_scan,
            pages_shared: self.trees.shared,
            pages_sharing: self.trees.sharing,
            pages_unshared: self.unshared,
            pages_volatile: self.known.saturating_sub(counted),
            ksm_zero_pages: self.zero_pages,
            pages_scanned: self.scanned,
            pages_skipped: self.skipped,
            rmap_items: self.known,
        }
    }

    /// Shows ksmd another look at once, whatever the time, and stops the clock's own looks: for callers that step ksmd
    /// pass by pass.
    ///
    /// # Panics
    /// If the capture has no such look.
    pub fn show(&mut self, look: usize) {
        self.next_look = u64::MAX;
        self.change_to(look);
    }

    /// Somebody writes `pages_to_scan` and `sleep_millisecs`. They hold from the next batch on.
    pub fn set_rate(&mut self, pages_to_scan: u32, sleep_millisecs: u32) {
        self.pages_to_scan = pages_to_scan.max(1);
        self.settings.sleep_millisecs = sleep_millisecs;
    }

    /// Lets time pass while ksmd is stopped.
    pub fn stand_until(&mut self, at: Duration) {
        self.now = self.now.max(nanos(at));
        self.catch_up();
    }

    /// Runs to the end of the pass that has begun, or of the next one.
    pub fn pass(&mut self) -> State {
        if self.cursor.is_none() && self.settled() {
            self.repeat(self.next_tally());
            return self.state();
        }
        while !self.batch() {}
        self.state()
    }

    /// Runs up to a time, to the end of the batch that is under way then.
    pub fn run_until(&mut self, at: Duration) -> State {
        let until = nanos(at);
        while self.now < until {
            if self.cursor.is_none() && self.settled() {
                let tally = self.next_tally();
                let (time, cpu) = (self.repeat_time(&tally), self.repeat_cpu(&tally));
                if self.now.saturating_add(time) > until {
                    // Part of a pass in which nothing happens: the model itself stays where it is.
                    let part = |of: u64| (u128::from(of) * u128::from(until - self.now) / u128::from(time)) as u64;
                    let mut state = self.state();
                    state.at = at;
                    state.cpu += Duration::from_nanos(part(cpu));
                    state.pages_scanned += part(tally.scanned);
                    state.pages_skipped += part(tally.skipped);
                    return state;
                }
                self.repeat(tally);
            } else {
                self.batch();
            }
        }
        self.state()
    }

    /// Runs until no later pass can merge anything, or to the end of the pass in which the time is over.
    pub fn run_until_settled(&mut self, at_most: Duration) -> State {
        while !self.settled() && self.now < nanos(at_most) {
            self.pass();
        }
        self.state()
    }

    /// The state at `every`, twice that and so on, up to `until`.
    pub fn timeline(&mut self, until: Duration, every: Duration) -> Vec<State> {
        let every = every.max(Duration::from_millis(1));
        let mut at = Duration::ZERO;
        let mut states = Vec::new();
        while at < until {
            at = (at + every).min(until);
            states.push(self.run_until(at));
        }
        states
    }

    /// A batch, never repeated: what [`Model::pass`] is held against. Whether it ended a pass.
    #[cfg(test)]
    pub(super) fn play(&mut self) -> bool {
        self.batch()
    }

    /// One wake of ksmd and the sleep after it. Whether it ended a pass.
    fn batch(&mut self) -> bool {
        self.spend(self.costs.batch);
        if self.cursor.is_none() {
            self.cursor = Some(0);
            self.pass += 1;
            self.pass_start = self.now;
            self.tally = Tally::NONE;
            self.in_tree = 0;
            self.work(self.costs.pass);
        }
        let mut ended = false;
        for _ in 0..self.pages_to_scan {
            let Some(page) = self.next_page() else {
                self.end_pass();
                ended = true;
                break;
            };
            let cost = self.compare(page);
            self.tally.scanned += 1;
            self.scanned += 1;
            self.work(cost);
        }
        self.now = self.costs.wake(self.now, self.settings.sleep_millisecs);
        self.catch_up();
        ended
    }

    fn spend(&mut self, cost: u64) {
        self.now += cost;
        self.cpu += cost;
    }

    fn work(&mut self, cost: u64) {
        self.spend(cost);
        self.tally.cpu += cost;
        if self.now >= self.next_look {
            self.catch_up();
        }
    }

    /// Moves the cursor to the next page to compare; `None` at the end of the pass.
    fn next_page(&mut self) -> Option<usize> {
        loop {
            let page = self.cursor?;
            let id = *self.ids.get(page)?;
            self.cursor = Some(page + 1);
            let item = &mut self.items[page];
            if id == ABSENT || item.zero {
                // Not a page that KSM could take: its record goes, with age and checksum.
                if item.known {
                    self.detach(page);
                    self.known -= 1;
                    self.items[page] = Item { zero: self.items[page].zero, ..Item::NONE };
                }
                continue;
            }
            if !item.known {
                item.known = true;
                self.known += 1;
            }
            if self.settings.smart_scan && !item.merged && item.skipped() {
                self.detach(page);
                self.tally.skipped += 1;
                self.skipped += 1;
                self.work(self.costs.skipped);
                continue;
            }
            return Some(page);
        }
    }

    /// `cmp_and_merge_page`: what the page costs.
    fn compare(&mut self, page: usize) -> u64 {
        // The look may have changed since the cursor chose the page: by then it is as good as written under ksmd.
        let id = self.ids[page];
        if self.items[page].merged {
            return self.costs.merged;
        }
        self.detach(page);
        let Costs { checksum, stable_level, unstable_level, merge, .. } = self.costs;
        let item = &mut self.items[page];
        if item.checksum != id {
            item.checksum = id;
            return checksum;
        }
        if id == ZERO && self.settings.use_zero_pages {
            item.zero = true;
            self.zero_pages += 1;
            self.tally.merges += 1;
            return checksum + merge;
        }
        let cost = checksum + stable_level * levels(self.trees.shared);
        if let Some(node) = self.trees.with_room(id) {
            self.attach(page, node);
            return cost + merge;
        }
        let cost = cost + unstable_level * levels(self.in_tree);
        let twin = self.trees.unstable(id, self.pass).map(|twin| twin as usize);
        if let Some(twin) = twin.filter(|&twin| self.items[twin].unstable && self.ids[twin] == id) {
            self.detach(twin);
            let node = self.trees.new_node(id);
            self.attach(twin, node);
            self.attach(page, node);
            self.in_tree -= 1;
            return cost + 2 * merge;
        }
        self.trees.insert_unstable(id, self.pass, u32::try_from(page).expect("a capture's pages fit 32 bits"));
        self.items[page].unstable = true;
        self.unshared += 1;
        self.in_tree += 1;
        cost
    }

    fn attach(&mut self, page: usize, node: u32) {
        let item = &mut self.items[page];
        (item.node, item.merged) = (node, true);
        self.trees.join(node);
        self.tally.merges += 1;
    }

    /// Takes the record out of whichever tree it is in. Its page is not a merged one.
    fn detach(&mut self, page: usize) {
        let item = &mut self.items[page];
        if std::mem::take(&mut item.unstable) {
            self.unshared -= 1;
        }
        if item.node != NONE {
            self.trees.leave(std::mem::replace(&mut item.node, NONE));
        }
    }

    fn end_pass(&mut self) {
        self.cursor = None;
        self.tally.unshared = self.unshared;
        self.remember(self.tally);
        self.advise();
    }

    pub(super) fn advise(&mut self) {
        if let Advisor::ScanTime(advisor) = &self.settings.advisor {
            let pass = self.now - self.pass_start;
            self.pages_to_scan = self.advisor.advise(advisor, self.pages_to_scan, pass, self.cpu_before + self.cpu);
        }
    }

    /// Takes the looks that have come.
    fn catch_up(&mut self) {
        while self.now >= self.next_look {
            let look = self.look + 1;
            self.next_look = self.capture.looks.get(look + 1).map_or(u64::MAX, |look| nanos(look.at));
            self.change_to(look);
        }
    }

    fn change_to(&mut self, look: usize) {
        let after: &'a [Id] = &self.capture.looks[look].pages;
        let mut changed = false;
        for ((item, before), after) in self.items.iter_mut().zip(self.ids).zip(after) {
            if before == after {
                continue;
            }
            changed = true;
            if std::mem::take(&mut item.merged) {
                self.trees.unmap(item.node);
            }
            self.zero_pages -= u64::from(std::mem::take(&mut item.zero));
        }
        (self.ids, self.look) = (after, look);
        if changed {
            // A pass that is under way does not count: some of its pages were met before the change.
            self.held = 0;
            self.past.clear();
        }
    }
}

/// Levels of a balanced tree.
fn levels(nodes: u64) -> u64 {
    u64::from((nodes + 1).ilog2())
}
