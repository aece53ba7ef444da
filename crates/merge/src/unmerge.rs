//! The sequence that gives merged pages their own copy back, content kept: freeze, copy aside, put the copy in place
//! in one step. Copying without the freeze would lose what is written meanwhile.

use abi::BATCH_MAX;
use abi::mark::Mark;
use abi::place::Outcome;

use crate::batch::{Batch, Order, WINDOW_PAGES};
use crate::space::{AddressSpace, Checked, FreezeKind, PageState, Pages, RegisterMode, VmaKind};

const KIND: FreezeKind = FreezeKind::Remap;

pub(crate) fn run<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch) {
    let page = space.page_size();
    let base = batch.entries[0].address;
    let mut states = [PageState::Absent; WINDOW_PAGES as usize];
    let span = ((batch.entries[batch.len - 1].address - base) / page + 1) as usize;
    if span > states.len() || !space.page_states(base, &mut states[..span]) {
        return;
    }
    let mut index = 0;
    while index < batch.len {
        if batch.outcomes[index] != Outcome::Pending {
            index += 1;
            continue;
        }
        let start = batch.entries[index].address;
        let Some(mark) = space.mark(start).keep() else {
            // Not merged: it has its own copy already.
            batch.outcomes[index] = Outcome::Unmerged;
            index += 1;
            continue;
        };
        let vma = space.vma(start).filter(|vma| matches!(vma.kind, VmaKind::Store { .. }));
        let Some(vma) = vma else {
            batch.outcomes[index] = Outcome::LayoutChanged;
            index += 1;
            continue;
        };
        let mut count = 1;
        while index + count < batch.len
            && batch.outcomes[index + count] == Outcome::Pending
            && batch.entries[index + count].address == start + count as u64 * page
            && start + (count as u64 + 1) * page <= vma.end
            && space.mark(start + count as u64 * page).keep() == Some(mark)
        {
            count += 1;
        }
        let first = ((start - base) / page) as usize;
        let outcome =
            run_one(space, order, Pages { start, count }, &states[first..first + count], mark.with(vma.prot, 7));
        for slot in &mut batch.outcomes[index..index + count] {
            *slot = outcome;
        }
        index += count;
    }
}

/// One run inside one mapping.
fn run_one<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    pages: Pages,
    states: &[PageState],
    keep: abi::mark::Keep,
) -> Outcome {
    let (start, end) = (pages.start, pages.start + pages.count as u64 * space.page_size());
    if space.register(start, end, RegisterMode::MissingAndMinor).is_err() {
        return Outcome::Properties;
    }
    space.journal_begin(KIND, start, end);
    space.journal(KIND, 0, pages);
    let begun = space.now();
    let outcome = if space.freeze(KIND, pages, 0).moved == pages.count {
        let outcome = copy_in(space, order, pages, states, keep);
        if outcome != Outcome::Unmerged {
            space.thaw(KIND, pages, 0);
        }
        outcome
    } else {
        Outcome::Budget
    };
    space.unregister(start, end);
    space.wake(start, end);
    let frozen = space.now().saturating_sub(begun);
    space.discard_scratch(KIND, pages.count);
    space.journal_end();
    space.record_frozen(frozen);
    if order.track && outcome == Outcome::Unmerged {
        let _ = space.register(start, end, RegisterMode::Track);
    }
    outcome
}

fn copy_in<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    pages: Pages,
    states: &[PageState],
    keep: abi::mark::Keep,
) -> Outcome {
    space.barrier();
    let (start, end) = (pages.start, pages.start + pages.count as u64 * space.page_size());
    if space.robust_list_enters(start, end) {
        return Outcome::ThreadData;
    }
    // Clean pages are the store's: nobody can write to them without a fault first. A diverged page may be held.
    let diverged = |state: &PageState| matches!(state, PageState::Exclusive | PageState::Shared);
    if states.iter().any(diverged) && !order.vouched {
        let mut refs = [0; BATCH_MAX];
        let answer = space.check(KIND, &mut refs[..pages.count]);
        let held = |slot: usize| states[slot] == PageState::Exclusive && refs[slot] != 1;
        match answer {
            Checked::AllFree => {}
            Checked::Counted if !(0..pages.count).any(held) => {}
            Checked::Counted | Checked::SomeHeld => return Outcome::Referenced,
            Checked::Unknown => return Outcome::NoCheck,
        }
    }
    match space.map_copy(pages, 0, keep) {
        Ok(()) => {
            space.set_mark(pages, Mark::PLAIN);
            Outcome::Unmerged
        }
        Err(_) => Outcome::Budget,
    }
}
