//! The sequence for plain anonymous pages: freeze by UFFDIO_MOVE.

use core::ops::Range;

use abi::mark::Mark;
use abi::place::{Action, Outcome};

use crate::batch::{Batch, Look, Order, is_neighbour, refusal};
use crate::held::{Held, Trapped};
use crate::judge::judge;
use crate::space::{AddressSpace, Failure, FreezeKind, PageState, Pages, RegisterMode, Vma, VmaKind};

const KIND: FreezeKind = FreezeKind::Move;

/// Runs the batch mapping by mapping: what was merged earlier has cut the memory into pieces.
pub(crate) fn run<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch) -> Result<(), Trapped> {
    let mut from = 0;
    while let Some(first) = batch.first_pending(from..batch.len) {
        let address = batch.entries[first].address;
        let Some(vma) = space.vma(address).filter(|vma| vma.start <= address && address < vma.end) else {
            batch.outcomes[first] = Outcome::LayoutChanged;
            from = first + 1;
            continue;
        };
        let behind = batch.entries[first..batch.len].iter().position(|entry| entry.address >= vma.end);
        let to = behind.map_or(batch.len, |count| first + count);
        run_mapping(space, order, batch, first..to, &vma)?;
        from = to;
    }
    Ok(())
}

/// Runs the entries that lie in one mapping.
fn run_mapping<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    batch: &mut Batch,
    among: Range<usize>,
    vma: &Vma,
) -> Result<(), Trapped> {
    let Some((start, end)) = look_again(space, order, batch, among.clone(), vma) else { return Ok(()) };
    // Before the freeze as well: an owner that ends while its mutex is frozen releases nothing, however short the time.
    if space.robust_list_enters(start, end) {
        batch.refuse(among, Outcome::ThreadData);
        return Ok(());
    }
    if order.forked {
        own(space, batch, among.clone());
    }
    // The journal comes before the registration: killed in between, whoever touches a missing page of the window
    // would wait at it for ever, and no survivor would know.
    space.journal_begin(KIND, start, end);
    let begun = space.now();
    let mut held = Held::new(KIND);
    let registered = space.register(start, end, RegisterMode::Missing);
    match registered {
        Ok(()) => freeze(space, batch, among, &mut held),
        Err(failure) => batch.refuse(among, refusal(failure)),
    }
    if held.len > 0 {
        space.barrier();
        judge(space, order, batch, &held, (start, end));
        verify(space, batch, &held);
        replace(space, order, batch, &held);
        held.thaw_refused(space, batch)?;
    }
    // Replaced pages are out of the registration already; those who wait there need the wake-up as well.
    // Busy: all of it is as somebody else has registered it.
    if registered != Err(Failure::Busy) {
        space.unregister(start, end);
        space.wake(start, end);
    }
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
    Ok(())
}

/// Leaves out whatever is not as the plan believed and returns the window of what remains.
fn look_again<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    batch: &mut Batch,
    among: Range<usize>,
    vma: &Vma,
) -> Option<(u64, u64)> {
    let page = space.page_size();
    if vma.kind != VmaKind::Anonymous || vma.prot != order.keep.prot() || vma.prot & 3 != 3 {
        batch.refuse(among, Outcome::LayoutChanged);
        return None;
    }
    let Some(look) = Look::at(space, batch, among.clone()) else {
        batch.refuse(among, Outcome::Absent);
        return None;
    };
    let (mut start, mut end) = (u64::MAX, 0);
    for index in among {
        if !batch.is_pending(index) {
            continue;
        }
        let address = batch.entries[index].address;
        let mark = space.mark(address);
        let outcome = if !mark.is_plain() {
            if mark.keep().is_some() { Outcome::LayoutChanged } else { Outcome::Excluded }
        } else if space.holds_thread_data(address) {
            Outcome::ThreadData
        } else if vma.end - address == page && !goes_on(space, vma) {
            Outcome::Properties
        } else {
            match look.state(address) {
                PageState::Exclusive => Outcome::Pending,
                PageState::Shared => Outcome::Shared,
                PageState::Absent | PageState::Swapped | PageState::File => Outcome::Absent,
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

/// True if the owner's memory goes on behind a mapping. Where it ends the last page must stay: a mapping that ends in
/// the store could grow into the store. The range may be longer than what is left of it.
fn goes_on<S: AddressSpace>(space: &mut S, vma: &Vma) -> bool {
    let behind = space.vma(vma.end).map(|behind| behind.kind);
    matches!(behind, Some(VmaKind::Anonymous | VmaKind::Store { first: Some(_) }))
}

/// Makes the chosen pages exclusive, in place. Only pages that are present and mapped nowhere else: elsewhere this
/// would allocate memory, and could get the process killed for it. That nobody holds them, who would be left with
/// another page, is for the order to say: here nothing tells it in time.
fn own<S: AddressSpace>(space: &mut S, batch: &Batch, among: Range<usize>) {
    let mut index = among.start;
    while index < among.end {
        let count = count_near(space.page_size(), batch, index..among.end);
        if count > 0 {
            space.own(Pages { start: batch.entries[index].address, count });
        }
        index += count.max(1);
    }
}

/// How many pending entries lie side by side at the beginning of `among`.
fn count_near(page: u64, batch: &Batch, among: Range<usize>) -> usize {
    let near =
        |index: usize| index == among.start || batch.entries[index].address - batch.entries[index - 1].address == page;
    among.clone().take_while(|index| batch.is_pending(*index) && near(*index)).count()
}

/// Moves the chosen pages to the scratch area, packed from slot 0 on, so that a hole follows the last one.
fn freeze<S: AddressSpace>(space: &mut S, batch: &mut Batch, among: Range<usize>, held: &mut Held) {
    let mut index = among.start;
    while index < among.end {
        let count = count_near(space.page_size(), batch, index..among.end);
        if count == 0 {
            index += 1;
            continue;
        }
        let pages = Pages { start: batch.entries[index].address, count };
        space.journal(KIND, held.len, pages);
        let frozen = space.freeze(KIND, pages, held.len);
        let moved = frozen.moved.min(count);
        for offset in 0..moved {
            held.push(index + offset);
        }
        index += moved;
        if moved < count {
            batch.outcomes[index] = refusal(frozen.failure.unwrap_or(Failure::Busy));
            index += 1;
        }
    }
}

/// All bytes of every page that is left, against the store.
fn verify<S: AddressSpace>(space: &mut S, batch: &mut Batch, held: &Held) {
    for slot in 0..held.len {
        let index = held.entry(slot);
        if !batch.is_pending(index) {
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
        if !batch.is_pending(first) {
            slot += 1;
            continue;
        }
        let mut count = 1;
        while slot + count < held.len {
            let (before, next) = (held.entry(slot + count - 1), held.entry(slot + count));
            if !batch.is_pending(next) || !is_neighbour(page, &batch.entries[before], &batch.entries[next]) {
                break;
            }
            count += 1;
        }
        let pages = Pages { start: batch.entries[first].address, count };
        let outcome = match batch.entries[first].action.place() {
            None => Outcome::Zero,
            Some(place) => {
                // Marked before it is so. The other way round, killed in between, a call of the program that makes
                // memory read zero would take a page of the store for an ordinary one.
                space.set_mark(pages, Mark::merged(order.keep));
                match space.map_store(pages, place, order.keep) {
                    Ok(()) => {
                        runs += 1;
                        Outcome::Merged
                    }
                    Err(failure) => {
                        space.set_mark(pages, Mark::PLAIN);
                        refusal(failure)
                    }
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
