//! One batch of merging as a small state machine over an [`AddressSpace`].
//!
//! A batch takes at most [`abi::BATCH_MAX`] neighbouring pages of one mapping through these steps, and leaves every
//! page either replaced by an equal page of the store or exactly as it was:
//!
//! 1. close the gate, look again;
//! 2. own: make pages exclusive that an earlier fork shared;
//! 3. freeze: whoever touches the pages from now on waits;
//! 4. barrier, robust lists, reference check: whoever holds a page keeps it;
//! 5. verify all bytes against the store;
//! 6. replace runs, move the rest back;
//! 7. wake, tidy the scratch area, open the gate.
//!
//! Three sequences share these steps: plain pages are moved by UFFDIO_MOVE; pages that diverged after merging, and
//! pages that get their own copy back, by mremap(DONTUNMAP).
//!
//! # Death
//!
//! Whoever runs a batch may be killed at any instant. The journal is written before anything is registered and before
//! each step that moves a page, so that it says at any instant what lies where. A survivor that holds the userfaultfd
//! too looks at each journalled slot that holds a page: is the page's place registered and empty, the content goes
//! back there; if not, it has been replaced or given back already. Then it unregisters the journalled window, wakes who
//! waits in it, sets the journal to idle and opens the gate, in this order; what is left in the scratch area is not
//! used again. [`Ended::Trapped`] ends a plan the same way.
//!
//! Two things are not as before then. Marks may be wrong, in one direction only: a page may be marked as merged that is
//! not. And since a survivor can only copy, what somebody writes through an older reference after that is lost.
//!
//! # Hostile plans
//!
//! A plan lies in memory that the program can write. Entries are read once, one that is unaligned, out of order or out
//! of range is refused on its own, and no arithmetic on what they say can overflow.
//!
//! There is no lock, no allocation and no unsafe code here: what a step *does* is the address space's business, in
//! which order and what happens when it fails is decided here.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod batch;
mod diverged;
mod held;
mod judge;
mod plain;
#[cfg(test)]
mod recording;
mod space;
#[cfg(test)]
mod tests;
mod unmerge;

pub use batch::{Ended, Entry, Order, run_plan};
pub use space::{
    AddressSpace, Checked, Failure, FreezeKind, Frozen, PageState, Pages, RegisterMode, Slot, Unsettled, Vma, VmaKind,
};
