//! mremap on a managed range.
//!
//! A merged run is a mapping of a file: growing it would show, and then overrun, the store's neighbouring pages. And a
//! range that was merged consists of several mappings, which mremap refuses. So the range gets its own copies back
//! first; where its mappings do not join again, it is moved piece by piece.

use crate::calls::{Registers, gated, publish, span, unmerge};
use crate::elf::{Line, for_each_mapping};
use crate::state::STATE;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, PAGE};
use crate::sys::{MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_NONE, errno, failed, nr, page_up, sys};

const TRIES: u32 = 4;
/// Mappings of one range that are moved one by one; more are refused as the kernel would refuse two.
const PIECES_MAX: usize = 64;

/// The gated call.
pub(crate) fn mremap(call: &Registers) -> i64 {
    let old = span(call.rdi, call.rsi);
    let new_len = page_up(call.rdx);
    let fixed = call.r10 & MREMAP_FIXED != 0;
    let target = if fixed { span(call.r8, call.rdx) } else { None };
    let touched = |range: Option<(u64, u64)>| range.filter(|(start, end)| STATE.table.overlaps(*start, *end));
    let Some((start, end)) = old else { return call.raw() };
    if touched(old).is_none() && touched(target).is_none() {
        return call.raw();
    }
    for _ in 0..TRIES {
        if STATE.table.next_merged(start, end).is_some() && !unmerge(start, end) {
            return -errno::ENOMEM;
        }
        let done = gated(|locked| {
            if STATE.table.next_merged(start, end).is_some() {
                return None;
            }
            STATE.layout_changes();
            // Never the kernel first: it moves the pieces of several mappings one by one (6.17) and gives up half-way at
            // one that is registered for tracking.
            let result = piecewise(call, start, end, new_len).unwrap_or_else(|| call.raw());
            if !failed(result) {
                let moved = result as u64;
                let managed = touched(old).is_some();
                if let Some((from, to)) = target {
                    locked.disown(from, to);
                }
                if moved != start && call.r10 & MREMAP_DONTUNMAP == 0 {
                    locked.disown(start, end);
                } else if moved == start && start + new_len < end {
                    locked.disown(start + new_len, end);
                }
                // The kernel's mergeable flag moves and grows with the mapping. If the table is full, what has moved
                // is simply not managed any more.
                if managed && moved != start {
                    let _ = locked.adopt(moved, moved + new_len);
                }
                publish();
            }
            Some(result)
        });
        if let Some(result) = done {
            return result;
        }
    }
    -errno::ENOMEM
}

/// What the kernel does with a range of one mapping, for a range of several. `None` if it is one, or if not all of it
/// is anonymous memory: then the kernel's own answer is the right one.
fn piecewise(call: &Registers, start: u64, end: u64, new_len: u64) -> Option<i64> {
    let mut pieces = [Line::default(); PIECES_MAX];
    let mut count = 0;
    let mut whole = true;
    for_each_mapping(|line| {
        if line.end > start && line.start < end {
            match pieces.get_mut(count) {
                Some(piece) => *piece = Line { start: line.start.max(start), end: line.end.min(end), ..line },
                None => whole = false,
            }
            count += 1;
        }
    });
    let pieces = &pieces[..count.min(PIECES_MAX)];
    let covered = pieces.iter().fold(start, |at, piece| if piece.start == at { piece.end } else { at });
    if !whole {
        // realloc copies then.
        return Some(-errno::ENOMEM);
    }
    if pieces.len() == 1 || covered != end || pieces.iter().any(|piece| piece.inode != 0) {
        return None;
    }
    Some(move_pieces(call, pieces, start, end, new_len))
}

fn move_pieces(call: &Registers, pieces: &[Line], start: u64, end: u64, new_len: u64) -> i64 {
    let (may_move, fixed, keep) =
        (call.r10 & MREMAP_MAYMOVE != 0, call.r10 & MREMAP_FIXED != 0, call.r10 & MREMAP_DONTUNMAP != 0);
    let len = end - start;
    if new_len <= len && !fixed && !keep {
        if new_len < len {
            // SAFETY: the program shrinks its own range.
            unsafe { sys!(nr::MUNMAP, start + new_len, len - new_len) };
        }
        return start as i64;
    }
    // A managed range is readable and writable, so that is what growth gets.
    let prot = sys::PROT_READ | sys::PROT_WRITE;
    if !fixed && !keep && new_len > len {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
        // SAFETY: takes only what is free.
        match unsafe { sys::mmap(end, new_len - len, prot, flags, -1, 0) } {
            Ok(at) if at == end => return start as i64,
            Ok(at) => {
                // SAFETY: mapped just now, in the wrong place.
                unsafe { sys!(nr::MUNMAP, at, new_len - len) };
            }
            Err(_) => {}
        }
    }
    if !may_move {
        return -errno::ENOMEM;
    }
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | if fixed { MAP_FIXED } else { 0 };
    // SAFETY: a free place, or the one that the program named for being replaced.
    let target = match unsafe { sys::mmap(if fixed { call.r8 } else { 0 }, new_len, PROT_NONE, flags, -1, 0) } {
        Ok(target) => target,
        Err(error) => return -error,
    };
    for piece in pieces {
        let offset = piece.start - start;
        if offset >= new_len {
            // SAFETY: the program shrinks its own range while moving it.
            unsafe { sys!(nr::MUNMAP, piece.start, piece.end - piece.start) };
            continue;
        }
        let size = (piece.end - piece.start).min(new_len - offset);
        if piece.start + size < piece.end {
            // SAFETY: as above.
            unsafe { sys!(nr::MUNMAP, piece.start + size, piece.end - piece.start - size) };
        }
        let flags = MREMAP_MAYMOVE | MREMAP_FIXED | if keep { MREMAP_DONTUNMAP } else { 0 };
        // SAFETY: the program moves its own range; the target was reserved above.
        let moved = unsafe { sys!(nr::MREMAP, piece.start, size, size, flags, target + offset) };
        if failed(moved) {
            return moved;
        }
    }
    if new_len > len {
        // SAFETY: the reserved part behind what was moved.
        let grown =
            unsafe { sys::mmap(target + len, new_len - len, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) };
        if let Err(error) = grown {
            return -error;
        }
    }
    target as i64
}

const _: () = assert!(PAGE.is_power_of_two());
