//! The sequence for pages that were merged and written since: anonymous pages inside a private mapping of the store.
//!
//! UFFDIO_MOVE refuses them, so the whole run moves with mremap(DONTUNMAP) while its place is registered for missing
//! and minor faults. Write protection would not do: whoever holds a page already writes on.

use abi::BATCH_MAX;
use abi::mark::{Keep, Mark};
use abi::place::{Action, Outcome, Place};

use crate::batch::{Batch, Look, Order, follows, place_in, refusal};
use crate::held::{Held, Trapped};
use crate::judge::judge;
use crate::space::{AddressSpace, Failure, FreezeKind, PageState, Pages, RegisterMode, Vma, VmaKind};

const KIND: FreezeKind = FreezeKind::Remap;
/// Every run costs two system calls while pages are frozen.
const RUNS_MAX: usize = 16;

/// A run of entries that lie side by side in one mapping.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    count: usize,
}

/// What a batch's pages are now.
#[derive(Clone, Copy, Default)]
struct Was {
    /// Their place in the store, as far as it is known.
    place: Option<Place>,
    /// Protection and properties. The gate's mark has them first hand; a plan could have been wrong in those that no
    /// mapping shows.
    keep: Keep,
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

pub(crate) fn run<S: AddressSpace>(space: &mut S, order: &Order, batch: &mut Batch) -> Result<(), Trapped> {
    if !order.exact_check && !order.vouched {
        batch.refuse_rest(Outcome::NoCheck);
        return Ok(());
    }
    let mut runs = [Run { first: 0, count: 0 }; RUNS_MAX];
    let mut was = [Was::default(); BATCH_MAX];
    let len = look_again(space, order, batch, &mut runs, &mut was);
    let Some((first, last)) = runs[..len].first().zip(runs[..len].last()) else { return Ok(()) };
    let window = (range(space, batch, first).0, range(space, batch, last).1);
    // Before the freeze as well: an owner that ends while its mutex is frozen releases nothing, however short the time.
    if space.robust_list_enters(window.0, window.1) {
        batch.refuse_rest(Outcome::ThreadData);
        return Ok(());
    }

    space.journal_begin(KIND, window.0, window.1);
    let begun = space.now();
    let mut held = Held::new(KIND);
    let mut foreign = [false; RUNS_MAX];
    for (run, foreign) in runs[..len].iter().zip(&mut foreign) {
        *foreign = !freeze(space, batch, run, &mut held);
    }
    if held.len > 0 {
        space.barrier();
        judge(space, order, batch, &held, window);
        let needs = verify(space, batch, &held, &was);
        replace(space, batch, &held, &needs, &was);
        held.thaw_refused(space, batch)?;
    }
    for (run, _) in runs[..len].iter().zip(foreign).filter(|(_, foreign)| !foreign) {
        let (start, end) = range(space, batch, run);
        space.unregister(start, end);
        space.wake(start, end);
    }
    let frozen = space.now().saturating_sub(begun);
    space.discard_scratch(KIND, held.len);
    space.journal_end();
    if held.len > 0 {
        space.record_frozen(frozen);
    }
    for run in runs[..len].iter().filter(|_| order.track) {
        let (start, end) = range(space, batch, run);
        // As for plain pages: without tracking they are looked at again.
        let _ = space.register(start, end, RegisterMode::Track);
    }
    Ok(())
}

fn range<S: AddressSpace>(space: &S, batch: &Batch, run: &Run) -> (u64, u64) {
    let start = batch.entries[run.first].address;
    (start, start + run.count as u64 * space.page_size())
}

/// Leaves out what is not as the plan believed, and forms runs of what remains.
fn look_again<S: AddressSpace>(
    space: &mut S,
    order: &Order,
    batch: &mut Batch,
    runs: &mut [Run; RUNS_MAX],
    was: &mut [Was; BATCH_MAX],
) -> usize {
    let page = space.page_size();
    let Some(look) = Look::at(space, batch, 0..batch.len) else { return 0 };
    let mut vma: Option<Vma> = None;
    let mut len = 0;
    for (index, was) in was.iter_mut().enumerate().take(batch.len) {
        if !batch.is_pending(index) {
            continue;
        }
        let address = batch.entries[index].address;
        let mut another = false;
        if vma.is_none_or(|vma| address < vma.start || address >= vma.end) {
            vma = space.vma(address).filter(|vma| vma.start <= address && address < vma.end);
            another = true;
        }
        let prot = order.keep.prot();
        let inside =
            vma.is_some_and(|vma| matches!(vma.kind, VmaKind::Store { .. }) && vma.prot == prot && vma.prot & 3 == 3);
        let outcome = match space.mark(address).keep() {
            Some(keep) if inside && keep.prot() == prot => {
                was.keep = keep;
                if space.holds_thread_data(address) {
                    Outcome::ThreadData
                } else {
                    match look.state(address) {
                        PageState::Exclusive => Outcome::Pending,
                        PageState::Shared => Outcome::Shared,
                        PageState::Absent | PageState::Swapped | PageState::File => Outcome::Absent,
                    }
                }
            }
            _ => Outcome::LayoutChanged,
        };
        batch.outcomes[index] = outcome;
        if outcome != Outcome::Pending {
            continue;
        }
        was.place = vma.and_then(|vma| place_in(&vma, page, address));
        let joins = !another
            && len > 0
            && runs[len - 1].first + runs[len - 1].count == index
            && address - batch.entries[index - 1].address == page;
        if joins {
            runs[len - 1].count += 1;
        } else if len == RUNS_MAX {
            // The next batch begins here.
            batch.cut(index);
            batch.outcomes[index] = Outcome::Pending;
            break;
        } else {
            runs[len] = Run { first: index, count: 1 };
            len += 1;
        }
    }
    len
}

/// What was moved is held, what was not is refused. The run stays registered until the end of the batch.
/// `false` if somebody else has the run registered, who keeps it.
fn freeze<S: AddressSpace>(space: &mut S, batch: &mut Batch, run: &Run, held: &mut Held) -> bool {
    let (start, end) = range(space, batch, run);
    let pages = Pages { start, count: run.count };
    let registered = space.register(start, end, RegisterMode::MissingAndMinor);
    let (moved, failure) = match registered {
        Ok(()) => {
            space.journal(KIND, held.len, pages);
            let frozen = space.freeze(KIND, pages, held.len);
            (frozen.moved.min(run.count), frozen.failure.unwrap_or(Failure::Limit))
        }
        Err(failure) => (0, failure),
    };
    for index in run.first..run.first + run.count {
        if index < run.first + moved {
            held.push(index);
        } else {
            batch.outcomes[index] = refusal(failure);
        }
    }
    registered != Err(Failure::Busy)
}

fn verify<S: AddressSpace>(
    space: &mut S,
    batch: &mut Batch,
    held: &Held,
    was: &[Was; BATCH_MAX],
) -> [Option<Need>; BATCH_MAX] {
    let mut needs = [None; BATCH_MAX];
    for (slot, need) in needs.iter_mut().enumerate().take(held.len) {
        let index = held.entry(slot);
        if !batch.is_pending(index) {
            continue;
        }
        *need = match batch.entries[index].action {
            Action::Retake(place) if space.equals_store(KIND, slot, place) => {
                Some(if was[index].place == Some(place) { Need::Same } else { Need::Other(place) })
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
    batch: &mut Batch,
    held: &Held,
    needs: &[Option<Need>; BATCH_MAX],
    was: &[Was; BATCH_MAX],
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
        while slot + count < held.len && joins(page, batch, held, needs, was, slot + count) {
            count += 1;
        }
        let pages = Pages { start: batch.entries[first].address, count };
        let keep = was[first].keep;
        let outcome = match need {
            Need::Same => Outcome::Retaken,
            // The mark is right already.
            Need::Other(place) => match space.map_store(pages, place, keep) {
                Ok(()) => {
                    runs += 1;
                    Outcome::Retaken
                }
                Err(failure) => refusal(failure),
            },
            Need::Zero => match space.map_anonymous(pages, keep) {
                Ok(()) => {
                    // Only now: a page may be taken for the store's that is not, never the other way round.
                    space.set_mark(pages, Mark::PLAIN);
                    Outcome::Zero
                }
                Err(failure) => refusal(failure),
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
fn joins(
    page: u64,
    batch: &Batch,
    held: &Held,
    needs: &[Option<Need>; BATCH_MAX],
    was: &[Was; BATCH_MAX],
    slot: usize,
) -> bool {
    let (before, next) = (held.entry(slot - 1), held.entry(slot));
    let near = batch.entries[next].address - batch.entries[before].address == page;
    let same_way = match (needs[slot - 1], needs[slot]) {
        (Some(Need::Same), Some(Need::Same)) | (Some(Need::Zero), Some(Need::Zero)) => true,
        (Some(Need::Other(before)), Some(Need::Other(next))) => follows(before, next),
        _ => false,
    };
    near && same_way && was[before].keep == was[next].keep
}
