//! Merging by a thread of the program itself, for owners who vouch that nothing writes the range meanwhile: nothing is
//! frozen and no helper is needed, but the gate must know what lies where.

use abi::mark::{Keep, Mark};

use crate::calls::{apply, gated, publish};
use crate::child;
use crate::state::STATE;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, PAGE, advice, nr, sys};
use core::sync::atomic::Ordering::SeqCst;

/// Puts a range under management without a helper. `false` if the gate does not stand or the table is full.
#[must_use]
pub fn manage(start: u64, end: u64) -> bool {
    child::notice();
    if STATE.active.load(SeqCst) == 0 {
        return false;
    }
    gated(|locked| {
        if STATE.table.covers(start, end) {
            return true;
        }
        let adopted = locked.adopt(start, end);
        STATE.layout_changes();
        publish();
        adopted
    })
}

/// Maps pages of a segment, from page `first` of `fd` on, in the place of a managed range with the same content;
/// without a descriptor (-1) gives back the memory of pages that hold zeros. `false` if nothing was changed.
///
/// # Safety
/// The content is the same, and nobody writes the range or changes its mapping until this returns.
#[must_use]
pub unsafe fn place(start: u64, end: u64, keep: Keep, fd: i32, first: u64) -> bool {
    child::notice();
    if start >= end || !start.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) {
        return false;
    }
    gated(|_| {
        let excluded = (start..end).step_by(PAGE as usize).any(|page| STATE.table.mark(page) == Mark::EXCLUDED);
        if excluded {
            return false;
        }
        let plain = STATE.table.next_merged(start, end).is_none();
        let len = end - start;
        if fd < 0 && plain {
            // The mapping stays as it is.
            // SAFETY: the pages hold zeros, which is what they read as afterwards.
            return unsafe { sys!(nr::MADVISE, start, len, advice::DONTNEED) } == 0;
        }
        let reserve = if keep.has(Keep::NORESERVE) { MAP_NORESERVE } else { 0 };
        let anonymous = if fd < 0 { MAP_ANONYMOUS } else { 0 };
        let flags = MAP_PRIVATE | MAP_FIXED | reserve | anonymous;
        STATE.layout_changes();
        // SAFETY: the caller vouches that the content is the same and that nobody is writing it.
        let mapped = unsafe { sys::mmap(start, len, keep.prot().into(), flags, fd, first * PAGE) } == Ok(start);
        if mapped {
            apply(start, len, keep);
            STATE.table.set(start, end, if fd < 0 { Mark::PLAIN } else { Mark::merged(keep) });
        }
        mapped
    })
}
