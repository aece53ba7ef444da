//! The frozen pages of a batch, and their way back.

use abi::BATCH_MAX;
use abi::place::Outcome;

use crate::batch::Batch;
use crate::space::{AddressSpace, FreezeKind, Pages};

/// A page is in the scratch area and cannot be given back from here. Whoever meets it stops where it is: closed gate,
/// registered window and journal are what a survivor needs to give the page back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trapped;

/// Frozen pages of a batch: which entry lies in which slot. Later slots hold later entries.
pub(crate) struct Held {
    pub(crate) kind: FreezeKind,
    entry_of: [usize; BATCH_MAX],
    pub(crate) len: usize,
}

impl Held {
    pub(crate) const fn new(kind: FreezeKind) -> Self {
        Self { kind, entry_of: [0; BATCH_MAX], len: 0 }
    }

    /// A batch freezes each of its entries at most once, so that there is a slot for every one.
    pub(crate) fn push(&mut self, entry: usize) {
        self.entry_of[self.len] = entry;
        self.len += 1;
    }

    pub(crate) fn entry(&self, slot: usize) -> usize {
        self.entry_of[slot]
    }

    pub(crate) fn refuse_all(&self, batch: &mut Batch, outcome: Outcome) {
        for entry in &self.entry_of[..self.len] {
            batch.outcomes[*entry] = outcome;
        }
    }

    /// Moves every page back that was not replaced, in runs of neighbours. Tries all of them, also when one fails.
    pub(crate) fn thaw_refused<S: AddressSpace>(&self, space: &mut S, batch: &Batch) -> Result<(), Trapped> {
        let page = space.page_size();
        let stays = |slot: usize| is_replaced(batch.outcomes[self.entry_of[slot]]);
        let address = |slot: usize| batch.entries[self.entry_of[slot]].address;
        let mut result = Ok(());
        let mut slot = 0;
        while slot < self.len {
            if stays(slot) {
                slot += 1;
                continue;
            }
            let mut count = 1;
            while slot + count < self.len
                && !stays(slot + count)
                && address(slot + count) - address(slot + count - 1) == page
            {
                count += 1;
            }
            if !space.thaw(self.kind, Pages { start: address(slot), count }, slot) {
                result = Err(Trapped);
            }
            slot += count;
        }
        result
    }
}

/// True for outcomes that mean the page need not go back.
const fn is_replaced(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Merged | Outcome::Zero | Outcome::Retaken | Outcome::Unmerged)
}
