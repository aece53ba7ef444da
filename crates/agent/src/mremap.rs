//! mremap on a managed range.
//!
//! What was merged consists of many mappings, of the store's files among them. The kernel takes one mapping, and would
//! grow a file's over the store's neighbouring pages. So a range moves mapping by mapping, to a place that is reserved
//! first, and merged pages move as they are: a private mapping shows the same wherever it lies. Their marks go with
//! them. Only what is new must not be the store's: the last mapping grows if it is anonymous, or else anonymous memory
//! with its properties is put behind it.
//!
//! So nothing is un-merged, which would cost a copy of everything and a mapping for each batch. There are two
//! exceptions: after DONTUNMAP the old place must read as zeros, and a file's mapping would show the store there; and a
//! table of ranges without room could not say where the pages have gone.
//!
//! What if a move fails half-way, for want of memory or of mappings? What has moved goes back. Its old place may be
//! somebody else's by then, since nobody keeps other threads from mapping memory there: then it stays where it is, as
//! half of the kernel's own moves of several mappings do.

use abi::mark::Keep;

use crate::ask::{release, unmerge};
use crate::calls::{Registers, apply, disown_holes, gated, publish, span};
use crate::elf::{Line, for_each_mapping};
use crate::scope;
use crate::state::STATE;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, PAGE};
use crate::sys::{
    MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_NONE, PROT_READ, PROT_WRITE, errno, failed, nr, page_up, sys,
};
use crate::table::Locked;

const TRIES: u32 = 4;

/// What a call asks for. Lengths are whole pages.
#[derive(Clone, Copy)]
struct Wanted {
    start: u64,
    end: u64,
    new_len: u64,
    may_move: bool,
    fixed: bool,
    /// Leave the old place mapped (DONTUNMAP).
    keep: bool,
    /// The place that the program named, or a hint.
    place: u64,
}

impl Wanted {
    /// `None` if the kernel refuses it whatever lies there (check_mremap_params in mm/mremap.c).
    fn of(call: &Registers, start: u64, end: u64) -> Option<Self> {
        const ALL: u64 = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
        let has = |flag: u64| call.r10 & flag != 0;
        let (may_move, fixed, keep) = (has(MREMAP_MAYMOVE), has(MREMAP_FIXED), has(MREMAP_DONTUNMAP));
        // Says that the length is none, or too large.
        span(0, call.rdx)?;
        let new_len = page_up(call.rdx);
        let placed = fixed || keep;
        let place = if placed { call.r8 } else { 0 };
        let apart = place.checked_add(new_len).is_some_and(|stop| stop <= start || end <= place);
        let possible = may_move && span(place, call.rdx).is_some() && apart && (!keep || new_len == end - start);
        let refused = call.r10 & !ALL != 0 || placed && !possible;
        (!refused).then_some(Self { start, end, new_len, may_move, fixed, keep, place })
    }

    fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Bytes that are new.
    fn growth(&self) -> u64 {
        self.new_len.saturating_sub(self.len())
    }

    /// End of what is there before and after.
    fn common_end(&self) -> u64 {
        self.start + self.len().min(self.new_len)
    }
}

/// The mappings of a range, looked at together.
struct Survey {
    count: usize,
    /// There is no hole.
    covered: bool,
    /// Every mapping is anonymous and private, or the store's.
    ours: bool,
    /// All have the same protection: so the program knows them as one.
    alike: bool,
    /// The last one, from the range's start on at the earliest.
    last: Line,
}

/// The gated call.
pub(crate) fn mremap(call: &Registers) -> i64 {
    let target = if call.r10 & MREMAP_FIXED != 0 { span(call.r8, call.rdx) } else { None };
    let touched = |range: Option<(u64, u64)>| range.filter(|(start, end)| STATE.table.overlaps(*start, *end));
    let source = span(call.rdi, call.rsi);
    let Some((start, end)) = touched(source) else {
        let Some((from, to)) = touched(target) else { return scope::past(call, [source, target]) };
        return gated(|locked| {
            STATE.layout_changes();
            locked.prepare_to_disown(from, to);
            let result = call.raw();
            if !failed(result) {
                locked.disown(from, to);
                publish();
            } else if STATE.table.next_merged(from, to).is_some() {
                disown_holes(locked, from, to);
            }
            result
        });
    };
    let Some(wanted) = Wanted::of(call, start, end) else { return -errno::EINVAL };
    let merged = || STATE.table.next_merged(start, end).is_some();
    let (mut plain, mut untracked) = (wanted.keep, false);
    for _ in 0..TRIES {
        if plain && merged() && !unmerge(start, end) {
            return -errno::ENOMEM;
        }
        if untracked {
            release(start, end);
        }
        let done = gated(|locked| {
            // Other threads may have had pages merged meanwhile.
            if plain && merged() {
                return Err(Needs::Plain);
            }
            STATE.layout_changes();
            let result = remap(call, &wanted, (merged(), untracked), locked);
            publish();
            result
        });
        match done {
            Ok(result) => return result,
            Err(Needs::Plain) => plain = true,
            Err(Needs::Untracked) => untracked = true,
        }
    }
    -errno::ENOMEM
}

/// What a range has to be before it can be moved.
enum Needs {
    /// Without merged pages.
    Plain,
    /// Registered with no userfaultfd.
    Untracked,
}

/// Inside the gate.
fn remap(
    call: &Registers,
    wanted: &Wanted,
    (merged, untracked): (bool, bool),
    locked: &Locked<'_>,
) -> Result<i64, Needs> {
    let &Wanted { start, end, new_len, .. } = wanted;
    if !wanted.fixed && !wanted.keep && wanted.growth() == 0 {
        // The kernel unmaps the tail, whatever the rest consists of.
        locked.prepare_to_disown(start + new_len, end);
        let result = call.raw();
        if !failed(result) && new_len < wanted.len() {
            locked.disown(start + new_len, end);
        }
        return Ok(result);
    }
    let survey = survey(start, end);
    let resized_or_moved_by_the_kernel = !wanted.fixed || wanted.growth() != 0;
    if merged && (!survey.covered || !survey.alike) && resized_or_moved_by_the_kernel && survey.count != 0 {
        // More than the program knows as one mapping.
        return Ok(-errno::EFAULT);
    }
    if !survey.covered || !survey.ours || !survey.alike && !merged || survey.count == 1 && !merged {
        // The kernel's own answer is the right one, also about a part of its own file mappings.
        if merged {
            return Err(Needs::Plain);
        }
        // It moves the pieces of several mappings one by one (6.17) and gives up half-way at one that is registered for
        // tracking.
        if survey.count > 1 && wanted.fixed && wanted.growth() == 0 && !untracked {
            return Err(Needs::Untracked);
        }
        if wanted.may_move {
            locked.prepare_to_move(start, end, new_len / PAGE);
        }
        let result = call.raw();
        if !failed(result) {
            settle(wanted, result as u64, locked);
        }
        return Ok(result);
    }
    if !wanted.fixed && !wanted.keep {
        if grow_in_place(wanted, &survey.last) {
            settle(wanted, start, locked);
            return Ok(start as i64);
        }
        if !wanted.may_move {
            return Ok(-errno::ENOMEM);
        }
    }
    move_away(wanted, survey.count, merged, locked).ok_or(Needs::Plain)
}

/// Looks at the mappings of a range. What cannot be read counts as not covered.
fn survey(start: u64, end: u64) -> Survey {
    let mut survey = Survey { count: 0, covered: false, ours: true, alike: true, last: Line::default() };
    let mut at = start;
    for_each_mapping(|line| {
        if line.end <= start || line.start >= end {
            return;
        }
        let line = Line { start: line.start.max(start), ..line };
        let prot = |line: &Line| (line.readable, line.writable, line.executable);
        survey.alike &= survey.count == 0 || prot(&line) == prot(&survey.last);
        survey.ours &= !line.shared && (line.inode == 0 || is_merged(line.start, line.end.min(end)));
        if line.start == at {
            at = line.end.min(end);
        }
        survey.count += 1;
        survey.last = line;
    });
    survey.covered = at == end;
    survey
}

/// True if every page is merged: a mapping of a file that the program did not make.
fn is_merged(start: u64, end: u64) -> bool {
    let mut at = start;
    while at < end {
        match STATE.table.next_merged(at, end) {
            Some(piece) if piece.start == at => at = piece.end,
            _ => return false,
        }
    }
    true
}

/// Properties for what grows behind a merged page.
fn keep_of(wanted: &Wanted) -> Keep {
    STATE.table.mark(wanted.end - PAGE).keep().unwrap_or_default()
}

/// Maps what is new at `place`, behind a mapping of the store.
fn map_new(wanted: &Wanted, place: u64, how: u64) -> Result<(), i64> {
    let keep = keep_of(wanted);
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | how | if keep.has(Keep::NORESERVE) { MAP_NORESERVE } else { 0 };
    // SAFETY: takes only what is free, or a part of the place that was reserved for it.
    let at = unsafe { sys::mmap(place, wanted.growth(), keep.prot().into(), flags, -1, 0) }?;
    if at != place {
        // SAFETY: mapped just now, in the wrong place.
        unsafe { sys!(nr::MUNMAP, at, wanted.growth()) };
        return Err(errno::ENOMEM);
    }
    apply(place, wanted.growth(), keep);
    Ok(())
}

fn grow_in_place(wanted: &Wanted, last: &Line) -> bool {
    if last.end != wanted.end {
        return false;
    }
    if last.inode != 0 {
        return map_new(wanted, wanted.end, MAP_FIXED_NOREPLACE).is_ok();
    }
    let len = last.end - last.start;
    // SAFETY: the program grows its own range, of which this is the end.
    !failed(unsafe { sys!(nr::MREMAP, last.start, len, len + wanted.growth(), 0, 0) })
}

/// Moves everything to another place. `None` if there is no room for the marks of merged pages.
fn move_away(wanted: &Wanted, count: usize, merged: bool, locked: &Locked<'_>) -> Option<i64> {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | if wanted.fixed { MAP_FIXED } else { 0 };
    // SAFETY: a free place, or the one that the program named for being replaced.
    let target = match unsafe { sys::mmap(wanted.place, wanted.new_len, PROT_NONE, flags, -1, 0) } {
        Ok(target) => target,
        Err(error) => return Some(-error),
    };
    let Some(pieces) = Pieces::read(wanted, count) else {
        // SAFETY: mapped just now; nothing has moved there.
        unsafe { sys!(nr::MUNMAP, target, wanted.new_len) };
        return Some(-errno::ENOMEM);
    };
    if wanted.fixed {
        locked.disown(target, target + wanted.new_len);
    }
    // Before anything has moved, while there is a way back. Nobody looks at marks before this call is over.
    if !carry(wanted, target, locked, |start, end| locked.adopt(start, end)) && merged {
        if !wanted.fixed {
            // SAFETY: as above. A place that the program named is kept for the next try.
            unsafe { sys!(nr::MUNMAP, target, wanted.new_len) };
        }
        return None;
    }
    if !wanted.keep {
        locked.prepare_to_disown(wanted.start, wanted.end);
    }
    if wanted.common_end() < wanted.end {
        // SAFETY: the program shrinks its own range while moving it.
        unsafe { sys!(nr::MUNMAP, wanted.common_end(), wanted.end - wanted.common_end()) };
    }
    let mut moved = 0;
    let error = loop {
        let Some(piece) = pieces.get(moved) else { break 0 };
        let error = move_piece(wanted, piece, target);
        if error != 0 {
            break error;
        }
        moved += 1;
    };
    if error == 0 {
        if !wanted.keep {
            locked.disown(wanted.start, wanted.end);
        }
        return Some(target as i64);
    }
    for index in 0..pieces.count {
        let Some(piece) = pieces.get(index) else { break };
        let at = target + (piece.start - wanted.start);
        let (stop, old) = (at + (piece.end - piece.start), (piece.start, piece.end));
        if index < moved && !move_back(piece, at, wanted.keep) {
            locked.disown(old.0, old.1);
            continue;
        }
        if index == moved {
            give_up(at, stop);
        } else if index > moved {
            // SAFETY: this part of the reservation is still empty.
            unsafe { sys!(nr::MUNMAP, at, stop - at) };
        }
        locked.disown(at, stop);
    }
    if wanted.growth() > 0 {
        // The end of the reservation: what is new comes last, and goes with the last mapping.
        give_up(target + wanted.len(), target + wanted.new_len);
        locked.disown(target + wanted.len(), target + wanted.new_len);
    }
    Some(-error)
}

/// Unmaps a part of the reservation that a move has failed at. The kernel may have unmapped it by then, and so has a
/// mapping that went home: another thread's mapping may lie there, which is to stay.
fn give_up(start: u64, end: u64) {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE;
    // SAFETY: takes only what is free.
    let free = unsafe { sys::mmap(start, end - start, PROT_NONE, flags, -1, 0) } == Ok(start);
    if free || is_reserved(start, end) {
        // SAFETY: mapped just now, or by `move_away`; nothing has moved there.
        unsafe { sys!(nr::MUNMAP, start, end - start) };
    }
}

/// True if nothing but a reservation is in a range. What cannot be read is not known to be one.
fn is_reserved(start: u64, end: u64) -> bool {
    let mut at = start;
    let read = for_each_mapping(|line| {
        let accessible = line.readable || line.writable || line.executable;
        if line.start <= at && at < line.end && line.inode == 0 && !line.shared && !accessible {
            at = line.end;
        }
    });
    read && at >= end
}

/// Moves one mapping into its part of the reservation, and what is new behind the last one. Returns an error number,
/// or 0.
fn move_piece(wanted: &Wanted, piece: &Piece, target: u64) -> i64 {
    let at = target + (piece.start - wanted.start);
    let len = piece.end - piece.start;
    let growth = if piece.end == wanted.end { wanted.growth() } else { 0 };
    let flags = MREMAP_MAYMOVE | MREMAP_FIXED | if wanted.keep { MREMAP_DONTUNMAP } else { 0 };
    let new_len = if piece.of_file { len } else { len + growth };
    // SAFETY: the program moves its own range; the place was reserved for it.
    let moved = unsafe { sys!(nr::MREMAP, piece.start, len, new_len, flags, at) };
    if failed(moved) {
        return -moved;
    }
    if growth > 0 && piece.of_file {
        // The piece before went, so there was memory; without it the program is told so and keeps what it had.
        return match map_new(wanted, at + len, MAP_FIXED) {
            Ok(()) => 0,
            Err(error) if move_back(piece, at, false) => error,
            Err(_) => 0,
        };
    }
    0
}

/// Moves a mapping home, if nobody has taken its place.
fn move_back(piece: &Piece, from: u64, kept: bool) -> bool {
    let len = piece.end - piece.start;
    if !kept {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE;
        // SAFETY: takes only what is free.
        if unsafe { sys::mmap(piece.start, len, PROT_NONE, flags, -1, 0) } != Ok(piece.start) {
            return false;
        }
    }
    // SAFETY: over the reservation just made, or the emptied mapping that the pages came from.
    !failed(unsafe { sys!(nr::MREMAP, from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, piece.start) })
}

/// After a call that the kernel did: the marks of what moved, and management of what is new.
fn settle(wanted: &Wanted, moved: u64, locked: &Locked<'_>) {
    if wanted.fixed {
        locked.disown(moved, moved + wanted.new_len);
    }
    if moved == wanted.start {
        if wanted.growth() > 0 && STATE.table.overlaps(wanted.end - PAGE, wanted.end) {
            locked.extend(wanted.end, wanted.end + wanted.growth());
        }
        return;
    }
    // If there is no room, what has moved is simply not managed any more.
    carry(wanted, moved, locked, |start, end| locked.adopt_prepared(start, end));
    if !wanted.keep {
        locked.disown(wanted.start, wanted.end);
    }
}

/// Puts under management what was so before it moved to `target`, with its marks; as the kernel's mergeable flag moves
/// and grows with a mapping. All or nothing: `false` if there is no room. `adopt`: [`Locked::adopt`] before anything has
/// moved, [`Locked::adopt_prepared`] afterwards, when what would be mapped could lie in the place that was given up.
fn carry(wanted: &Wanted, target: u64, locked: &Locked<'_>, adopt: impl Fn(u64, u64) -> bool) -> bool {
    let stop = wanted.common_end();
    let there = |address: u64| target + (address - wanted.start);
    let mut at = wanted.start;
    while let Some((from, mut to)) = STATE.table.next_managed(at, stop) {
        // One row for what lies side by side, however many there were.
        while let Some((_, end)) = STATE.table.next_managed(to, stop).filter(|(next, _)| *next == to) {
            to = end;
        }
        let grown = if to == wanted.end { wanted.growth() } else { 0 };
        if !adopt(there(from), there(to) + grown) {
            locked.disown(target, target + wanted.new_len);
            return false;
        }
        for page in (from..to).step_by(PAGE as usize) {
            let mark = STATE.table.mark(page);
            if !mark.is_plain() {
                STATE.table.set(there(page), there(page) + PAGE, mark);
            }
        }
        at = to;
    }
    true
}

/// A mapping to be moved.
#[derive(Clone, Copy)]
#[repr(C)]
struct Piece {
    start: u64,
    end: u64,
    of_file: bool,
}

/// All of them, in memory of their own: there may be as many as a process can have, and a thread's stack may be small.
/// It is not written down as the agent's: it is gone before the gate opens, and so before anything can be frozen.
struct Pieces {
    memory: u64,
    size: u64,
    count: usize,
}

impl Pieces {
    /// `None` if there is no memory, or if not all of them could be read: whoever has no descriptor left, or whose other
    /// thread closes all of them, moves nothing. `most` have been counted before; there are no more, since the gate keeps
    /// them.
    fn read(wanted: &Wanted, most: usize) -> Option<Self> {
        let size = page_up((most.max(1) * size_of::<Piece>()) as u64);
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        // SAFETY: the kernel chooses a place where nothing is.
        let memory = unsafe { sys::mmap(0, size, PROT_READ | PROT_WRITE, flags, -1, 0) }.ok()?;
        let mut pieces = Self { memory, size, count: 0 };
        let stop = wanted.common_end();
        let mut at = wanted.start;
        for_each_mapping(|line| {
            if line.end > wanted.start && line.start < stop && pieces.count < most {
                let (start, end) = (line.start.max(wanted.start), line.end.min(stop));
                if start == at {
                    at = end;
                }
                // SAFETY: inside the memory allocated above, which has room for `most`.
                unsafe { pieces.address().add(pieces.count).write(Piece { start, end, of_file: line.inode != 0 }) };
                pieces.count += 1;
            }
        });
        (at == stop).then_some(pieces)
    }

    fn address(&self) -> *mut Piece {
        self.memory as *mut Piece
    }

    fn get(&self, index: usize) -> Option<&Piece> {
        // SAFETY: written by `read`, and not changed since.
        (index < self.count).then(|| unsafe { &*self.address().add(index) })
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        // SAFETY: nothing of it is lent any more.
        unsafe { sys!(nr::MUNMAP, self.memory, self.size) };
    }
}
