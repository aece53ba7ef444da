//! A plan and its batches: what the three sequences have in common.

use abi::BATCH_MAX;
use abi::mark::Keep;
use abi::place::{Action, Family, Outcome, Place};

use crate::space::{AddressSpace, FreezeKind, Unsettled};
use crate::{diverged, plain, unmerge};

/// How often a busy gate is tried before the batch is given up.
const GATE_TRIES: usize = 20;
/// The scratch area is one huge page, and its last page stays a hole (the collapse oracle stops there).
pub(crate) const WINDOW_PAGES: u64 = 511;

/// One page of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Address of the page.
    pub address: u64,
    /// What to do with it.
    pub action: Action,
}

/// What all batches of a plan share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Protection and properties of the mapping.
    pub keep: Keep,
    /// First byte of the mapping as its owner made it.
    pub range_start: u64,
    /// Byte behind it. Its last page is never merged: a mapping that ends in the store could grow into the store.
    pub range_end: u64,
    /// Register for write tracking again when a batch is over.
    pub track: bool,
    /// The process has forked: pages may be marked shared though nobody shares them any more.
    pub forked: bool,
    /// Reference counts of pages inside store mappings can be had.
    pub exact_check: bool,
    /// The owner vouches that nobody holds references.
    pub vouched: bool,
}

/// The entries of one batch, with what became of each.
#[derive(Debug)]
pub struct Batch {
    /// The entries.
    pub entries: [Entry; BATCH_MAX],
    /// Their outcomes.
    pub outcomes: [Outcome; BATCH_MAX],
    /// How many.
    pub len: usize,
}

impl Batch {
    fn start(entries: &[Entry], page_size: u64) -> Self {
        let first = entries[0];
        let family = first.action.family();
        let window = WINDOW_PAGES * page_size;
        let mut batch = Self { entries: [first; BATCH_MAX], outcomes: [Outcome::Pending; BATCH_MAX], len: 0 };
        let mut before = None;
        for entry in entries.iter().take(BATCH_MAX) {
            let ascending = before.is_none_or(|address| entry.address > address);
            let inside = entry.address >= first.address && entry.address - first.address <= window - page_size;
            if entry.action.family() != family || !ascending || !inside {
                break;
            }
            batch.entries[batch.len] = *entry;
            batch.len += 1;
            before = Some(entry.address);
        }
        batch
    }

    pub(crate) fn refuse_rest(&mut self, outcome: Outcome) {
        for slot in self.outcomes[..self.len].iter_mut().filter(|slot| **slot == Outcome::Pending) {
            *slot = outcome;
        }
    }
}

/// Executes a plan: cuts it into batches and runs them, in order. `report(index, outcome)` is called for every entry.
/// Stops early when `carry_on` says so, between batches; the rest is then not reported.
pub fn run_plan<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    entry: impl Fn(usize) -> Option<Entry>,
    len: usize,
    mut report: impl FnMut(usize, Outcome),
    mut carry_on: impl FnMut() -> bool,
) {
    let mut at = 0;
    while at < len && carry_on() {
        let mut window = [Entry { address: 0, action: Action::DropZero }; BATCH_MAX];
        let mut filled = 0;
        while filled < BATCH_MAX && at + filled < len {
            let Some(next) = entry(at + filled) else { break };
            if !next.address.is_multiple_of(space.page_size()) {
                break;
            }
            window[filled] = next;
            filled += 1;
        }
        if filled == 0 {
            report(at, Outcome::Invalid);
            at += 1;
            continue;
        }
        let mut batch = Batch::start(&window[..filled], space.page_size());
        run_batch(space, order, &mut batch);
        for (offset, outcome) in batch.outcomes[..batch.len].iter().enumerate() {
            report(at + offset, *outcome);
        }
        at += batch.len;
    }
}

/// Runs one batch; every entry of it has an outcome afterwards.
fn run_batch<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch) {
    let mut tries = 0;
    while !space.close_gate() {
        tries += 1;
        if tries == GATE_TRIES {
            batch.refuse_rest(Outcome::GateBusy);
            return;
        }
        space.pause();
    }
    match space.settled() {
        Err(Unsettled::Stopped) if batch.entries[0].action.family() == Family::Unmerge => {}
        Err(reason) => {
            space.open_gate();
            batch.refuse_rest(match reason {
                Unsettled::Layout => Outcome::LayoutChanged,
                Unsettled::Threads => Outcome::ThreadsChanged,
                Unsettled::Stopped => Outcome::Stopped,
            });
            return;
        }
        Ok(()) => {}
    }
    // An entry that lies outside the range is not the plan's to touch.
    let page = space.page_size();
    for index in 0..batch.len {
        let address = batch.entries[index].address;
        let inside = address >= order.range_start && address.saturating_add(page) <= order.range_end;
        let last = address.saturating_add(page) == order.range_end;
        if !inside {
            batch.outcomes[index] = Outcome::Invalid;
        } else if last && batch.entries[index].action.family() != Family::Unmerge {
            batch.outcomes[index] = Outcome::Properties;
        }
    }
    match batch.entries[0].action.family() {
        Family::Plain => plain::run(space, order, batch),
        Family::Diverged => diverged::run(space, order, batch),
        Family::Unmerge => unmerge::run(space, order, batch),
    }
    space.open_gate();
    batch.refuse_rest(Outcome::Absent);
}

/// Pages `from..to` of a batch that are neighbours in memory and, where they go to the store, in the store.
pub(crate) fn is_neighbour(page_size: u64, before: &Entry, next: &Entry) -> bool {
    let near = before.address + page_size == next.address;
    let same_way = match (before.action.place(), next.action.place()) {
        (Some(a), Some(b)) => b.follows(a),
        (None, None) => true,
        _ => false,
    };
    near && same_way
}

/// Frozen pages of a batch: which entry lies in which slot.
pub(crate) struct Held {
    pub(crate) kind: FreezeKind,
    entry_of: [usize; BATCH_MAX],
    pub(crate) len: usize,
}

impl Held {
    pub(crate) const fn new(kind: FreezeKind) -> Self {
        Self { kind, entry_of: [0; BATCH_MAX], len: 0 }
    }

    pub(crate) fn push(&mut self, entry: usize) {
        self.entry_of[self.len] = entry;
        self.len += 1;
    }

    pub(crate) fn entry(&self, slot: usize) -> usize {
        self.entry_of[slot]
    }

    /// Moves every page back whose outcome is not `Pending`, in runs of neighbours.
    pub(crate) fn thaw_refused<S: AddressSpace>(&self, space: &mut S, batch: &mut Batch) {
        let page = space.page_size();
        let mut slot = 0;
        while slot < self.len {
            let first = self.entry_of[slot];
            if is_kept(batch.outcomes[first]) {
                slot += 1;
                continue;
            }
            let mut count = 1;
            while slot + count < self.len {
                let next = self.entry_of[slot + count];
                let near = batch.entries[next].address == batch.entries[first].address + count as u64 * page;
                if is_kept(batch.outcomes[next]) || !near {
                    break;
                }
                count += 1;
            }
            space.thaw(self.kind, crate::Pages { start: batch.entries[first].address, count }, slot);
            slot += count;
        }
    }
}

/// True for outcomes that mean the page need not go back.
pub(crate) const fn is_kept(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Merged | Outcome::Zero | Outcome::Retaken | Outcome::Unmerged)
}

/// The place that a page already has, if the mapping is the store's.
pub(crate) fn place_in(vma: &crate::Vma, page_size: u64, address: u64) -> Option<Place> {
    let crate::VmaKind::Store { first: Some(first) } = vma.kind else { return None };
    let pages = u32::try_from((address - vma.start) / page_size).ok()?;
    Some(Place { segment: first.segment, page: first.page.checked_add(pages)? })
}
