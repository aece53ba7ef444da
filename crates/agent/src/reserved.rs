//! Address space of the helper's own, for what it maps for a moment.
//!
//! The helper works while the program's threads do. A place of the kernel's choice could be one that the program has
//! given up and is going to map again, by its address: that is free to it, and replaces what is there. The helper would
//! then take the program's memory for what it has mapped itself, and unmap it. So places are reserved once, while the
//! program waits for its helper, and are never free from then on: one mapping replaces the other.

use abi::BATCH_MAX;

use crate::space::query;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, PAGE, PROT_NONE};
use crate::sys::{MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_READ, advice, errno, failed, nr, sys};

/// Pages of a segment that are mapped for comparing at one time.
pub(crate) const WINDOW: u32 = 256;
/// Windows that are mapped at one time.
pub(crate) const WINDOWS: usize = 4;
const WINDOW_LEN: u64 = WINDOW as u64 * PAGE;
/// Bytes of copies that wait to be put into their place: a batch's.
const COPIES: u64 = BATCH_MAX as u64 * PAGE;

/// One reserved place.
pub(crate) struct Reserved {
    start: u64,
    len: u64,
    /// Bytes of it that something is mapped over, from its start.
    used: u64,
    /// Something failed half-way, and the program was quicker than the helper: it may be the program's.
    lost: bool,
    /// The list of mappings.
    maps: i32,
}

/// Every place that a helper needs: the windows, and where copies are made.
pub(crate) struct Places {
    pub(crate) windows: [Reserved; WINDOWS],
    pub(crate) copies: Reserved,
}

impl Places {
    /// Reserves them. To be called while the program waits. `maps`: the list of mappings. `None` if there is no address
    /// space.
    pub(crate) fn reserve(maps: i32) -> Option<Self> {
        // The copies lie between pages that are never accessible, or the kernel would make one mapping of them and of
        // the program's memory next to them.
        let (copies, windows) = (PAGE, PAGE + COPIES);
        let all = windows + WINDOWS as u64 * WINDOW_LEN;
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        // SAFETY: a free place of the kernel's choice.
        let start = unsafe { sys::mmap(0, all, PROT_NONE, flags, -1, 0) }.ok()?;
        not_forked(start, all);
        let place = |offset: u64, len: u64| Reserved { start: start + offset, len, used: 0, lost: false, maps };
        crate::own::record(start, start + all).then(|| Self {
            windows: core::array::from_fn(|index| place(windows + index as u64 * WINDOW_LEN, WINDOW_LEN)),
            copies: place(copies, COPIES),
        })
    }
}

impl Reserved {
    pub(crate) fn address(&self) -> u64 {
        self.start
    }

    /// Maps the first `len` bytes of the place, as mmap(2) with MAP_FIXED does; what was mapped there before is gone.
    /// Returns where, or the error number.
    pub(crate) fn map(&mut self, len: u64, prot: u64, flags: u64, fd: i32, offset: u64) -> Result<u64, i64> {
        self.empty();
        if self.lost || len > self.len {
            return Err(errno::ENOMEM);
        }
        // SAFETY: the place is reserved for this.
        let mapped = unsafe { sys::mmap(self.start, len, prot, flags | MAP_FIXED, fd, offset) };
        match mapped {
            Ok(_) => self.used = len,
            Err(_) => self.look(len),
        }
        mapped
    }

    /// Maps pages of a file for reading, from an offset in bytes on. Returns where, or the error number.
    pub(crate) fn show(&mut self, fd: i32, offset: u64, len: u64) -> Result<u64, i64> {
        let address = self.map(len, PROT_READ, MAP_PRIVATE, fd, offset)?;
        not_forked(address, len);
        Ok(address)
    }

    /// Moves what is mapped there to `to`, over whatever is there. The place is empty afterwards. Returns an error number,
    /// or 0.
    pub(crate) fn move_to(&mut self, to: u64) -> i64 {
        let len = self.used;
        // It stays mapped, or it would be free for a moment.
        let flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
        // SAFETY: anonymous memory of the helper's; the caller answers for what lies at `to`.
        let moved = unsafe { sys!(nr::MREMAP, self.start, len, len, flags, to) };
        self.empty();
        if failed(moved) { -moved } else { 0 }
    }

    /// Takes away what is mapped there. It would count as the program's memory, in its own eyes and in the broker's.
    pub(crate) fn empty(&mut self) {
        if self.used == 0 || self.lost {
            return;
        }
        let used = core::mem::take(&mut self.used);
        if reserve(self.start, used) {
            not_forked(self.start, used);
        } else {
            self.look(used);
        }
    }

    /// After a call that failed: the kernel may have unmapped the place by then.
    fn look(&mut self, len: u64) {
        self.lost = !again(self.maps, self.start, len);
    }
}

/// A child has no helper, and nothing to look for in there.
fn not_forked(start: u64, len: u64) {
    // SAFETY: a property of the helper's own mapping.
    unsafe { sys!(nr::MADVISE, start, len, advice::DONTFORK) };
}

/// Replaces what the helper has mapped in a place of its own by nothing. `false` if the kernel refuses.
pub(crate) fn reserve(start: u64, len: u64) -> bool {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    // SAFETY: the helper's own place.
    unsafe { sys::mmap(start, len, PROT_NONE, flags, -1, 0) }.is_ok()
}

/// The kernel unmaps the target of a mapping or of a move before it looks at all limits (RLIMIT_DATA, overcommit): what
/// fails can leave a hole in a reservation, into which the program's next mmap may go. `false` if it was quicker than
/// this: then the place is the program's, and nothing may ever be put there again.
pub(crate) fn again(maps: i32, start: u64, len: u64) -> bool {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE;
    // SAFETY: takes no place that anybody has.
    let reserved = unsafe { sys::mmap(start, len, PROT_NONE, flags, -1, 0) };
    reserved == Ok(start) || is_reserved(maps, start, start + len)
}

/// True if all of a range still is the reservation that was made at the start.
fn is_reserved(maps: i32, start: u64, end: u64) -> bool {
    const ACCESSIBLE: u64 = 7;
    let mut at = start;
    while at < end {
        match query(maps, at, 0) {
            Some(mapping) if mapping.vma_start <= at && mapping.inode == 0 && mapping.vma_flags & ACCESSIBLE == 0 => {
                at = mapping.vma_end;
            }
            _ => return false,
        }
    }
    true
}
