//! A plan and its batches: what the three sequences have in common.

use core::ops::Range;

use abi::BATCH_MAX;
use abi::mark::Keep;
use abi::place::{Action, Family, Outcome, Place};

use crate::held::Trapped;
use crate::space::{AddressSpace, Failure, PageState, Unsettled, Vma, VmaKind};
use crate::{diverged, plain, unmerge};

/// How often a busy gate is tried before the batch is given up.
const GATE_TRIES: usize = 20;
/// The scratch area is one huge page, and its last page stays a hole (the collapse oracle stops there).
const WINDOW_PAGES: u64 = 511;

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
    /// The process has forked: pages may not be marked exclusive though nobody shares them any more, and are made so.
    /// Whoever gives the order has seen that nobody holds a reference to any of them: a held page would be copied.
    pub forked: bool,
    /// Reference counts of pages inside store mappings can be had.
    pub exact_check: bool,
    /// The owner vouches that nobody holds references.
    pub vouched: bool,
}

impl Order {
    /// True if references have to be asked for. A voucher stands in for a check that cannot be had; where the check
    /// is exact it is asked for all the same.
    pub(crate) const fn asks(&self) -> bool {
        self.exact_check || !self.vouched
    }
}

/// How a plan ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "after `Trapped` the caller has to end, so that a survivor can give pages back"]
pub enum Ended {
    /// Every entry was reported.
    Whole,
    /// `carry_on` said no: the entries behind the last batch were not reported.
    Early,
    /// Content lies in the scratch area and could not be given back. Nothing has been tidied: the gate is closed, the
    /// window registered, and the journal says what lies where. The caller must do nothing more to this address space
    /// and end: whoever holds the userfaultfd too gives the pages back and opens the gate, as if it had been killed.
    Trapped,
}

/// The entries of one batch, with what became of each.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The entries.
    pub(crate) entries: [Entry; BATCH_MAX],
    /// Their outcomes.
    pub(crate) outcomes: [Outcome; BATCH_MAX],
    /// How many.
    pub(crate) len: usize,
}

impl Batch {
    /// The longest beginning of `entries` (not empty) that can be one batch. At least one entry.
    fn start(entries: &[Entry], page_size: u64) -> Self {
        let first = entries[0];
        let family = first.action.family();
        let mut batch = Self { entries: [first; BATCH_MAX], outcomes: [Outcome::Pending; BATCH_MAX], len: 0 };
        let mut before = None;
        for entry in entries.iter().take(BATCH_MAX) {
            let ascending = before.is_none_or(|address| entry.address > address);
            let inside = entry.address >= first.address && (entry.address - first.address) / page_size < WINDOW_PAGES;
            if entry.action.family() != family || !ascending || !inside {
                break;
            }
            batch.entries[batch.len] = *entry;
            batch.len += 1;
            before = Some(entry.address);
        }
        batch
    }

    /// Leaves the entries from `len` on to the next batch. They must not have been touched.
    pub(crate) fn cut(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    pub(crate) fn is_pending(&self, index: usize) -> bool {
        index < self.len && self.outcomes[index] == Outcome::Pending
    }

    pub(crate) fn first_pending(&self, mut among: Range<usize>) -> Option<usize> {
        among.find(|index| self.is_pending(*index))
    }

    pub(crate) fn refuse(&mut self, among: Range<usize>, outcome: Outcome) {
        for slot in self.outcomes[among].iter_mut().filter(|slot| **slot == Outcome::Pending) {
            *slot = outcome;
        }
    }

    pub(crate) fn refuse_rest(&mut self, outcome: Outcome) {
        self.refuse(0..self.len, outcome);
    }

    /// An entry that lies outside the range is not the plan's to touch, and the last page only to be un-merged. Those
    /// that are left have a whole page between their address and the range's end, so that no sum of an address and
    /// the pages behind it can overflow. (A journal takes address 0 for "none".)
    fn keep_to(&mut self, order: &Order, page_size: u64) {
        for index in 0..self.len {
            let address = self.entries[index].address;
            let left = order.range_end.saturating_sub(address);
            let inside = address != 0 && address >= order.range_start && left >= page_size;
            if !inside {
                self.outcomes[index] = Outcome::Invalid;
            } else if left - page_size < page_size && self.entries[index].action.family() != Family::Unmerge {
                self.outcomes[index] = Outcome::Properties;
            }
        }
    }
}

/// Executes a plan: cuts it into batches and runs them, in order. `report(index, outcome)` is called for every entry,
/// in order; an `entry` that is `None` is [`Outcome::Invalid`]. Stops early when `carry_on` says so, between batches.
///
/// Plans may come from a hostile source: nothing outside the order's range is touched whatever they say. How many
/// entries are worth while is the caller's to say.
pub fn run_plan<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    entry: impl Fn(usize) -> Option<Entry>,
    len: usize,
    mut report: impl FnMut(usize, Outcome),
    mut carry_on: impl FnMut() -> bool,
) -> Ended {
    let mut at = 0;
    while at < len {
        if !carry_on() {
            return Ended::Early;
        }
        let mut window = [Entry { address: 0, action: Action::DropZero }; BATCH_MAX];
        let mut filled = 0;
        // Each entry is read once: whoever wrote the plan could change it between two looks.
        while filled < window.len().min(len - at) {
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
        let ran = run_batch(space, order, &mut batch);
        for (offset, outcome) in batch.outcomes[..batch.len].iter().enumerate() {
            report(at + offset, *outcome);
        }
        if ran.is_err() {
            return Ended::Trapped;
        }
        at += batch.len;
    }
    Ended::Whole
}

/// Runs one batch, or its beginning if the rest needs another; every entry of it has an outcome afterwards.
fn run_batch<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch) -> Result<(), Trapped> {
    let family = batch.entries[0].action.family();
    batch.keep_to(order, space.page_size());
    if batch.first_pending(0..batch.len).is_none() {
        return Ok(());
    }
    let mut tries = 0;
    while !space.close_gate() {
        tries += 1;
        if tries == GATE_TRIES {
            batch.refuse_rest(Outcome::GateBusy);
            return Ok(());
        }
        space.pause();
    }
    match space.settled() {
        Err(Unsettled::Layout) => batch.refuse_rest(Outcome::LayoutChanged),
        Err(Unsettled::Threads) => batch.refuse_rest(Outcome::ThreadsChanged),
        Err(Unsettled::Stopped) if family != Family::Unmerge => batch.refuse_rest(Outcome::Stopped),
        Err(Unsettled::Stopped) | Ok(()) => {}
    }
    let ran = match family {
        Family::Plain => plain::run(space, order, batch),
        Family::Diverged => diverged::run(space, order, batch),
        Family::Unmerge => unmerge::run(space, order, batch),
    };
    batch.refuse_rest(Outcome::Absent);
    ran?;
    space.open_gate();
    Ok(())
}

/// True if `next` lies directly behind `before` in memory, and in the store too where they go there.
pub(crate) fn is_neighbour(page_size: u64, before: &Entry, next: &Entry) -> bool {
    let near = next.address - before.address == page_size;
    let same_way = match (before.action.place(), next.action.place()) {
        (Some(before), Some(next)) => follows(before, next),
        (None, None) => true,
        _ => false,
    };
    near && same_way
}

/// True if `next` lies directly behind `before` in the store. The place behind the last one is none.
pub(crate) fn follows(before: Place, next: Place) -> bool {
    next.segment == before.segment && before.page.checked_add(1) == Some(next.page)
}

/// What becomes of a page when a step fails.
pub(crate) const fn refusal(failure: Failure) -> Outcome {
    match failure {
        Failure::Busy => Outcome::Pinned,
        Failure::Absent => Outcome::Absent,
        Failure::Properties => Outcome::Properties,
        Failure::Limit => Outcome::Budget,
    }
}

/// The place that a page already has, if the mapping is the store's.
pub(crate) fn place_in(vma: &Vma, page_size: u64, address: u64) -> Option<Place> {
    let VmaKind::Store { first: Some(first) } = vma.kind else { return None };
    let pages = u32::try_from((address - vma.start) / page_size).ok()?;
    Some(Place { segment: first.segment, page: first.page.checked_add(pages)? })
}

/// What the page table said of a batch's pages.
pub(crate) struct Look {
    base: u64,
    page_size: u64,
    states: [PageState; WINDOW_PAGES as usize],
}

impl Look {
    /// Looks at all pages from the first to the last entry that is pending; `None` if there is none, or no look to be
    /// had.
    pub(crate) fn at<S: AddressSpace>(space: &mut S, batch: &Batch, among: Range<usize>) -> Option<Self> {
        let page_size = space.page_size();
        let base = batch.entries[batch.first_pending(among.clone())?].address;
        let last = batch.entries[among.rev().find(|index| batch.is_pending(*index))?].address;
        let mut look = Self { base, page_size, states: [PageState::Absent; WINDOW_PAGES as usize] };
        let states = look.states.get_mut(..=((last - base) / page_size) as usize)?;
        space.page_states(base, states).then_some(look)
    }

    /// Of an entry that was pending at the time of the look.
    pub(crate) fn state(&self, address: u64) -> PageState {
        self.states[((address - self.base) / self.page_size) as usize]
    }
}
