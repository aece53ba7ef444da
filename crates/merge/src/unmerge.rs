//! The sequence that gives merged pages their own copy back, content kept: freeze, copy aside, put the copy in place
//! in one step. Copying without the freeze would lose what is written meanwhile.

use abi::mark::{Keep, Mark};
use abi::place::Outcome;

use crate::batch::{Batch, Order, refusal};
use crate::held::{Held, Trapped};
use crate::judge::judge_copies;
use crate::space::{AddressSpace, Failure, FreezeKind, Pages, RegisterMode, VmaKind};

const KIND: FreezeKind = FreezeKind::Remap;
/// PROT_READ.
const READ: u8 = 1;

pub(crate) fn run<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch) -> Result<(), Trapped> {
    let mut index = 0;
    while index < batch.len {
        let count = match look_again(space, batch, index) {
            Some((count, keep)) => {
                run_one(space, order, batch, (index, count), keep)?;
                count
            }
            None => 1,
        };
        index += count;
    }
    Ok(())
}

/// How many merged pages lie side by side from `index` on, in one mapping and with the same properties, and these.
/// `None` if there is nothing to do for the first, whose outcome then says why.
fn look_again<S: AddressSpace>(space: &mut S, batch: &mut Batch, index: usize) -> Option<(usize, Keep)> {
    if !batch.is_pending(index) {
        return None;
    }
    let page = space.page_size();
    let start = batch.entries[index].address;
    let mark = space.mark(start).keep();
    let vma = mark.and_then(|_| space.vma(start)).filter(|vma| vma.start <= start && start < vma.end);
    let (mark, vma) = match (mark, vma) {
        (None, _) => {
            // Not merged: it has its own copy already.
            batch.outcomes[index] = Outcome::Unmerged;
            return None;
        }
        (Some(_), Some(vma)) if vma.kind == VmaKind::Anonymous => {
            // A batch was killed after it had marked the page, or before it could mark it again.
            space.set_mark(Pages { start, count: 1 }, Mark::PLAIN);
            batch.outcomes[index] = Outcome::Unmerged;
            return None;
        }
        (Some(mark), Some(vma)) if matches!(vma.kind, VmaKind::Store { .. }) => (mark, vma),
        (Some(_), _) => {
            batch.outcomes[index] = Outcome::LayoutChanged;
            return None;
        }
    };
    if vma.prot & READ == 0 && !space.survivors_read_all() {
        // It could be copied, since nobody else knows the scratch area. But nobody could give it back.
        batch.outcomes[index] = Outcome::Properties;
        return None;
    }
    let mut count = 0;
    while batch.is_pending(index + count) {
        let address = batch.entries[index + count].address;
        let near = count == 0 || address - batch.entries[index + count - 1].address == page;
        let alike = address < vma.end && space.mark(address).keep() == Some(mark);
        if !near || !alike || space.holds_thread_data(address) {
            break;
        }
        count += 1;
    }
    if count == 0 {
        batch.outcomes[index] = Outcome::ThreadData;
        return None;
    }
    Some((count, mark.with(vma.prot, Keep::PROT)))
}

/// One run inside one mapping: `run.1` entries from `run.0` on.
fn run_one<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    batch: &mut Batch,
    run: (usize, usize),
    keep: Keep,
) -> Result<(), Trapped> {
    let (first, count) = run;
    let pages = Pages { start: batch.entries[first].address, count };
    let (start, end) = (pages.start, pages.start + count as u64 * space.page_size());
    // Before the freeze as well: an owner that ends while its mutex is frozen releases nothing, however short the time.
    if space.robust_list_enters(start, end) {
        batch.refuse(first..first + count, Outcome::ThreadData);
        return Ok(());
    }
    space.journal_begin(KIND, start, end);
    let begun = space.now();
    let mut held = Held::new(KIND);
    let registered = space.register(start, end, RegisterMode::MissingAndMinor);
    let (moved, failure) = match registered {
        Ok(()) => {
            space.journal(KIND, 0, pages);
            let frozen = space.freeze(KIND, pages, 0);
            (frozen.moved.min(count), frozen.failure.unwrap_or(Failure::Limit))
        }
        Err(failure) => (0, failure),
    };
    for index in first..first + count {
        if index < first + moved {
            held.push(index);
        } else {
            batch.outcomes[index] = refusal(failure);
        }
    }
    if held.len > 0 {
        // Neither counted nor copied is what cannot be read. In its place it stays forbidden all the time.
        let hidden = keep.prot() & READ == 0;
        if hidden && !space.protect_frozen(held.len, READ) {
            held.refuse_all(batch, Outcome::NoCheck);
        }
        space.barrier();
        judge_copies(space, order, batch, &held, (start, end));
        copy_in(space, batch, &held, keep);
        if hidden && !space.protect_frozen(held.len, keep.prot()) {
            // Whoever survives gives back copies, with the protection of their place.
            return Err(Trapped);
        }
        held.thaw_refused(space, batch)?;
    }
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
        let _ = space.register(start, end, RegisterMode::Track);
    }
    Ok(())
}

/// Puts copies in place, in runs of neighbours. All of the held pages lie side by side.
fn copy_in<S: AddressSpace>(space: &mut S, batch: &mut Batch, held: &Held, keep: Keep) {
    let mut slot = 0;
    while slot < held.len {
        let first = held.entry(slot);
        let mut count = 0;
        while slot + count < held.len && batch.is_pending(first + count) {
            count += 1;
        }
        if count == 0 {
            slot += 1;
            continue;
        }
        let pages = Pages { start: batch.entries[first].address, count };
        let outcome = match space.map_copy(pages, slot, keep) {
            Ok(()) => {
                // Only now: a page may be taken for the store's that is not, never the other way round.
                space.set_mark(pages, Mark::PLAIN);
                Outcome::Unmerged
            }
            Err(failure) => refusal(failure),
        };
        for offset in 0..count {
            batch.outcomes[held.entry(slot + offset)] = outcome;
        }
        slot += count;
    }
}
