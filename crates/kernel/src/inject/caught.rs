//! A process that may be gone in a moment: stopped first, looked at then.

use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use super::arch::{self, Registers};
use super::asleep::Asleep;
use super::attempt::{Attempt, End, Progress, failed, seize};
use super::call::Call;
use super::forbidden::Rules;
use super::lock::Lock;
use super::place::{self, Place};
use super::refusal::{InjectError, Refusal};
use super::restart::{self, Interrupted};
use super::thread_choice::Candidate;
use super::{Injected, Options, transfer};
use crate::membership;
use crate::pidfd::Pidfd;
use crate::procfs::ProcError;
use crate::ptrace::{Stop, Tracee, Waited};
use crate::stat::Stat;
use crate::units::Pid;

/// A process whose first thread is traced, and stops before it goes on in its own code: it cannot end by itself any more, but
/// may be in the midst of a fork, which is finished first. Let go of when this is dropped, as by [`Caught::let_go`], or at the
/// latest when the thread ends that caught it: that should be one that ends soon.
#[derive(Debug)]
pub struct Caught {
    pid: Pid,
    tracee: Option<Tracee>,
    /// Where it slept before it was asked to stop, where that is needed afterwards.
    seen: Option<Asleep>,
    begun: Instant,
    /// Tracing belongs to a thread.
    _here: PhantomData<*const ()>,
}

/// How long one that is let go of is waited for, which has to stop for that.
const PATIENCE: Duration = Duration::from_millis(20);

/// The same of one that runs, and may be on its way out of a call that the stop has broken: free before its call is
/// repaired, it would see an EINTR.
const LONG_PATIENCE: Duration = Duration::from_millis(500);

/// Catches a process, by its first thread and by nothing but two system calls, so that one that lives for less than a
/// millisecond can be met. For processes that have just begun: [`inject`](super::inject) looks for a thread that notices
/// less.
///
/// # Errors
/// [`InjectError::Refused`] if it has ended or cannot be attached to.
pub fn catch(pid: Pid) -> Result<Caught, InjectError> {
    if pid == Pid::this() {
        return Err(InjectError::Refused { pid, refusal: Refusal::Own });
    }
    let tracee = seize(pid, pid).map_err(|end| end.error(pid, pid))?;
    let seen = if arch::FORGETS_CALLS { Asleep::look(pid) } else { None };
    let caught = Caught { pid, tracee: Some(tracee), seen, begun: Instant::now(), _here: PhantomData };
    tracee.interrupt().map_err(|error| failed("interrupt")(error).error(pid, pid))?;
    Ok(caught)
}

impl Caught {
    /// Which process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Runs calls in its first thread and lets go of it, as [`inject`](super::inject) does.
    ///
    /// # Errors
    /// As of that one. It may still be held then.
    pub fn inject(&mut self, calls: &[Call], options: &Options) -> Result<Injected, InjectError> {
        let pid = self.pid;
        let refused = |refusal| InjectError::Refused { pid, refusal };
        let unread = |error: ProcError| if error.is_gone() { refused(Refusal::Gone) } else { error.into() };
        let deadline = Instant::now() + options.timeout;
        let pidfd = Pidfd::open(pid).map_err(|_gone| refused(Refusal::Gone))?;
        let _lock = Lock::take(pid, pidfd, deadline)?;
        // It would not come to a call before it is thawed.
        if membership::is_frozen(pid).map_err(unread)? {
            return Err(refused(Refusal::Frozen));
        }
        let place = match Place::find(pid).map_err(unread)? {
            Ok(Some(place)) => place,
            Ok(None) => return Err(End::Moved.error(pid, pid)),
            Err(refusal) => return Err(refused(refusal)),
        };
        let candidate = Candidate::held(pid, &Stat::read(pid).map_err(unread)?);
        let mut progress = Progress::default();
        let attempt = Attempt {
            pid,
            candidate,
            calls,
            options,
            place: &place,
            stop_by: deadline,
            deadline,
            progress: &mut progress,
            seen: self.seen.take(),
            held: self.tracee.take(),
        };
        attempt.run().map_err(|end| end.error(pid, pid))?;
        Ok(Injected { stopped_for: self.begun.elapsed(), ..progress.done(pid) })
    }

    /// Lets go of it, if it is still held: a call that the stop has broken is made again. How many of its calls return early
    /// all the same, as [`Injected::interrupted`].
    #[must_use = "what the process has noticed is to be told"]
    pub fn let_go(mut self) -> u32 {
        self.release()
    }

    fn release(&mut self) -> u32 {
        let Some(tracee) = self.tracee.take() else { return 0 };
        let begun = Instant::now();
        loop {
            // What fails here fails for one that was killed. One that does not stop is free when this thread ends.
            let _ = match tracee.wait(Instant::now() + PATIENCE) {
                Ok(Waited::Stopped(Stop::Trap)) => return repair(tracee, self.seen.take().as_ref()).unwrap_or(0),
                Ok(Waited::Stopped(Stop::Signal(signal))) => tracee.go_on(signal),
                Ok(Waited::Stopped(Stop::Call | Stop::Other)) => tracee.go_on(0),
                Ok(Waited::TimeOut) if begun.elapsed() < LONG_PATIENCE && runs(self.pid) => Ok(()),
                Ok(Waited::Ended | Waited::TimeOut) | Err(_) => return 0,
            };
        }
    }
}

impl Drop for Caught {
    fn drop(&mut self) {
        self.release();
    }
}

fn runs(pid: Pid) -> bool {
    Stat::read(pid).is_ok_and(|stat| stat.state == b'R')
}

/// Lets go of a stopped thread whose call, if the stop has broken that, is then made again. No code has to be put into the
/// process for that, as no other call is made in between; but a time-out begins anew. How many calls return early.
fn repair(tracee: Tracee, seen: Option<&Asleep>) -> io::Result<u32> {
    let mut interrupted = 0;
    if let Ok(mut registers) = Registers::read(tracee, seen)?
        && let Some(call) = registers.call()
    {
        let read = |address| place::two_words(tracee.tid(), address);
        let broken = registers.was_interrupted();
        let for_good = broken && restart::sort(&call, read) == Interrupted::Leave;
        interrupted = u32::from(for_good || transfer::broke_off(tracee.tid(), &call, registers.result()));
        // See `Attempt::prepare`.
        let forbidden =
            registers.waits_for_restart_call() && Rules::read(tracee)?.forbid_restart(registers.instruction());
        if broken && !for_good || forbidden {
            registers.set_restart();
            registers.write(tracee)?;
        }
    }
    tracee.detach()?;
    Ok(interrupted)
}
