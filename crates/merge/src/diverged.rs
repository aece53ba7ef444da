//! The sequence for pages that were merged and written since: anonymous pages inside a private mapping of the store.
//!
//! UFFDIO_MOVE refuses them, so the whole run moves with mremap(DONTUNMAP) while its place is registered for missing
//! and minor faults. Write protection would not do: whoever holds a page already writes on.

use abi::BATCH_MAX;
use abi::mark::{Keep, Mark};
use abi::place::{Action, Outcome, Place};

use crate::batch::{Batch, Held, Order, WINDOW_PAGES, place_in};
use crate::space::{AddressSpace, Checked, FreezeKind, PageState, Pages, RegisterMode, Vma, VmaKind};

const KIND: FreezeKind = FreezeKind::Remap;
/// Every run costs two system calls while pages are frozen.
const RUNS_MAX: usize = 16;

/// A run of entries that lie side by side in one mapping.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    count: usize,
    frozen: bool,
}

/// What a verified page needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Its old store page has the content again: the frozen copy is simply dropped.
    Same,
    /// Another store page.
    Other(Place),
    /// Fresh anonymous memory.
    Zero,
}

pub(crate) fn run<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch) {
    if !order.exact_check && !order.vouched {
        batch.refuse_rest(Outcome::NoCheck);
        return;
    }
    let page = space.page_size();
    let mut runs = [Run { first: 0, count: 0, frozen: false }; RUNS_MAX];
    let mut old = [None; BATCH_MAX];
    let len = look_again(space, order, batch, &mut runs, &mut old);
    if len == 0 {
        return;
    }
    let start = batch.entries[runs[0].first].address;
    let last = &runs[len - 1];
    let end = batch.entries[last.first + last.count - 1].address + page;

    space.journal_begin(KIND, start, end);
    let begun = space.now();
    let mut held = Held::new(KIND);
    for run in &mut runs[..len] {
        freeze(space, batch, run, &mut held);
    }
    if held.len > 0 {
        space.barrier();
        judge(space, batch, &held, order, start, end);
        let needs = verify(space, batch, &held, &old);
        replace(space, order, batch, &held, &needs);
        held.thaw_refused(space, batch);
    }
    for run in runs[..len].iter().filter(|run| run.frozen) {
        let from = batch.entries[run.first].address;
        let to = from + run.count as u64 * page;
        space.unregister(from, to);
        space.wake(from, to);
        if order.track {
            let _ = space.register(from, to, RegisterMode::Track);
        }
    }
    let frozen = space.now().saturating_sub(begun);
    space.discard_scratch(KIND, held.len);
    space.journal_end();
    if held.len > 0 {
        space.record_frozen(frozen);
    }
}

/// Leaves out what is not as the plan believed, and forms runs of what remains.
fn look_again<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    batch: &mut Batch,
    runs: &mut [Run; RUNS_MAX],
    old: &mut [Option<Place>; BATCH_MAX],
) -> usize {
    let page = space.page_size();
    let base = batch.entries[0].address;
    let mut states = [PageState::Absent; WINDOW_PAGES as usize];
    let span = ((batch.entries[batch.len - 1].address - base) / page + 1) as usize;
    if span > states.len() || !space.page_states(base, &mut states[..span]) {
        return 0;
    }
    let mut vma: Option<Vma> = None;
    let mut len = 0;
    for (index, old) in old.iter_mut().enumerate().take(batch.len) {
        if batch.outcomes[index] != Outcome::Pending {
            continue;
        }
        let address = batch.entries[index].address;
        let mut another = false;
        if vma.is_none_or(|vma| address < vma.start || address + page > vma.end) {
            vma = space.vma(address);
            another = true;
        }
        let inside = vma.is_some_and(|vma| {
            matches!(vma.kind, VmaKind::Store { .. }) && vma.prot == order.keep.prot() && vma.prot & 3 == 3
        });
        let state = states[((address - base) / page) as usize];
        let outcome = if !inside || space.mark(address).keep().map(Keep::prot) != Some(order.keep.prot()) {
            Outcome::LayoutChanged
        } else if space.holds_thread_data(address) {
            Outcome::ThreadData
        } else {
            match state {
                PageState::Exclusive => Outcome::Pending,
                PageState::Shared => Outcome::Shared,
                PageState::Absent | PageState::File => Outcome::Absent,
            }
        };
        batch.outcomes[index] = outcome;
        if outcome != Outcome::Pending {
            continue;
        }
        *old = vma.and_then(|vma| place_in(&vma, page, address));
        let joins = !another
            && len > 0
            && runs[len - 1].first + runs[len - 1].count == index
            && batch.entries[index - 1].address + page == address;
        if joins {
            runs[len - 1].count += 1;
        } else if len == RUNS_MAX {
            batch.outcomes[index] = Outcome::GateBusy;
        } else {
            runs[len] = Run { first: index, count: 1, frozen: false };
            len += 1;
        }
    }
    len
}

fn freeze<S: AddressSpace>(space: &mut S, batch: &mut Batch, run: &mut Run, held: &mut Held) {
    let page = space.page_size();
    let pages = Pages { start: batch.entries[run.first].address, count: run.count };
    let (from, to) = (pages.start, pages.start + pages.count as u64 * page);
    if space.register(from, to, RegisterMode::MissingAndMinor).is_err() {
        set(batch, run, Outcome::Properties);
        return;
    }
    space.journal(KIND, held.len, pages);
    if space.freeze(KIND, pages, held.len).moved == run.count {
        run.frozen = true;
        for offset in 0..run.count {
            held.push(run.first + offset);
        }
    } else {
        space.unregister(from, to);
        space.wake(from, to);
        set(batch, run, Outcome::Budget);
    }
}

fn set(batch: &mut Batch, run: &Run, outcome: Outcome) {
    for slot in &mut batch.outcomes[run.first..run.first + run.count] {
        *slot = outcome;
    }
}

fn judge<S: AddressSpace>(space: &mut S, batch: &mut Batch, held: &Held, order: &Order, start: u64, end: u64) {
    if space.robust_list_enters(start, end) {
        refuse_held(batch, held, Outcome::ThreadData);
        return;
    }
    if order.vouched && !order.exact_check {
        return;
    }
    let mut refs = [0; BATCH_MAX];
    match space.check(KIND, &mut refs[..held.len]) {
        Checked::Counted => {
            for (slot, _) in refs[..held.len].iter().enumerate().filter(|(_, count)| **count != 1) {
                batch.outcomes[held.entry(slot)] = Outcome::Referenced;
            }
        }
        Checked::AllFree => {}
        Checked::SomeHeld => refuse_held(batch, held, Outcome::Referenced),
        Checked::Unknown => refuse_held(batch, held, Outcome::NoCheck),
    }
}

fn refuse_held(batch: &mut Batch, held: &Held, outcome: Outcome) {
    for slot in 0..held.len {
        batch.outcomes[held.entry(slot)] = outcome;
    }
}

fn verify<S: AddressSpace>(
    space: &mut S,
    batch: &mut Batch,
    held: &Held,
    old: &[Option<Place>; BATCH_MAX],
) -> [Option<Need>; BATCH_MAX] {
    let mut needs = [None; BATCH_MAX];
    for (slot, need) in needs.iter_mut().enumerate().take(held.len) {
        let index = held.entry(slot);
        if batch.outcomes[index] != Outcome::Pending {
            continue;
        }
        *need = match batch.entries[index].action {
            Action::Retake(place) if space.equals_store(KIND, slot, place) => {
                Some(if old[index] == Some(place) { Need::Same } else { Need::Other(place) })
            }
            Action::RetakeZero if space.is_zero(KIND, slot) => Some(Need::Zero),
            _ => None,
        };
        if need.is_none() {
            batch.outcomes[index] = Outcome::Changed;
        }
    }
    needs
}

fn replace<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    batch: &mut Batch,
    held: &Held,
    needs: &[Option<Need>; BATCH_MAX],
) {
    let page = space.page_size();
    let mut runs = 0;
    let mut slot = 0;
    while slot < held.len {
        let first = held.entry(slot);
        let Some(need) = needs[slot] else {
            slot += 1;
            continue;
        };
        let mut count = 1;
        while slot + count < held.len && joins(page, batch, held, needs, slot + count) {
            count += 1;
        }
        let pages = Pages { start: batch.entries[first].address, count };
        let outcome = match need {
            Need::Same => Outcome::Retaken,
            Need::Other(place) => match space.map_store(pages, place, order.keep) {
                Ok(()) => {
                    space.set_mark(pages, Mark::merged(order.keep));
                    runs += 1;
                    Outcome::Retaken
                }
                Err(_) => Outcome::Budget,
            },
            Need::Zero => match space.map_anonymous(pages, order.keep) {
                Ok(()) => {
                    space.set_mark(pages, Mark::PLAIN);
                    Outcome::Zero
                }
                Err(_) => Outcome::Budget,
            },
        };
        for offset in 0..count {
            batch.outcomes[held.entry(slot + offset)] = outcome;
        }
        slot += count;
    }
    space.record_runs(runs);
}

/// True if the page in `slot` can be replaced together with the one in the slot before it.
fn joins(page: u64, batch: &Batch, held: &Held, needs: &[Option<Need>; BATCH_MAX], slot: usize) -> bool {
    let (before, next) = (held.entry(slot - 1), held.entry(slot));
    let near = batch.entries[before].address + page == batch.entries[next].address;
    let same_way = match (needs[slot - 1], needs[slot]) {
        (Some(Need::Same), Some(Need::Same)) | (Some(Need::Zero), Some(Need::Zero)) => true,
        (Some(Need::Other(a)), Some(Need::Other(b))) => b.follows(a),
        _ => false,
    };
    near && same_way
}
