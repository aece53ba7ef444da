//! What the program hands over and takes back: `madvise(MADV_MERGEABLE)`, its opposite, and the library's calls.
//!
//! As in the kernel both concern what is mapped, and say ENOMEM where not all of a range is. What is not mapped never
//! comes under management: whatever is mapped there later was not handed over. Neither looks at single pages of what
//! is not managed, since a range may be as long as the address space.

use core::sync::atomic::Ordering::SeqCst;

use abi::control::stop;

use crate::ask::{release, ring};
use crate::calls::{Registers, publish};
use crate::elf::for_each_mapping;
use crate::plain::once_plain;
use crate::state::STATE;
use crate::sys::{self, errno, nr, sys};
use crate::table::Locked;
use crate::{child, spawn};

/// What came of handing a range over. The numbers are the image's answer to the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Adopted {
    /// Nothing of it is managed anew: there is no helper.
    NoHelper = 0,
    /// All of it is managed.
    Whole = 1,
    /// There is no row for all of it, or no memory.
    Full = 2,
    /// What is mapped of it is managed.
    Holes = 3,
}

/// `madvise(MADV_MERGEABLE)` on whole pages.
pub(crate) fn advise_mergeable(call: &Registers, start: u64, end: u64) -> i64 {
    match mergeable(start, end) {
        Adopted::Whole => 0,
        Adopted::Holes => -errno::ENOMEM,
        Adopted::NoHelper | Adopted::Full => call.raw(),
    }
}

/// `madvise(MADV_UNMERGEABLE)` on whole pages.
pub(crate) fn advise_unmergeable(call: &Registers, start: u64, end: u64) -> i64 {
    let managed = STATE.table.overlaps(start, end);
    if managed && !unmergeable(start, end) {
        return -errno::ENOMEM;
    }
    // Parts may be the kernel's, who has the answer in any case.
    match call.raw() {
        // But not where it has no KSM.
        error if managed && error == -errno::EINVAL => look_for_holes(start, end),
        result => result,
    }
}

/// As `madvise(MADV_MERGEABLE)`, but a range that is under management whole, with a helper, is left as it is: whoever
/// merges the same range again and again does not have the broker read the layout each time.
#[must_use]
pub fn adopt_once(start: u64, end: u64) -> Adopted {
    child::notice();
    if STATE.table.covers(start, end) && STATE.control().is_some() && !STATE.is_gone() && spawn::helper_lives() {
        ring();
        return Adopted::Whole;
    }
    mergeable(start, end)
}

fn mergeable(start: u64, end: u64) -> Adopted {
    child::notice();
    // What it has registered with a userfaultfd of its own is the program's.
    let has_its_own = STATE.early_stop.load(SeqCst) & stop::USERFAULTFD != 0;
    if STATE.active.load(SeqCst) == 0 || has_its_own || STATE.is_gone() {
        return Adopted::NoHelper;
    }
    spawn::wait_for_burial();
    let mask = sys::block_signals();
    let locked = STATE.table.lock();
    let adopted = if spawn::start_helper() { adopt_mapped(&locked, start, end) } else { Adopted::NoHelper };
    if adopted != Adopted::NoHelper {
        STATE.layout_changes();
        publish();
        ring();
    }
    drop(locked);
    sys::restore_signals(mask);
    adopted
}

/// Gives a range its own pages back and takes it out of management. `false` if that could not be done.
#[must_use]
pub fn unmergeable(start: u64, end: u64) -> bool {
    if STATE.is_gone() {
        // Nothing is merged.
        return true;
    }
    child::notice();
    let mut at = start;
    while let Some((from, to)) = STATE.table.next_managed(at, end) {
        if !take_back(from, to) {
            return false;
        }
        at = to;
    }
    true
}

fn take_back(start: u64, end: u64) -> bool {
    let disown = |locked: &Locked<'_>| {
        locked.prepare_to_disown(start, end);
        locked.disown(start, end);
        publish();
    };
    let taken = once_plain(start, end, disown).is_some();
    if taken {
        // It may have been registered for tracking up to here; from now on nobody does that.
        release(start, end);
    }
    taken
}

/// Puts what is mapped of a range under management.
fn adopt_mapped(locked: &Locked<'_>, start: u64, end: u64) -> Adopted {
    let adopt = |from: u64, to: u64| from == to || locked.adopt(from, to);
    let answer = look_for_holes(start, end);
    if answer == 0 {
        return if adopt(start, end) { Adopted::Whole } else { Adopted::Full };
    }
    // Neighbouring mappings are one run: rows are few.
    let (mut from, mut to) = (start, start);
    let mut room = true;
    let read = for_each_mapping(|line| {
        let (next, stop) = (line.start.max(to), line.end.min(end));
        if next >= stop {
            return;
        }
        if next > to {
            room &= adopt(from, to);
            from = next;
        }
        to = stop;
    });
    room &= adopt(from, to);
    match (room, read, from == start && to == end) {
        (false, ..) => Adopted::Full,
        (true, true, true) => Adopted::Whole,
        (true, true, false) => Adopted::Holes,
        // What was not read is not managed, which nobody can see.
        (true, false, _) if answer == -errno::ENOMEM => Adopted::Holes,
        (true, false, _) => Adopted::NoHelper,
    }
}

/// The kernel's answer for a range: 0, or ENOMEM if not all of it is mapped. Without a descriptor, which a program may
/// have no room for.
fn look_for_holes(start: u64, end: u64) -> i64 {
    const MS_ASYNC: u64 = 1;
    // SAFETY: MS_ASYNC writes nothing: the kernel goes through the mappings and nothing else.
    unsafe { sys!(nr::MSYNC, start, end - start, MS_ASYNC) }
}
