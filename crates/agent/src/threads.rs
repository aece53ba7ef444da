//! Thread data that must not be frozen: robust lists and thread control blocks.
//!
//! When a thread ends while its control block is frozen, the kernel cannot clear its tid word (pthread_join waits for
//! ever) nor walk its robust list (mutexes in memory shared with other processes are never released). The heads come
//! from the broker, which may ask the kernel for them; the entries are read here, after the freeze. The broker looks before
//! each plan. What is un-merged for the program may come long after that, or after the broker: threads have gone, whose
//! memory still holds their lists.

use core::sync::atomic::Ordering::SeqCst;

use abi::control::{Control, HEADS_MAX};

use crate::sys::{self, PAGE};

/// A robust list may be a loop, or garbage.
const ENTRIES_MAX: usize = 2048;
/// How far a mutex's words lie around its list entry.
const MUTEX: u64 = 64;

/// True if a thread that still is there has a robust head that `is_near`.
fn any_head(control: &Control, is_near: impl Fn(u64) -> bool) -> bool {
    let heads = &control.heads;
    let count = (heads.count.load(SeqCst) as usize).min(HEADS_MAX);
    let mut known = heads.address[..count].iter().zip(&heads.owner);
    known.any(|(address, owner)| {
        let address = address.load(SeqCst);
        // The kernel walks a thread's list before it takes the thread away.
        address != 0 && is_near(address) && sys::exists(owner.load(SeqCst))
    })
}

/// The pages around a control block that [`holds_head`] will be true of, wherever in the block the robust head is.
pub(crate) fn home(block: u64) -> (u64, u64) {
    /// More than the block of any C library.
    const BLOCK: u64 = PAGE;
    let (first, last) = (block & !(PAGE - 1), block.saturating_add(BLOCK) & !(PAGE - 1));
    (first.saturating_sub(PAGE), last.saturating_add(2 * PAGE))
}

/// True if a thread's control block may lie on this page or a neighbour: the robust head is inside it.
pub(crate) fn holds_head(control: &Control, page: u64) -> bool {
    any_head(control, |head| {
        let home = head & !(PAGE - 1);
        page.saturating_add(PAGE) >= home && page <= home.saturating_add(PAGE)
    })
}

/// True if a robust list has its head, an entry or its pending entry in `start..end`. Frozen pages of the list cannot
/// be read, and then the answer is yes.
pub(crate) fn lists_enter(control: &Control, pid: u32, start: u64, end: u64) -> bool {
    any_head(control, |head| list_enters(pid, head, start, end))
}

fn list_enters(pid: u32, head: u64, start: u64, end: u64) -> bool {
    let near = |address: u64| address.saturating_add(MUTEX) >= start && address < end.saturating_add(MUTEX);
    let inside = |address: u64, len: u64| address.saturating_add(len) > start && address < end;
    if inside(head, 24) {
        return true;
    }
    let mut raw = [0_u8; 24];
    if !sys::read_own(pid, head, &mut raw) {
        // The thread is gone and its control block unmapped: it has no list any more.
        return false;
    }
    let word = |index: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&raw[index * 8..index * 8 + 8]);
        u64::from_le_bytes(bytes)
    };
    // The lowest bit of an entry says that it is a PI futex.
    let (mut next, offset, pending) = (word(0) & !1, word(1), word(2) & !1);
    if pending != 0 && (near(pending) || near(pending.wrapping_add(offset))) {
        return true;
    }
    for _ in 0..ENTRIES_MAX {
        if next == 0 || next == head {
            return false;
        }
        if near(next) || near(next.wrapping_add(offset)) {
            return true;
        }
        let mut raw = [0_u8; 8];
        if !sys::read_own(pid, next, &mut raw) {
            return false;
        }
        next = u64::from_le_bytes(raw) & !1;
    }
    // Too long to be judged.
    true
}
