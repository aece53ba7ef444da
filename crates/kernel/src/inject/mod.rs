//! Running a few system calls inside another process, in one of its threads, without it noticing.
//!
//! Some things the kernel does only for the caller itself: prctl(PR_SET_MEMORY_MERGE), madvise(MADV_MERGEABLE). To get
//! them done for a process that does not cooperate, one of its threads is stopped (ptrace), made to make the call, and
//! put back exactly: registers, the call that it was in, the rest of that call's time. See `attempt` for the order of
//! steps, and for why the death of the injector at any point leaves a thread that goes on by itself; `restart` for the
//! calls that a mere stop breaks, `mask` for those with a signal mask of their own, `transfer` for those that it cuts short;
//! `slot` and `place` for the code and where it lies.
//!
//! What it leaves: a private copy of the last page of the vDSO (4 KiB), zero again where the code was, unless the thread
//! was in a call with a time-out that a stop breaks; that call then goes on from there. A child of fork has a copy of the
//! page, in which no thread of its own is.
//!
//! # What a program could notice
//!
//! * The time for which one thread is stopped, some 0.3 ms.
//! * A time-out that a stop breaks (epoll_wait, sigtimedwait, semtimedop, ...) ends when it would have; where the scheduler
//!   cannot tell when it began, it ends late by what had passed of it before the first stop, once. One in milliseconds is
//!   rounded up.
//! * A socket's own time-out (SO_RCVTIMEO, SO_SNDTIMEO) and that of io_uring_enter begin again if the thread was waiting
//!   there, which is counted ([`Injected::timeouts_restarted`]) and avoided if there is another thread.
//! * Calls that return EINTR after they have done something are not made again ([`Injected::interrupted`]).
//! * A call that waits in the middle of its bytes (write to a pipe that is full, send, recv with MSG_WAITALL, a large
//!   getrandom) returns how many it has moved by then. It is counted as those, and avoided if there is another thread.
//! * The injector is killed after it has asked a thread to stop and before it has read its registers, some 50 us: a call
//!   that a stop breaks returns EINTR. It is killed later, and a signal comes before the thread is back: a call that the
//!   handler would have ended is made again behind the handler.
//! * A signal that comes in the moment in which the thread is on its way back, after the kernel has decided to make its
//!   call again: a handler without SA_RESTART runs before the call, as it would after any other stop, and does not end it.
//! * A signal that only the interrupted call keeps away (ppoll with a mask) is handled before that call instead of behind
//!   it. If the injector is killed before the thread is back, the call may return EINTR for it.
//! * A signal that the process ignores is not ignored while the thread that it is sent to is traced: another thread may
//!   see an EINTR for it. So threads that have children, or are the first of their process, are taken last.
//! * A thread that executes a setuid program while it is traced by somebody without CAP_SYS_PTRACE gets no rights by it.
//!   Only one that runs, and is about to, can meet that.
//!
//! # What the caller must not do
//!
//! No other thread of the caller may wait for children meanwhile without naming them (waitpid(-1)), nor for the process
//! itself: it would be told of stops.
//!
//! Nor may the caller be stopped while it holds a thread: that one would stand still with it, until the caller goes on or is
//! killed. Of job control's signals the calling thread sees to that ([`StopsHeld`](crate::signals::StopsHeld)); other
//! threads of the caller should have them blocked. SIGSTOP, a debugger and the freezer take no heed of it.

#[cfg(any(test, target_arch = "aarch64"))]
mod aarch64;
mod asleep;
mod attempt;
mod call;
mod caught;
mod forbidden;
mod lock;
mod mask;
mod nap;
mod place;
mod prepare;
mod refusal;
mod restart;
mod rounds;
mod rseq;
mod seccomp;
mod self_test;
mod slot;
mod thread_choice;
mod transfer;
#[cfg(any(test, target_arch = "x86_64"))]
mod x86_64;

use std::time::Duration;

use crate::Errno;
use crate::units::Pid;

pub use call::{Advice, Call, CallNumber};
pub use caught::{Caught, catch};
pub use refusal::{InjectError, Refusal};
pub(crate) use self_test::{SelfTest, self_test};

/// What the architecture decides. `FORGETS_CALLS`: a stopped thread does not show the call that it was in any more.
/// `CALL_INSTRUCTION`: bytes of the instruction that makes a call.
#[cfg(target_arch = "x86_64")]
mod arch {
    pub(super) use super::x86_64::{Onward, Registers, decode, encode};
    pub(super) const CALL_INSTRUCTION: u64 = 2;
    pub(super) const FORGETS_CALLS: bool = false;
}

/// As above.
#[cfg(target_arch = "aarch64")]
mod arch {
    pub(super) use super::aarch64::{Onward, Registers, decode, encode};
    pub(super) const CALL_INSTRUCTION: u64 = 4;
    pub(super) const FORGETS_CALLS: bool = true;
}

/// How to go about it.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long all of it may take. A call that takes longer is left to the thread.
    pub timeout: Duration,
    /// Make no further calls after one that returned an error.
    pub stop_at_error: bool,
    /// Only this thread.
    pub tid: Option<Pid>,
    /// Told before each step goes on, by the thread that does it. For tests: what kills the injector here?
    pub on_step: Option<fn(Step)>,
}

impl Default for Options {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(10), stop_at_error: false, tid: None, on_step: None }
    }
}

/// What has just been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Step {
    /// The thread is traced and runs.
    Seized,
    /// It was asked to stop.
    Interrupted,
    /// It has stopped.
    Stopped,
    /// A call that the stop had broken will restart.
    Repaired,
    /// The code is in its slot.
    SlotWritten,
    /// The registers are those of the call.
    Entering,
    /// It is about to make the call.
    AtEntry,
    /// It has made it.
    AtExit,
    /// A signal was passed on.
    SignalPassed,
    /// The registers are its own again.
    PutBack,
    /// The slot is free again.
    SlotCleared,
    /// It is not traced any more.
    Detached,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Self; 12] = [
        Self::Seized,
        Self::Interrupted,
        Self::Stopped,
        Self::Repaired,
        Self::SlotWritten,
        Self::Entering,
        Self::AtEntry,
        Self::AtExit,
        Self::SignalPassed,
        Self::PutBack,
        Self::SlotCleared,
        Self::Detached,
    ];
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injected {
    /// What the calls returned, in their order; fewer than calls only with [`Options::stop_at_error`].
    pub results: Vec<Result<u64, Errno>>,
    /// The thread that made the last of them.
    pub tid: Pid,
    /// For how long it, and others tried before it, were under way to a stop or stopped, at most.
    pub stopped_for: Duration,
    /// How many waits on a socket began again, with the whole of a time-out that they may have.
    pub timeouts_restarted: u32,
    /// How many calls saw an EINTR that they would not have had, or moved less than they were to, of a kind that nobody
    /// can repair.
    pub interrupted: u32,
}

/// Runs calls inside a process, in one of its threads. Results come in their order.
///
/// A call that a signal or the end of a thread broke off is made again, so calls must be harmless to repeat.
///
/// # Errors
/// [`InjectError::Refused`] for a reason that lies in the process; then no call was made, unless the process or its
/// threads changed meanwhile. [`InjectError::Unfinished`] if a call takes longer than the time-out. Others if something
/// here fails.
pub fn inject(pid: Pid, calls: &[Call], options: &Options) -> Result<Injected, InjectError> {
    rounds::inject(pid, calls, options)
}

/// Nanoseconds of the monotonic clock.
fn clock() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}
