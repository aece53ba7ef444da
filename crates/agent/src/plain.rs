//! What can only be done to plain memory: before it a range gets its own pages back.

use core::sync::atomic::Ordering::SeqCst;

use abi::control::policies;

use crate::ask::{release, unmerge};
use crate::calls::{Registers, gated, touches};
use crate::elf::for_each_mapping;
use crate::scope;
use crate::state::STATE;
use crate::sys::errno;
use crate::table::Locked;

/// How often un-merging is tried anew when other threads keep merging pages into the range.
pub(crate) const UNMERGE_TRIES: u32 = 4;

/// A call that only plain memory bears: the range gets its own copies back first. `error` is the answer if it cannot.
pub(crate) fn on_plain(call: &Registers, range: Option<(u64, u64)>, error: i64) -> i64 {
    let Some((start, end)) = touches(range) else { return scope::past(call, [range, None]) };
    once_plain(start, end, |_| call.raw()).unwrap_or(-error)
}

/// Gives a range its own pages back, and acts inside of the gate while it has them. `None` if others hold pages, or have
/// them merged again and again.
pub(crate) fn once_plain<T>(start: u64, end: u64, act: impl Fn(&Locked<'_>) -> T) -> Option<T> {
    for _ in 0..UNMERGE_TRIES {
        if !unmerge(start, end) {
            return None;
        }
        let done = while_plain(start, end, &act);
        if done.is_some() {
            return done;
        }
    }
    None
}

/// Acts inside of the gate, unless other threads have had pages merged meanwhile.
fn while_plain<T>(start: u64, end: u64, act: impl FnOnce(&Locked<'_>) -> T) -> Option<T> {
    gated(|locked| {
        STATE.table.next_merged(start, end).is_none().then(|| {
            STATE.layout_changes();
            act(locked)
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
        match while_plain(start, end, |_| collapse_pieces(call, start, end)) {
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
