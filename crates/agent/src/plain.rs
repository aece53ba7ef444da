//! Calls before which a range gets its own pages back: what they ask for cannot be had of the store's.

use core::sync::atomic::Ordering::SeqCst;

use abi::control::policies;

use crate::ask::{release, unmerge};
use crate::calls::{Registers, gated, touches};
use crate::elf::for_each_mapping;
use crate::handover::UNMERGE_TRIES;
use crate::scope;
use crate::state::STATE;
use crate::sys::errno;

/// A call that only plain memory bears: the range gets its own copies back first. `error` is the answer if it cannot.
pub(crate) fn on_plain(call: &Registers, range: Option<(u64, u64)>, error: i64) -> i64 {
    let Some((start, end)) = touches(range) else { return scope::past(call, [range, None]) };
    for _ in 0..UNMERGE_TRIES {
        if !unmerge(start, end) {
            return -error;
        }
        if let Some(result) = while_plain(start, end, || call.raw()) {
            return result;
        }
    }
    -error
}

/// Makes a call, unless other threads have had pages merged meanwhile.
fn while_plain(start: u64, end: u64, call: impl FnOnce() -> i64) -> Option<i64> {
    gated(|_| {
        STATE.table.next_merged(start, end).is_none().then(|| {
            STATE.layout_changes();
            call()
        })
    })
}

/// mbind: a mapping of the store has no policy of its own, and the nodes of its pages are everybody's. So the range gets
/// its own pages back, and the broker finds it unfit for as long as it has the policy. smaps does not show that, and the
/// file that does costs as much again: the broker is told that it has to be read in this process.
///
/// set_mempolicy_home_node changes policies that are there, and so nothing of merged memory.
pub(crate) fn mbind(call: &Registers, range: Option<(u64, u64)>) -> i64 {
    const DEFAULT: u64 = 0;
    if call.rdx != DEFAULT {
        // Before the call: whoever looks when it has been made looks for policies.
        STATE.policies.store(policies::SET, SeqCst);
        if let Some(control) = STATE.control() {
            control.policies.store(policies::SET, SeqCst);
        }
    }
    on_plain(call, range, errno::ENOMEM)
}

/// MADV_COLLAPSE: huge pages are made of plain memory only, and only where no page is protected to see the next write to it.
/// So the registration for that goes too. It comes back with the next look, perhaps before the call.
///
/// What was merged lies in pieces when it is plain again, each with pages of another origin, and the kernel makes no one
/// mapping of them. A piece without room for a huge page, of what had room before, stays as it is: there is nothing to be had
/// but time, and the answer is that of memory which has huge pages.
pub(crate) fn collapse(call: &Registers, range: Option<(u64, u64)>) -> i64 {
    let Some((start, end)) = touches(range) else { return scope::past(call, [range, None]) };
    let mut result = -errno::EAGAIN;
    for _ in 0..UNMERGE_TRIES {
        if !unmerge(start, end) {
            return -errno::EAGAIN;
        }
        release(start, end);
        match while_plain(start, end, || collapse_pieces(call, start, end)) {
            Some(refused) if refused == -errno::EINVAL => result = refused,
            Some(answer) => return answer,
            None => {}
        }
    }
    result
}

/// A stretch that the program knows as one mapping, or as several that the kernel could make one of.
#[derive(Default)]
struct Known {
    start: u64,
    end: u64,
    prot: (bool, bool, bool),
    /// A piece of it is asked for that has no room for a huge page.
    small: bool,
}

/// Whether a huge page fits into a mapping. If not, the kernel refuses whatever part of it is asked for.
const fn has_room(start: u64, end: u64) -> bool {
    const HUGE: u64 = 2 << 20;
    start.next_multiple_of(HUGE) + HUGE <= end
}

/// The call, and if something refuses it, mapping by mapping.
fn collapse_pieces(call: &Registers, start: u64, end: u64) -> i64 {
    let whole = call.raw();
    if whole != -errno::EINVAL {
        return whole;
    }
    let (mut at, mut holes, mut result) = (start, 0, 0);
    let mut known = Known::default();
    let refused = |known: &Known| known.small && !has_room(known.start, known.end);
    let read = for_each_mapping(|line| {
        let managed = STATE.table.overlaps(line.start, line.end);
        let prot = (line.readable, line.writable, line.executable);
        if line.start != known.end || prot != known.prot || line.inode != 0 && !managed {
            if refused(&known) && result == 0 {
                result = whole;
            }
            known = Known { start: line.start, prot, ..Known::default() };
        }
        // Nothing goes on with a file.
        known.end = if line.inode == 0 || managed { line.end } else { 0 };
        let (from, to) = (line.start.max(at), line.end.min(end));
        if from >= to || result != 0 {
            return;
        }
        if from > at {
            holes = -errno::ENOMEM;
        }
        at = to;
        if managed && !has_room(line.start, line.end) {
            known.small = true;
        } else {
            result = Registers { rdi: from, rsi: to - from, ..*call }.raw();
        }
    });
    match (read, result) {
        (false, _) => whole,
        (true, 0) if refused(&known) => whole,
        (true, 0) if at < end => -errno::ENOMEM,
        (true, 0) => holes,
        (true, error) => error,
    }
}
