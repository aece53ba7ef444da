//! One thread: stop it, make the calls, put it back.
//!
//! Whatever the injector is killed by, at each point the thread is in a state from which it goes on by itself:
//!
//! 1. seized and interrupted, not stopped yet: the kernel forgets the interrupt.
//! 2. stopped: it goes on, and the kernel restarts its call. A call that the stop has broken (EINTR) is made to restart
//!    as the first thing after the registers have been read; a death before that shows the program an EINTR.
//! 3. the slot is written: nobody is in it.
//! 4. the registers are set, by one call, to the system-call instruction of the slot: the thread makes that call and
//!    comes back by the code behind it. This holds up to
//! 5. the registers are set to what they were, by one call, in a stop at which the kernel has still to decide whether it
//!    restarts the call that they are in. It then does what it would have done at the first stop, with the same rest of
//!    time, and with signals as if nothing had been.
//!
//! Signals are not blocked meanwhile: a mask would have to be put back too. A thread that is about to get one is put
//! back first, gets it, and is stopped again.

use std::io;
use std::time::{Duration, Instant};

use super::arch::{self, Registers};
use super::asleep::Asleep;
use super::call::Call;
use super::nap::Nap;
use super::place::Place;
use super::prepare::Stopped;
use super::refusal::{InjectError, Refusal, not_permitted};
use super::thread_choice::{Candidate, Fitness};
use super::{Injected, Options, Step, clock, forbidden};
use crate::ptrace::{Stop, Tracee, Waited};
use crate::stat::Stat;
use crate::sys;
use crate::units::Pid;

/// Why an attempt goes no further.
#[derive(Debug)]
pub(super) enum End {
    /// This thread cannot be used; it goes on as it was.
    NotThis(Refusal),
    /// The thread, or its process, has ended.
    Ended,
    /// The process executes another program meanwhile.
    Moved,
    /// A call did not return in this time.
    Unfinished(Duration),
    /// The kernel refused a step.
    Failed(&'static str, io::Error),
}

/// What has been done so far, by one thread or several.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) results: Vec<Result<u64, crate::Errno>>,
    pub(super) stopped_for: Duration,
    pub(super) timeouts_restarted: u32,
    pub(super) interrupted: u32,
}

impl End {
    /// What that means for whoever has no other thread to try.
    pub(super) fn error(self, pid: Pid, tid: Pid) -> InjectError {
        let refused = |refusal| InjectError::Refused { pid, refusal };
        match self {
            Self::NotThis(refusal) => refused(refusal),
            Self::Ended => refused(Refusal::Gone),
            Self::Moved => refused(Refusal::NoPlaceForCode { why: "it executes a program" }),
            Self::Unfinished(after) => InjectError::Unfinished { pid, tid, after },
            Self::Failed(what, source) => InjectError::Ptrace { what, pid, tid, source },
        }
    }
}

impl Progress {
    /// What was done, the last of it by this thread.
    pub(super) fn done(self, tid: Pid) -> Injected {
        let Self { results, stopped_for, timeouts_restarted, interrupted } = self;
        Injected { results, tid, stopped_for, timeouts_restarted, interrupted }
    }
}

/// Starts to trace a thread.
pub(super) fn seize(pid: Pid, tid: Pid) -> Result<Tracee, End> {
    Tracee::seize(tid).map_err(|error| match sys::errno(&error) {
        libc::ESRCH => End::Ended,
        // What has just ended cannot be attached to either.
        libc::EPERM if Stat::has_ended(tid) => End::Ended,
        libc::EPERM => End::NotThis(not_permitted(pid, tid)),
        _ => End::Failed("attach to", error),
    })
}

/// Sorts an error: a thread that is not there any more has ended.
pub(super) fn failed(what: &'static str) -> impl Fn(io::Error) -> End {
    move |error| if sys::errno(&error) == libc::ESRCH { End::Ended } else { End::Failed(what, error) }
}

/// An attempt on one thread.
pub(super) struct Attempt<'a> {
    pub(super) pid: Pid,
    pub(super) candidate: Candidate,
    pub(super) calls: &'a [Call],
    pub(super) options: &'a Options,
    pub(super) place: &'a Place,
    /// Up to when the thread must have stopped.
    pub(super) stop_by: Instant,
    /// Up to when all must be done.
    pub(super) deadline: Instant,
    pub(super) progress: &'a mut Progress,
    /// Where it slept before it was asked to stop, where that is needed afterwards.
    pub(super) seen: Option<Asleep>,
    /// The thread, if it is traced already and was asked to stop.
    pub(super) held: Option<Tracee>,
}

/// No slot is free now.
pub(super) const IN_USE: Refusal = Refusal::NoPlaceForCode { why: "the slots behind its vDSO are in use" };

/// How long is waited, at least, for a thread that is asked to stop, and for one that is asked to come back from a call that
/// takes too long.
pub(super) const GRACE: Duration = Duration::from_millis(50);

impl Attempt<'_> {
    pub(super) fn step(&self, step: Step) {
        if let Some(told) = self.options.on_step {
            told(step);
        }
    }

    /// Does it: all calls were made then, or the first that failed was the last wanted. Ends with the thread untraced, or
    /// with the end of the calling thread, which has the same effect.
    pub(super) fn run(mut self) -> Result<(), End> {
        let tracee = self.held.map_or_else(|| self.seize(), Ok)?;
        self.step(Step::Seized);
        let begun = Instant::now();
        let end = self.inside(tracee);
        self.progress.stopped_for += begun.elapsed();
        end
    }

    /// Starts to trace, unless it is known beforehand that it would be for nothing.
    fn seize(&self) -> Result<Tracee, End> {
        let tid = self.candidate.tid;
        let owner = self.place.owner(self.pid, tid, self.candidate.start_time);
        if !self.place.may_have_room(&owner) {
            // What is about to end has no memory any more.
            return Err(if self.place.is_there(tid) { End::NotThis(IN_USE) } else { End::Ended });
        }
        match forbidden::beforehand(tid) {
            Some(refusal) => Err(End::NotThis(refusal)),
            None => seize(self.pid, tid),
        }
    }

    fn inside(&mut self, tracee: Tracee) -> Result<(), End> {
        let limited = self.candidate.fitness == Fitness::Limited;
        if arch::FORGETS_CALLS && self.held.is_none() {
            self.seen = Asleep::look(tracee.tid());
        }
        // As late as can be: who wakes by itself between this and the interrupt is taken for one that slept until then.
        let mut nap = if limited { Nap::look(tracee.tid()).map(|nap| (nap, clock())) } else { None };
        if self.held.is_none() {
            tracee.interrupt().map_err(failed("interrupt"))?;
        }
        self.step(Step::Interrupted);
        // It may be out of its call by now: let go of before that is repaired, its program would see an EINTR.
        self.wait_for_trap(tracee, self.stop_by.max(Instant::now() + GRACE))?;
        loop {
            self.step(Step::Stopped);
            let stopped = self.prepare(tracee, nap.take())?;
            match self.make_calls(tracee, &stopped)? {
                None => {
                    self.put_back(tracee, &stopped, None)?;
                    if stopped.is_masked() {
                        self.let_go_at_its_call(tracee, &stopped)?;
                    } else {
                        tracee.detach().map_err(failed("let go of"))?;
                    }
                    self.step(Step::Detached);
                    return Ok(());
                }
                Some(signal) => {
                    self.put_back(tracee, &stopped, Some(signal))?;
                    tracee.interrupt().map_err(failed("interrupt"))?;
                    tracee.go_on(signal).map_err(failed("pass a signal on to"))?;
                    self.step(Step::SignalPassed);
                    self.wait_for_trap(tracee, self.deadline)?;
                }
            }
        }
    }

    /// Waits for the stop that was asked for; signals met on the way are passed on.
    fn wait_for_trap(&self, tracee: Tracee, by: Instant) -> Result<(), End> {
        loop {
            match tracee.wait(by).map_err(failed("wait for"))? {
                Waited::Stopped(Stop::Trap) => return Ok(()),
                Waited::Stopped(Stop::Signal(signal)) => tracee.go_on(signal).map_err(failed("pass a signal on to"))?,
                Waited::Stopped(Stop::Call | Stop::Other) => tracee.go_on(0).map_err(failed("continue"))?,
                Waited::Ended => return Err(End::Ended),
                Waited::TimeOut => {
                    let state = Stat::read(tracee.tid()).map_or(self.candidate.state, |stat| stat.state);
                    return Err(End::NotThis(Refusal::WontStop { state }));
                }
            }
        }
    }

    /// Lets a thread go on with the registers that it has.
    pub(super) fn leave(&self, tracee: Tracee, refusal: Refusal) -> End {
        self.leave_as(tracee, End::NotThis(refusal))
    }

    pub(super) fn leave_as(&self, tracee: Tracee, end: End) -> End {
        match tracee.detach() {
            Ok(()) => end,
            Err(error) => failed("let go of")(error),
        }
    }

    /// Makes the calls. Ends in a stop at which the thread can be put back, with the signal that it is about to get.
    fn make_calls(&mut self, tracee: Tracee, stopped: &Stopped) -> Result<Option<i32>, End> {
        loop {
            let done = self.progress.results.len();
            let enough = self.options.stop_at_error && self.progress.results.last().is_some_and(Result::is_err);
            if done == self.calls.len() || enough {
                break;
            }
            stopped
                .back
                .entering(stopped.slot, &self.calls[done])
                .write(tracee)
                .map_err(failed("set the registers of"))?;
            self.step(Step::Entering);
            if let Some(signal) = self.to_call(tracee)? {
                return Ok(Some(signal));
            }
            self.step(Step::AtEntry);
            if let Some(signal) = self.to_call(tracee)? {
                return Ok(Some(signal));
            }
            self.step(Step::AtExit);
            let registers = Registers::read(tracee, None).map_err(failed("read the result of"))?;
            let Ok(registers) = registers else { return Err(End::NotThis(Refusal::Other32Bit)) };
            if !registers.result_is_restart() {
                self.progress.results.push(match registers.result() {
                    error @ -4095..0 => Err(crate::Errno::from_raw_os_error(-error as i32)),
                    value => Ok(value.cast_unsigned()),
                });
            }
        }
        // Not from here: at the exit of a call the kernel is done with deciding about restarts.
        tracee.interrupt().map_err(failed("interrupt"))?;
        tracee.go_on(0).map_err(failed("continue"))?;
        loop {
            match tracee.wait(self.deadline + GRACE).map_err(failed("wait for"))? {
                Waited::Stopped(Stop::Trap) => return Ok(None),
                Waited::Stopped(Stop::Signal(signal)) => return Ok(Some(signal)),
                Waited::Stopped(Stop::Call | Stop::Other) => tracee.go_on(0).map_err(failed("continue"))?,
                Waited::Ended => return Err(End::Ended),
                Waited::TimeOut => return Err(End::Unfinished(self.options.timeout)),
            }
        }
    }

    /// Goes to the next entry or exit of a call; a signal that comes first is returned.
    fn to_call(&self, tracee: Tracee) -> Result<Option<i32>, End> {
        loop {
            tracee.go_to_call().map_err(failed("continue"))?;
            match tracee.wait(self.deadline).map_err(failed("wait for"))? {
                Waited::Stopped(Stop::Call) => return Ok(None),
                Waited::Stopped(Stop::Signal(signal)) => return Ok(Some(signal)),
                // A stop signal holds the process. This thread finishes, and stops when it is let go of.
                Waited::Stopped(Stop::Trap | Stop::Other) => {}
                Waited::Ended => return Err(End::Ended),
                Waited::TimeOut => return Err(End::Unfinished(self.options.timeout)),
            }
        }
    }

    fn put_back(&self, tracee: Tracee, stopped: &Stopped, signal: Option<i32>) -> Result<(), End> {
        stopped.write_back(tracee, signal)?;
        self.step(Step::PutBack);
        if !stopped.stays {
            // A slot that cannot be cleared stays marked, and is found so next time.
            let _ = self.place.clear(tracee, stopped.slot);
            self.step(Step::SlotCleared);
        }
        Ok(())
    }
}
