//! Forks past the gate, as the helper sees them: a child gets what the journal says is frozen, from whoever reads the
//! event. Until then nothing is put back, thrown away or forgotten.

use core::sync::atomic::Ordering::SeqCst;

use abi::uapi::{UFFDIO_COPY, UffdioCopy};

use crate::link;
use crate::space::Space;
use crate::sys::{self, errno, nr, sys};

/// How long a fork's event may stay unread once the broker is gone: the guardian reads it at once.
const FORK_WITHIN_NS: u64 = 2_000_000_000;
/// Pause between two looks at it.
const FORK_PAUSE_NS: u64 = 50_000;

/// Patience with whoever is to read a fork's event. While the broker is there it is without end, since the child would
/// read zeros, and a broker that is stopped or swapped out comes back.
struct Patience {
    since: u64,
}

impl Patience {
    fn new() -> Self {
        Self { since: sys::monotonic() }
    }

    fn goes_on(&mut self, broker: i32) -> bool {
        let now = sys::monotonic();
        if !link::hung_up(broker) {
            self.since = now;
        }
        now.saturating_sub(self.since) < FORK_WITHIN_NS
    }
}

impl Space {
    /// Waits while a fork that the gate did not see is being dealt with: its child gets what the journal says is frozen,
    /// so the journal must not change before.
    pub(crate) fn let_forks_pass(&self) {
        let mut patience = Patience::new();
        while self.fork_is_pending() && patience.goes_on(self.link) {
            sys::sleep_ns(FORK_PAUSE_NS);
        }
    }

    /// Puts pages back with no fork being dealt with. Said before it is looked for, as the reader of the events says that
    /// it is at work before it looks whether pages are being put back: one of the two always sees the other.
    pub(crate) fn begin_thaw(&self) {
        let mut patience = Patience::new();
        loop {
            self.control.thawing.store(1, SeqCst);
            if !self.fork_is_pending() || !patience.goes_on(self.link) {
                return;
            }
            self.end_thaw();
            sys::sleep_ns(FORK_PAUSE_NS);
        }
    }

    pub(crate) fn end_thaw(&self) {
        self.control.thawing.store(0, SeqCst);
    }

    /// Reads the events of forks that nobody else reads any more, so that whoever forked goes on. To be called with nothing
    /// frozen: the children lack nothing then, and their descriptors are of no use.
    pub(crate) fn dismiss_forks(&self) {
        /// `struct uffd_msg`: what happened, and for a fork the child's descriptor.
        const LEN: u64 = 32;
        const EVENT_FORK: u64 = 0x13;
        loop {
            let mut message = [0_u64; LEN as usize / 8];
            // SAFETY: the kernel writes one message.
            let got = unsafe { sys!(nr::READ, self.uffd as u64, message.as_mut_ptr() as u64, LEN) };
            if got != LEN as i64 {
                return;
            }
            if message[0] & 0xff == EVENT_FORK {
                link::close(message[1] as i32);
            }
        }
    }

    /// The kernel answers EAGAIN to every copy, before it looks at what is to be copied (here: nothing), while an event
    /// of a fork has not been read. From then on the reader says that it is at work.
    pub(crate) fn fork_is_pending(&self) -> bool {
        let mut request = UffdioCopy { dst: 0, src: 0, len: 0, mode: 0, copy: 0 };
        self.ioctl(self.uffd, UFFDIO_COPY, (&raw mut request) as u64) == -errno::EAGAIN
            || self.control.filling.load(SeqCst) != 0
    }
}
