//! What a thread of the program asks of its helper: its own pages back, and memory that nothing is registered of.
//!
//! One thread asks at a time. The helper may be killed at every moment, or not have come yet: whoever asks looks after it
//! while waiting, and takes another in.

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use abi::control::{Control, ask};

use crate::calls::publish;
use crate::state::STATE;
use crate::sys;
use crate::table::{Locked, Table};
use crate::{alone, scope, spawn};

/// How many helpers are asked, each of which is killed before it has answered.
pub(crate) const HELPERS: u32 = 3;

/// Wakes the helper.
pub(crate) fn ring() {
    if let Some(control) = STATE.control() {
        control.bell.fetch_add(1, SeqCst);
        sys::futex_wake(&control.bell);
    }
}

/// Gives every merged page of a range its own copy back, content kept. The helper does it, with the pages frozen: the
/// calling thread must hold neither the gate nor the table. One that is killed meanwhile is replaced; a child of fork that
/// gets no helper may do it by itself. `false` if it could not be done, above all because no helper lives: then the pages
/// stay as they are.
pub(crate) fn unmerge(start: u64, end: u64) -> bool {
    for _ in 0..HELPERS {
        if STATE.table.next_merged(start, end).is_none() {
            return true;
        }
        let Some(control) = served() else { break };
        if ask(control, start, end, u64::MAX) {
            return true;
        }
        if is_served(control) {
            return false;
        }
    }
    // It may have left before it could do anything.
    alone::unmerge(start, end)
}

/// Of a range that is not managed any more: no userfaultfd of pagefold's has it any more either, as far as the helper says
/// so in time. It may have been tracked, also where nothing was merged. After a helper that was killed the burial does it.
pub(crate) fn release(start: u64, end: u64) {
    const WITHIN_NS: u64 = 2_000_000_000;
    let tracks = |control: &&Control| control.joined.load(SeqCst) != 0 && is_served(control);
    if let Some(control) = STATE.control().filter(tracks) {
        let _ = ask(control, start, end, sys::monotonic().saturating_add(WITHIN_NS));
    }
}

/// `false` if the helper could not do it, or ended, or did not come to it until then. Signals wait: a handler that never
/// comes back, or the end of the thread, would leave the turn with somebody who lives and does not ask.
fn ask(control: &Control, start: u64, end: u64, until: u64) -> bool {
    let mask = sys::block_signals();
    let done = asked(control, start, end, until);
    sys::restore_signals(mask);
    done
}

fn asked(control: &Control, start: u64, end: u64, until: u64) -> bool {
    /// How long one may take to introduce itself. The broker may be stopped.
    const JOINED_WITHIN_NS: u64 = 5_000_000_000;
    let tid = sys::gettid();
    // A signal handler that came before they were blocked cannot, if its thread asks.
    if !take_turn(&control.ask.owner, |owner| owner != tid && sys::monotonic() <= until) {
        return false;
    }
    let joins_until = sys::monotonic().saturating_add(JOINED_WITHIN_NS);
    let in_time = |now: u64| now <= until && (control.joined.load(SeqCst) != 0 || now <= joins_until);
    let goes_on = || is_served(control) && in_time(sys::monotonic());
    control.ask.start.store(start, SeqCst);
    control.ask.end.store(end, SeqCst);
    control.ask.state.store(ask::ASKED, SeqCst);
    ring();
    let done = loop {
        match control.ask.state.load(SeqCst) {
            ask::DONE => break true,
            ask::ASKED if goes_on() => {
                sys::futex_wait(&control.ask.state, ask::ASKED, 100_000_000);
            }
            // What the helper is at it ends, or its life does.
            ask::SERVED if is_served(control) => {
                sys::futex_wait(&control.ask.state, ask::SERVED, 100_000_000);
            }
            ask::ASKED if control.ask.state.compare_exchange(ask::ASKED, ask::IDLE, SeqCst, SeqCst).is_err() => {}
            _ => break false,
        }
    };
    control.ask.state.store(ask::IDLE, SeqCst);
    end_turn(&control.ask.owner);
    done
}

/// The control area of a helper that lives. One is brought in where there was none yet, as in a child of fork, or where it
/// was killed; not where one has left by itself: the broker does not want it, or is gone. To be called with neither the
/// gate nor the table.
pub(crate) fn served() -> Option<&'static Control> {
    let served = || STATE.control().filter(|control| is_served(control));
    if let Some(control) = served() {
        return Some(control);
    }
    let has_left = STATE.control().is_some() && STATE.helper.load(SeqCst) == 0;
    if !has_left && scope::is_own() {
        bring_helper(|table| Some(table.lock()));
    }
    served()
}

/// Starts the helper, if there is none, under the table's lock; not at all if that is not to be had. True if there is one.
pub(crate) fn bring_helper(lock: impl FnOnce(&'static Table) -> Option<Locked<'static>>) -> bool {
    spawn::wait_for_burial();
    let mask = sys::block_signals();
    let brought = lock(&STATE.table).is_some_and(|_locked| {
        let up = spawn::start_helper();
        if up {
            publish();
        }
        up
    });
    sys::restore_signals(mask);
    brought
}

/// True if a helper is there.
pub(crate) fn is_served(control: &Control) -> bool {
    let helper = control.helper.load(SeqCst);
    helper != 0 && sys::exists(helper)
}

/// Waits until the calling thread is the one that asks something of the other side: `owner` holds its id then. `false` if
/// `wait_for` says of whoever asks now that he is not to be waited for.
pub(crate) fn take_turn(owner: &AtomicU32, wait_for: impl Fn(u32) -> bool) -> bool {
    const LOOK_NS: u64 = 50_000_000;
    let tid = sys::gettid();
    while let Err(other) = owner.compare_exchange(0, tid, SeqCst, SeqCst) {
        if !wait_for(other) {
            return false;
        }
        if sys::exists(other) {
            sys::futex_wait(owner, other, LOOK_NS);
        } else {
            let _ = owner.compare_exchange(other, 0, SeqCst, SeqCst);
        }
    }
    true
}

/// It has asked, and heard.
pub(crate) fn end_turn(owner: &AtomicU32) {
    owner.store(0, SeqCst);
    sys::futex_wake(owner);
}
