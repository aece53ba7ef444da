//! Who may be replaced and who goes back: robust lists and references. Asked once the pages are frozen, since nobody
//! can take a new reference to a frozen page.

use abi::BATCH_MAX;
use abi::place::Outcome;

use crate::batch::{Batch, Order};
use crate::held::Held;
use crate::space::{AddressSpace, Checked, FreezeKind, PageState};

/// Refuses the frozen pages that somebody else can still write to.
pub(crate) fn judge<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch, held: &Held, window: (u64, u64)) {
    if space.robust_list_enters(window.0, window.1) {
        held.refuse_all(batch, Outcome::ThreadData);
    } else if order.asks() {
        ask(space, batch, held);
    }
}

fn ask<S: AddressSpace>(space: &mut S, batch: &mut Batch, held: &Held) {
    let mut refs = [0; BATCH_MAX];
    match space.check(held.kind, &mut refs[..held.len]) {
        Checked::Counted => {
            for (slot, _) in refs[..held.len].iter().enumerate().filter(|(_, count)| **count != 1) {
                batch.outcomes[held.entry(slot)] = Outcome::Referenced;
            }
        }
        Checked::AllFree => {
            for slot in covered(space, held)..held.len {
                batch.outcomes[held.entry(slot)] = Outcome::NoCheck;
            }
        }
        Checked::SomeHeld => held.refuse_all(batch, Outcome::Referenced),
        Checked::Unknown => held.refuse_all(batch, Outcome::NoCheck),
    }
}

/// How many pages "nobody holds any of them" speaks of. The collapse oracle looks at one page after the other, passes
/// over those that are swapped out and stops at the first hole. A page that was freed lazily can leave a hole while it
/// lies in the scratch area; nothing puts a page back there, so looking after the check is enough.
fn covered<S: AddressSpace>(space: &mut S, held: &Held) -> usize {
    if held.kind == FreezeKind::Remap {
        return held.len;
    }
    let mut states = [PageState::Absent; BATCH_MAX];
    if !space.scratch_states(held.kind, &mut states[..held.len]) {
        return 0;
    }
    states[..held.len].iter().take_while(|state| **state == PageState::Exclusive).count()
}

/// As [`judge`], for pages of a store mapping that are to get their own copy: among them are the store's own, to which
/// nobody can write. What they are is looked up now and not before the freeze, since any of them could have been
/// written up to then.
pub(crate) fn judge_copies<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    batch: &mut Batch,
    held: &Held,
    window: (u64, u64),
) {
    if space.robust_list_enters(window.0, window.1) {
        return held.refuse_all(batch, Outcome::ThreadData);
    }
    if !order.asks() {
        return;
    }
    let mut states = [PageState::Absent; BATCH_MAX];
    let states = &mut states[..held.len];
    if !space.scratch_states(held.kind, states) {
        return held.refuse_all(batch, Outcome::NoCheck);
    }
    let ours = |state: &PageState| matches!(state, PageState::Exclusive | PageState::Swapped);
    let mut refs = [0; BATCH_MAX];
    let answer = if states.iter().any(ours) { space.check(held.kind, &mut refs[..held.len]) } else { Checked::AllFree };
    for (slot, state) in states.iter().enumerate() {
        let refused = match (state, answer) {
            (PageState::Absent | PageState::File, _) => None,
            // The other process has a reference of its own, so that no count tells whether somebody else has one.
            (PageState::Shared, _) => Some(Outcome::Shared),
            (_, Checked::AllFree) => None,
            (_, Checked::Counted) if refs[slot] == 1 => None,
            (_, Checked::Counted | Checked::SomeHeld) => Some(Outcome::Referenced),
            (_, Checked::Unknown) => Some(Outcome::NoCheck),
        };
        if let Some(outcome) = refused {
            batch.outcomes[held.entry(slot)] = outcome;
        }
    }
}
