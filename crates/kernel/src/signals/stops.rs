//! Stop signals that wait.

use std::marker::PhantomData;

use super::set_of;

/// Job control's: those of the terminal that stop a process and can be blocked. SIGSTOP cannot be.
const STOPS: [i32; 3] = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

/// A time in which the stop signals of job control do not stop this process, if all of its threads are in it: Ctrl-Z takes
/// effect when it is over. For as long as another process waits for this one to go on. Threads that the calling one starts
/// meanwhile are in it until they end.
#[derive(Debug)]
pub struct StopsHeld {
    before: libc::sigset_t,
    /// A mask belongs to a thread.
    _here: PhantomData<*const ()>,
}

impl StopsHeld {
    /// Begins it for the calling thread.
    #[must_use]
    pub fn begin() -> Self {
        let set = set_of(STOPS.into_iter());
        let mut before = set_of(std::iter::empty());
        // SAFETY: the set is initialised, the old mask is writable, and both live until the call returns. It fails for no
        // valid way of changing a mask.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before) };
        Self { before, _here: PhantomData }
    }
}

impl Drop for StopsHeld {
    fn drop(&mut self) {
        // SAFETY: the mask is the one that the kernel gave; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}
