//! Giving pages back without a helper: in a child of fork that has inherited merged pages and whose helper does not come.
//!
//! Broker gone, filters of its own, a limit of address space: such a child could not load code any more (`scope.rs`), nor
//! could it lock memory. If nobody else uses its memory its only thread copies the pages itself. Who else could?
//!
//! * Another thread: then nothing is done. There is no way to keep it from writing between the copy and the exchange.
//! * A helper: a copy of the memory has none until it takes one in, and once that one has moved pages nobody but it may
//!   give them back. One that leaves before that (the broker dies while they introduce themselves) has touched nothing.
//! * A process that the program made with CLONE_VM, or the other way round: the gate sees the clone, and from then on
//!   nothing is done ([`is_shared`]). A vfork child's parent waits, but it could be killed: nothing is done in there.
//! * The kernel, for a read that the parent began before the fork: that goes into the parent's pages.
//! * A debugger: it can see zeros for the moment between the two steps, and what it writes in that moment is lost.
//!
//! What if the process is killed in between? Its memory goes with it. What if a signal comes? They are blocked.

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use abi::mark::{Keep, Mark};

use crate::calls::{apply, for_merged, gated};
use crate::state::STATE;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, nr, sys};
use crate::table::Piece;
use crate::{scope, spawn};

/// Bytes that are copied at a time.
const CHUNK: u64 = 64 * sys::PAGE;

/// Not 0 in a copy of memory made by fork that nobody has come to share.
static COPIED: AtomicU32 = AtomicU32::new(0);

/// In a copy made by fork.
pub(crate) fn is_copied() {
    COPIED.store(1, SeqCst);
}

/// A helper that moves pages, or a process that the program makes, has this memory too.
pub(crate) fn is_shared() {
    COPIED.store(0, SeqCst);
}

/// Gives every merged page of a range its own copy back. `false` if it could not be done: then those that are left stay
/// as they are.
pub(crate) fn unmerge(start: u64, end: u64) -> bool {
    if STATE.table.next_merged(start, end).is_none() {
        return true;
    }
    if COPIED.load(SeqCst) == 0 || !scope::is_own() || spawn::status_number(b"\nThreads:") != Some(1) {
        return false;
    }
    let Some(chunk) = sys::allocate(CHUNK) else { return false };
    gated(|_| {
        STATE.layout_changes();
        for_merged(start, end, |piece, keep| {
            if copy(piece, keep, chunk) {
                STATE.table.set(piece.start, piece.end, Mark::PLAIN);
            }
        });
    });
    // SAFETY: nobody but this thread knew of it.
    unsafe { sys::free(chunk, CHUNK) };
    STATE.table.next_merged(start, end).is_none()
}

/// Piece by piece, so that a failure (too many mappings) leaves what is not yet copied as it was.
fn copy(piece: Piece, keep: Keep, chunk: u64) -> bool {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | if keep.has(Keep::NORESERVE) { MAP_NORESERVE } else { 0 };
    let mut at = piece.start;
    while at < piece.end {
        let len = CHUNK.min(piece.end - at);
        // SAFETY: merged pages of this program, which may have become unreadable. They are replaced below.
        if unsafe { sys!(nr::MPROTECT, at, len, PROT_READ) } != 0 {
            break;
        }
        // SAFETY: readable now, and a buffer of that size that nobody else has.
        unsafe { core::ptr::copy_nonoverlapping(at as *const u8, chunk as *mut u8, len as usize) };
        // SAFETY: a range of merged pages, whose content is in the buffer; nobody else runs in this memory.
        if unsafe { sys::mmap(at, len, PROT_READ | PROT_WRITE, flags, -1, 0) } != Ok(at) {
            break;
        }
        // SAFETY: fresh writable memory.
        unsafe { core::ptr::copy_nonoverlapping(chunk as *const u8, at as *mut u8, len as usize) };
        STATE.table.set(at, at + len, Mark::PLAIN);
        at += len;
    }
    let done = at - piece.start;
    if done > 0 {
        apply(piece.start, done, keep);
    }
    // What was copied is writable, what could not be is only readable.
    // SAFETY: the protection that the program has given to all of it.
    let restored = unsafe { sys!(nr::MPROTECT, piece.start, piece.end - piece.start, u64::from(keep.prot())) } == 0;
    restored && at == piece.end
}
