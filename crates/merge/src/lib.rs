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
//! The journal is written before each step that moves a page, so that at any instant a survivor can give pages back:
//! [`recover`] says which page of the scratch area belongs where. The helper runs this code inside a member's address
//! space; tests run it over a recorded one with a fault at every step.
//!
//! There is no lock, no allocation and no unsafe code here: what a step *does* is the address space's business, in
//! which order and what happens when it fails is decided here.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod batch;
mod diverged;
mod plain;
mod space;
mod unmerge;

pub use batch::{Batch, Entry, Order, run_plan};
pub use space::{
    AddressSpace, Checked, Failure, FreezeKind, Frozen, PageState, Pages, RegisterMode, Slot, Unsettled, Vma, VmaKind,
};
