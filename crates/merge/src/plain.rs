//! The sequence for plain anonymous pages: freeze by UFFDIO_MOVE.

use core::ops::Range;

use abi::BATCH_MAX;
use abi::mark::Mark;
use abi::place::{Action, Outcome};

use crate::batch::{Batch, Held, Order, WINDOW_PAGES, is_neighbour};
use crate::space::{AddressSpace, Checked, Failure, FreezeKind, PageState, Pages, RegisterMode, Vma, VmaKind};

const KIND: FreezeKind = FreezeKind::Move;

/// Runs the batch mapping by mapping: what was merged earlier has cut the memory into pieces.
pub(crate) fn run<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch) {
    let mut from = 0;
    while from < batch.len {
        from = run_mapping(space, order, batch, from);
    }
}

/// Runs the entries from `from` on that lie in one mapping; returns the first one behind it.
fn run_mapping<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch, from: usize) -> usize {
    let Some(from) = (from..batch.len).find(|index| batch.outcomes[*index] == Outcome::Pending) else {
        return batch.len;
    };
    let page = space.page_size();
    let Some(vma) = space.vma(batch.entries[from].address) else {
        batch.outcomes[from] = Outcome::LayoutChanged;
        return from + 1;
    };
    let inside = |index: &usize| batch.entries[*index].address.saturating_add(page) <= vma.end;
    let to = from + (from..batch.len).take_while(inside).count().max(1);
    run_entries(space, order, batch, from..to, vma);
    to
}

fn run_entries<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch, span: Range<usize>, vma: Vma) {
    let Some((start, end)) = look_again(space, order, batch, span.clone(), vma) else { return };
    if order.forked {
        own(space, batch, span.clone());
    }
    if let Err(failure) = space.register(start, end, RegisterMode::Missing) {
        refuse(batch, span, refusal(failure));
        return;
    }
    space.journal_begin(KIND, start, end);
    let begun = space.now();
    let held = freeze(space, batch, span);
    if held.len > 0 {
        space.barrier();
        judge(space, batch, &held, start, end);
        verify(space, batch, &held);
        replace(space, order, batch, &held);
        held.thaw_refused(space, batch);
    }
    // Replaced pages are out of the registration already; those who wait there need the wake-up as well.
    space.unregister(start, end);
    space.wake(start, end);
    let frozen = space.now().saturating_sub(begun);
    space.discard_scratch(KIND, held.len);
    space.journal_end();
    if held.len > 0 {
        space.record_frozen(frozen);
    }
    if order.track {
        // Tracking is a convenience: without it these pages read as written and are looked at again.
        let _ = space.register(start, end, RegisterMode::Track);
    }
}

const fn refusal(failure: Failure) -> Outcome {
    match failure {
        Failure::Busy => Outcome::Pinned,
        Failure::Absent => Outcome::Absent,
        Failure::Properties => Outcome::Properties,
        Failure::Limit => Outcome::Budget,
    }
}

fn refuse(batch: &mut Batch, span: Range<usize>, outcome: Outcome) {
    for slot in batch.outcomes[span].iter_mut().filter(|slot| **slot == Outcome::Pending) {
        *slot = outcome;
    }
}

/// Leaves out whatever is not as the plan believed and returns the window of what remains.
fn look_again<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    batch: &mut Batch,
    span: Range<usize>,
    vma: Vma,
) -> Option<(u64, u64)> {
    let page = space.page_size();
    let fits = vma.kind == VmaKind::Anonymous && vma.prot == order.keep.prot() && vma.prot & 3 == 3;
    let base = batch.entries[span.start].address;
    let mut states = [PageState::Absent; WINDOW_PAGES as usize];
    let count = ((batch.entries[span.end - 1].address - base) / page + 1) as usize;
    let readable = count <= states.len() && space.page_states(base, &mut states[..count]);
    let (mut start, mut end) = (u64::MAX, 0);
    for index in span {
        let address = batch.entries[index].address;
        if batch.outcomes[index] != Outcome::Pending {
            continue;
        }
        let mark = space.mark(address);
        let outcome = if !fits || mark.keep().is_some() {
            Outcome::LayoutChanged
        } else if !mark.is_plain() {
            Outcome::Excluded
        } else if space.holds_thread_data(address) {
            Outcome::ThreadData
        } else if !readable {
            Outcome::Absent
        } else {
            match states[((address - base) / page) as usize] {
                PageState::Exclusive => Outcome::Pending,
                PageState::Shared => Outcome::Shared,
                PageState::Absent | PageState::File => Outcome::Absent,
            }
        };
        batch.outcomes[index] = outcome;
        if outcome == Outcome::Pending {
            start = start.min(address);
            end = end.max(address + page);
        }
    }
    (start < end).then_some((start, end))
}

/// Makes the chosen pages exclusive, in place. Only pages that are present and mapped nowhere else: elsewhere this
/// would allocate memory, and could get the process killed for it.
fn own<S: AddressSpace>(space: &mut S, batch: &Batch, span: Range<usize>) {
    let page = space.page_size();
    let mut run: Option<Pages> = None;
    for (entry, outcome) in batch.entries[span.clone()].iter().zip(&batch.outcomes[span]) {
        if *outcome != Outcome::Pending {
            continue;
        }
        run = Some(match run {
            Some(before) if before.start + before.count as u64 * page == entry.address => {
                Pages { count: before.count + 1, ..before }
            }
            Some(before) => {
                space.own(before);
                Pages { start: entry.address, count: 1 }
            }
            None => Pages { start: entry.address, count: 1 },
        });
    }
    if let Some(last) = run {
        space.own(last);
    }
}

/// Moves the chosen pages to the scratch area, packed from slot 0 on, so that a hole follows the last one.
fn freeze<S: AddressSpace>(space: &mut S, batch: &mut Batch, span: Range<usize>) -> Held {
    let page = space.page_size();
    let mut held = Held::new(KIND);
    let mut index = span.start;
    while index < span.end {
        if batch.outcomes[index] != Outcome::Pending {
            index += 1;
            continue;
        }
        let start = batch.entries[index].address;
        let mut count = 1;
        while index + count < span.end
            && batch.outcomes[index + count] == Outcome::Pending
            && batch.entries[index + count].address == start + count as u64 * page
        {
            count += 1;
        }
        let pages = Pages { start, count };
        space.journal(KIND, held.len, pages);
        let frozen = space.freeze(KIND, pages, held.len);
        for moved in 0..frozen.moved.min(count) {
            held.push(index + moved);
        }
        index += frozen.moved.min(count);
        if frozen.moved < count {
            batch.outcomes[index] = refusal(frozen.failure.unwrap_or(Failure::Busy));
            index += 1;
        }
    }
    held
}

/// Whoever is held goes back: by the robust lists, by the reference check.
fn judge<S: AddressSpace>(space: &mut S, batch: &mut Batch, held: &Held, start: u64, end: u64) {
    if space.robust_list_enters(start, end) {
        for slot in 0..held.len {
            batch.outcomes[held.entry(slot)] = Outcome::ThreadData;
        }
        return;
    }
    let mut refs = [0; BATCH_MAX];
    let answer = space.check(KIND, &mut refs[..held.len]);
    for (slot, count) in refs[..held.len].iter().enumerate() {
        let refused = match answer {
            Checked::AllFree => None,
            Checked::Counted if *count == 1 => None,
            Checked::Counted | Checked::SomeHeld => Some(Outcome::Referenced),
            Checked::Unknown => Some(Outcome::NoCheck),
        };
        if let Some(outcome) = refused {
            batch.outcomes[held.entry(slot)] = outcome;
        }
    }
}

/// All bytes of every page that is left, against the store.
fn verify<S: AddressSpace>(space: &mut S, batch: &mut Batch, held: &Held) {
    for slot in 0..held.len {
        let index = held.entry(slot);
        if batch.outcomes[index] != Outcome::Pending {
            continue;
        }
        let same = match batch.entries[index].action {
            Action::Merge(place) => space.equals_store(KIND, slot, place),
            Action::DropZero => space.is_zero(KIND, slot),
            Action::Retake(_) | Action::RetakeZero | Action::Unmerge => false,
        };
        if !same {
            batch.outcomes[index] = Outcome::Changed;
        }
    }
}

/// Maps the store over each run of neighbours. A dropped zero page needs nothing: its place stays unpopulated.
fn replace<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch, held: &Held) {
    let page = space.page_size();
    let mut runs = 0;
    let mut slot = 0;
    while slot < held.len {
        let first = held.entry(slot);
        if batch.outcomes[first] != Outcome::Pending {
            slot += 1;
            continue;
        }
        let mut count = 1;
        while slot + count < held.len {
            let (before, next) = (held.entry(slot + count - 1), held.entry(slot + count));
            let near = is_neighbour(page, &batch.entries[before], &batch.entries[next]);
            if batch.outcomes[next] != Outcome::Pending || !near {
                break;
            }
            count += 1;
        }
        let outcome = match batch.entries[first].action.place() {
            None => Outcome::Zero,
            Some(place) => {
                let pages = Pages { start: batch.entries[first].address, count };
                match space.map_store(pages, place, order.keep) {
                    Ok(()) => {
                        space.set_mark(pages, Mark::merged(order.keep));
                        runs += 1;
                        Outcome::Merged
                    }
                    Err(failure) => refusal(failure),
                }
            }
        };
        for offset in 0..count {
            batch.outcomes[held.entry(slot + offset)] = outcome;
        }
        slot += count;
    }
    space.record_runs(runs);
}
