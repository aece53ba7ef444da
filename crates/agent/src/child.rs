//! Which address space is this? A fork copies the agent's memory, but not its helper.
//!
//! One page is advised WIPEONFORK: it reads 1 in the address space that the gate was set up for and in everything that
//! shares it (threads, vfork children), and 0 in every copy. So no agent code needs to run in a child of fork, raw or
//! not: its first call through the gate finds the page empty and starts afresh, with its own marks and no helper.

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use abi::mark::Keep;

use crate::calls::USER_END;
use crate::spawn;
use crate::state::STATE;
use crate::sys::{self, advice, nr, sys};

/// Sets the page up. `false` if the kernel has no WIPEONFORK; then nothing is managed.
pub(crate) fn set_up() -> bool {
    let Some(address) = sys::allocate(sys::PAGE) else { return false };
    // SAFETY: the page was just mapped for this purpose.
    if unsafe { sys!(nr::MADVISE, address, sys::PAGE, advice::WIPEONFORK) } != 0 {
        return false;
    }
    STATE.sentinel.store(address, SeqCst);
    word().is_some_and(|word| {
        word.store(1, SeqCst);
        true
    })
}

fn word() -> Option<&'static AtomicU32> {
    let address = STATE.sentinel.load(SeqCst);
    // SAFETY: the page was mapped by `set_up`, is never unmapped and only ever used as this word.
    (address != 0).then(|| unsafe { &*(address as *const AtomicU32) })
}

/// Merged memory that the program does not hand on (MADV_DONTFORK) is not in its child: there is room that the kernel gives
/// to whatever is mapped next, and the marks of that are another's.
fn forget_what_was_not_copied() {
    let locked = STATE.table.lock();
    let mut at = 0;
    while let Some(piece) = STATE.table.next_merged(at, USER_END) {
        if piece.mark.keep().is_some_and(|keep| keep.has(Keep::DONTFORK)) {
            locked.disown(piece.start, piece.end);
        }
        at = piece.end;
    }
}

/// To be called at every entry of the gate, before anything of the gate is used.
pub(crate) fn notice() {
    let Some(word) = word() else { return };
    if word.load(SeqCst) == 1 {
        return;
    }
    // A copy. The first thread tidies up, others wait for it. A handler of its own must not.
    let mask = sys::block_signals();
    if word.compare_exchange(0, 2, SeqCst, SeqCst).is_ok() {
        STATE.forget_helper();
        forget_what_was_not_copied();
        // The parent's may have been another thread's than the one that is the main thread here.
        spawn::learn_tid_word();
        word.store(1, SeqCst);
    } else {
        let mut turns = 0;
        while word.load(SeqCst) == 2 {
            turns += 1;
            sys::let_others_run(turns);
        }
    }
    sys::restore_signals(mask);
}
