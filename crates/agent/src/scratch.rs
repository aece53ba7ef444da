//! The two places that pages are moved to while they are frozen.

use abi::SCRATCH;
use merge::{AddressSpace as _, RegisterMode};

use crate::space::Space;
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
}
