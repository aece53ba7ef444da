//! Calls with a signal mask of their own: ppoll, pselect, epoll_pwait, sigsuspend.
//!
//! Such a call that a stop interrupts leaves its mask in force until the kernel has decided how it goes on (do_signal,
//! kernel/signal.c): a signal that comes by then interrupts the call, and with none the thread gets its own mask back.
//! That is what happens when the thread goes on to an injected call instead. What only the call lets through is no harm
//! then: it waits, and interrupts the call when that is made again. But what only the call keeps away comes now. To its
//! program it has come just before the call, which is made after the handler, and does not return EINTR for it.

use super::attempt::{Attempt, End, GRACE, failed};
use super::prepare::Stopped;
use crate::ptrace::{Stop, Tracee, Waited};
use crate::status;

/// The signals, bit 0 for the first, that only the call keeps away in which a thread has been stopped.
pub(super) fn kept_away(tracee: Tracee) -> Result<u64, End> {
    // Of the two masks that it may have, this is its own, and /proc shows the one in force.
    let mut own = 0_u64;
    // SAFETY: the request takes the size of a set of signals, and fills it.
    unsafe { tracee.fill(libc::PTRACE_GETSIGMASK, &mut own) }.map_err(failed("read the signal mask of"))?;
    let in_force = status::read(tracee.tid()).map_or(own, |status| status.blocked);
    Ok(in_force & !own)
}

impl Stopped {
    /// True if only the thread's call keeps this signal away.
    fn keeps_away(&self, signal: i32) -> bool {
        (1..=64).contains(&signal) && self.kept_away >> (signal - 1) & 1 != 0
    }

    /// True if the thread goes back to a call that keeps some signals away.
    pub(super) fn is_masked(&self) -> bool {
        self.kept_away != 0 && self.back.will_restart()
    }

    /// Writes the registers with which a stopped thread goes on, where `signal` is what it is about to get.
    pub(super) fn write_back(&self, tracee: Tracee, signal: Option<i32>) -> Result<(), End> {
        let mut back = self.back;
        if signal.is_some_and(|signal| self.keeps_away(signal)) {
            back.set_restart_behind_handler();
        }
        back.write(tracee).map_err(failed("put back"))
    }
}

impl Attempt<'_> {
    /// Lets go of a thread that was put back: on its way back to its call a signal may come that the call keeps away, so
    /// it is followed up to where it makes the call.
    pub(super) fn let_go_at_its_call(&self, tracee: Tracee, stopped: &Stopped) -> Result<(), End> {
        tracee.go_to_call().map_err(failed("continue"))?;
        let signal = match tracee.wait(self.deadline + GRACE).map_err(failed("wait for"))? {
            Waited::Stopped(Stop::Signal(signal)) => {
                stopped.write_back(tracee, Some(signal))?;
                signal
            }
            // A stop signal holds the process; or it is there.
            Waited::Stopped(Stop::Trap | Stop::Call | Stop::Other) => 0,
            Waited::Ended => return Err(End::Ended),
            // It is let go of when this thread ends.
            Waited::TimeOut => return Ok(()),
        };
        tracee.detach_with(signal).map_err(failed("let go of"))
    }
}
