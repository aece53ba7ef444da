//! The gate: a reader-writer lock between the program's mapping calls and the helper's batches.
//!
//! What if a reader...
//! * is killed inside? The writer finds its thread gone and clears the slot.
//! * forks inside? The parent holds its slot across the fork and clears it; the child has no part in this gate (its
//!   [`crate::child`] check finds that the memory is not the one the gate guards).
//! * is stopped inside? Merging waits; nothing is frozen meanwhile, since the writer gives up instead of waiting.
//! * runs a signal handler inside? Signals are blocked while a slot is held.
//!
//! What if the writer dies inside? Only the broker or the guardian opens its gate, after the pages are back.

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use abi::control::{Control, GATE_SLOTS};

use crate::sys;

const LOOK_UP_NS: u64 = 1_000_000_000;

/// A reader inside the gate.
pub(crate) struct Reader<'a> {
    control: &'a Control,
    slot: usize,
}

impl<'a> Reader<'a> {
    /// Goes in; sleeps while the helper is inside, without a time limit: every batch ends, and whoever survives a
    /// dead helper opens the gate. Looks up now and then: whoever opens it may be killed before he has woken anybody.
    pub(crate) fn enter(control: &'a Control) -> Self {
        let tid = sys::gettid();
        let start = tid as usize % GATE_SLOTS;
        let mut turns = 0;
        loop {
            if let Some(slot) = take(control, tid, start) {
                if control.gate.writer.load(SeqCst) == 0 {
                    return Self { control, slot };
                }
                control.gate.slots[slot].store(0, SeqCst);
                control.counters.gate_waits.fetch_add(1, SeqCst);
                sys::futex_wait(&control.gate.writer, 1, LOOK_UP_NS);
            } else {
                turns += 1;
                sys::let_others_run(turns);
            }
        }
    }

    /// Stays inside while this value is gone: the fork stub leaves by [`leave_by_thread`].
    pub(crate) fn keep(self) {
        let _kept = core::mem::ManuallyDrop::new(self);
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.control.gate.slots[self.slot].store(0, SeqCst);
    }
}

fn take(control: &Control, tid: u32, start: usize) -> Option<usize> {
    (0..GATE_SLOTS)
        .map(|offset| (start + offset) % GATE_SLOTS)
        .find(|slot| control.gate.slots[*slot].compare_exchange(0, tid, SeqCst, SeqCst).is_ok())
}

/// Lets the calling thread out that went in by an earlier [`Reader::keep`].
pub(crate) fn leave_by_thread(control: &Control) {
    let tid = sys::gettid();
    for slot in &control.gate.slots {
        if slot.compare_exchange(tid, 0, SeqCst, SeqCst).is_ok() {
            return;
        }
    }
}

/// Takes the gate for writing, or gives up at once if a living reader is inside.
pub(crate) fn close(control: &Control) -> bool {
    control.gate.writer.store(1, SeqCst);
    for slot in &control.gate.slots {
        let tid = slot.load(SeqCst);
        if tid == 0 {
            continue;
        }
        if sys::exists(tid) {
            open(control);
            return false;
        }
        // Killed inside. If the id was given to a new reader meanwhile, that one is alive and was not seen as gone.
        let _ = slot.compare_exchange(tid, 0, SeqCst, SeqCst);
    }
    true
}

/// Waits until nobody is inside of the gate of a helper before this one: a call there was looked at before this helper knew
/// anything, and the next gate does not hold it up. `false` if somebody stays for too long.
pub(crate) fn wait_until_left(control: &Control) -> bool {
    const LEFT_WITHIN_NS: u64 = 10_000_000_000;
    let until = sys::monotonic().saturating_add(LEFT_WITHIN_NS);
    let lives = |slot: &AtomicU32| Some(slot.load(SeqCst)).is_some_and(|tid| tid != 0 && sys::exists(tid));
    while control.gate.slots.iter().any(lives) {
        if sys::monotonic() > until {
            return false;
        }
        sys::sleep_ns(1_000_000);
    }
    true
}

/// Does something small with the gate closed. `None` if readers are inside for too long.
pub(crate) fn while_closed<T>(control: &'static Control, act: impl FnOnce(&'static Control) -> T) -> Option<T> {
    const TRIES: u32 = 20;
    const PAUSE_NS: u64 = 500_000;
    for _ in 0..TRIES {
        if close(control) {
            let done = act(control);
            open(control);
            return Some(done);
        }
        sys::sleep_ns(PAUSE_NS);
    }
    None
}

/// Opens the gate and wakes every reader that waits.
pub(crate) fn open(control: &Control) {
    control.gate.writer.store(0, SeqCst);
    sys::futex_wake(&control.gate.writer);
}
