//! The two places that pages are moved to while they are frozen.

use abi::SCRATCH;
use abi::uapi::ProcmapQuery;
use merge::{AddressSpace as _, RegisterMode};

use crate::space::Space;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, PROT_NONE};
use crate::sys::{advice, nr, sys};

impl Space {
    /// Makes the scratch area what pages are moved to: registered, like the place they come from, and empty. `false` if
    /// there is no memory for that.
    pub(crate) fn open_scratch(&mut self) -> bool {
        if self.register(self.scratch, self.scratch + SCRATCH, RegisterMode::Missing).is_err() {
            return false;
        }
        // Whoever reads all that a program has, a garbage collector or a debugger, has put pages there.
        self.discard(self.scratch, SCRATCH);
        true
    }

    /// Leaves the scratch area as memory like any other. Who touched it meanwhile has waited, and goes on: while it is
    /// registered and nobody moves anything, he would wait for ever.
    pub(crate) fn close_scratch(&mut self) {
        self.unregister(self.scratch, self.scratch + SCRATCH);
    }

    pub(crate) fn discard(&self, start: u64, len: u64) {
        // SAFETY: scratch pages whose content is in place, or equal to what is.
        if unsafe { sys!(nr::MADVISE, start, len, advice::DONTNEED) } != 0 {
            // After mlockall the plain advice is refused.
            // SAFETY: as above.
            unsafe { sys!(nr::MADVISE, start, len, advice::DONTNEED_LOCKED) };
        }
    }

    /// The kernel unmaps the target of a move before it looks at limits (RLIMIT_DATA, RLIMIT_AS, overcommit): a move that
    /// fails leaves a hole in the reservation, into which the program's next mmap may go. If it was quicker than this the
    /// place is the program's, and is never moved to again.
    pub(crate) fn reserve_again(&mut self, target: u64, len: u64) {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE;
        // SAFETY: takes no place that anybody has.
        let reserved = unsafe { sys::mmap(target, len, PROT_NONE, flags, -1, 0) };
        if reserved != Ok(target) {
            self.diverged_scratch_lost = !self.is_reserved(target, target + len);
        }
    }

    /// True if all of a range still is the reservation that was made at the start.
    fn is_reserved(&mut self, start: u64, end: u64) -> bool {
        const ACCESSIBLE: u64 = 7;
        let mut at = start;
        while at < end {
            let untouched = |mapping: &ProcmapQuery| mapping.inode == 0 && mapping.vma_flags & ACCESSIBLE == 0;
            match self.mapping(at).filter(untouched) {
                Some(mapping) => at = mapping.vma_end,
                None => return false,
            }
        }
        true
    }

    /// Empties slots for diverged pages, so that nothing but what is frozen comes there.
    pub(crate) fn reserve(&self, start: u64, len: u64) {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
        // SAFETY: reserves a part of the agent's own scratch area anew.
        let _ = unsafe { sys::mmap(start, len, PROT_NONE, flags, -1, 0) };
    }
}
