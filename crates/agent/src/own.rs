//! The agent's own memory, which must never be frozen: whoever froze it would wait for himself.
//!
//! A program may hand over a range that spans what the agent has allocated, or in whose holes the agent will allocate.
//! So every allocation is written down, and its pages are excluded in whatever range they lie.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use abi::mark::Mark;

use crate::state::STATE;

/// Allocations that can be written down: four for each helper, one for each array of marks, and a few.
const PIECES_MAX: usize = 512;

struct Piece {
    start: AtomicU64,
    /// 0 for none.
    end: AtomicU64,
}

// In the page of the other data that every process changes.
#[unsafe(link_section = ".data")]
static PIECES: [Piece; PIECES_MAX] = [const { Piece { start: AtomicU64::new(0), end: AtomicU64::new(0) } }; PIECES_MAX];
/// Pieces from this one on were never used.
#[unsafe(link_section = ".data")]
static USED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    // The linker's names for the first byte of the image and the byte behind its last.
    #[link_name = "__ehdr_start"]
    static IMAGE_START: u8;
    #[link_name = "_end"]
    static IMAGE_END: u8;
}

/// Writes an allocation down, and excludes it where it lies in a managed range. `false` if there is no room: then it
/// must not be used.
pub(crate) fn record(start: u64, end: u64) -> bool {
    let free = PIECES.iter().position(|piece| piece.start.compare_exchange(0, start, SeqCst, SeqCst).is_ok());
    let Some(index) = free else { return false };
    PIECES[index].end.store(end, SeqCst);
    USED.fetch_max(index as u32 + 1, SeqCst);
    STATE.table.set(start, end, Mark::EXCLUDED);
    true
}

/// Strikes an allocation that was given back.
pub(crate) fn forget(start: u64) {
    for piece in &PIECES[..USED.load(SeqCst) as usize] {
        if piece.start.load(SeqCst) == start {
            piece.end.store(0, SeqCst);
            piece.start.store(0, SeqCst);
        }
    }
}

/// The image.
pub(crate) fn image() -> (u64, u64) {
    (crate::sys::page_down(&raw const IMAGE_START as u64), crate::sys::page_up(&raw const IMAGE_END as u64))
}

/// Excludes the agent's own pages in a range that was just put under management.
pub(crate) fn exclude(start: u64, end: u64) {
    let pieces = PIECES[..USED.load(SeqCst) as usize].iter();
    let pieces = pieces.map(|piece| (piece.start.load(SeqCst), piece.end.load(SeqCst)));
    for (from, to) in pieces.chain([image()]) {
        let (from, to) = (from.max(start), to.min(end));
        if from < to {
            STATE.table.set(from, to, Mark::EXCLUDED);
        }
    }
}
