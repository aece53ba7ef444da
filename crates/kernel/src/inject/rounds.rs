//! Threads are tried one after the other, best first, until one of them has made the calls or there is a reason to stop.

use std::io;
use std::time::{Duration, Instant};

use super::attempt::{Attempt, End, Progress};
use super::call::Call;
use super::lock::Lock;
use super::place::Place;
use super::refusal::{self, InjectError, Refusal};
use super::{Injected, Options, thread_choice};
use crate::pidfd::{Pidfd, PidfdError};
use crate::procfs::ProcError;
use crate::signals::StopsHeld;
use crate::units::Pid;

/// How long one thread is waited for while there are others; and the process, where its state may soon be another.
const PATIENCE: Duration = Duration::from_millis(200);

/// See [`super::inject`].
pub(super) fn inject(pid: Pid, calls: &[Call], options: &Options) -> Result<Injected, InjectError> {
    let refused = |refusal| InjectError::Refused { pid, refusal };
    if pid == Pid::this() {
        return Err(refused(Refusal::Own));
    }
    let begun = Instant::now();
    let deadline = begun + options.timeout;
    let pidfd = match Pidfd::open(pid) {
        Ok(pidfd) => pidfd,
        // It takes processes only.
        Err(PidfdError::Open { source, .. }) => match refusal::look(pid) {
            Ok(Some(refusal @ Refusal::Thread { .. })) => return Err(refused(refusal)),
            _ => return Err(InjectError::Setup { pid, source }),
        },
        Err(_) => return Err(refused(Refusal::Gone)),
    };
    // Before anything is looked at: who is traced by another injector is not to be left alone.
    let _lock = Lock::take(pid, pidfd, deadline)?;
    let mut round = Round { pid, calls, options, deadline, progress: Progress::default() };
    loop {
        let refusal = match refusal::look(pid)? {
            None => match round.go()? {
                Ended::Done(done) => return Ok(done),
                Ended::Refused(refusal) => refusal,
            },
            Some(refusal) => refusal,
        };
        let patient = match refusal {
            // A state of a moment, for most.
            Refusal::WontStop { .. } | Refusal::OtherInterface | Refusal::WideRegisters => deadline,
            // A child that takes long to execute a program may take for ever; the tracer may be an injector that is just
            // dying, which gives up its lock first; a process without a vDSO may be about to execute a program; and of
            // threads that run it cannot be told whether they have left their slots.
            Refusal::Vfork { .. } | Refusal::Traced { .. } | Refusal::NoPlaceForCode { .. } => {
                deadline.min(begun + PATIENCE)
            }
            _ => begun,
        };
        if Instant::now() >= patient {
            return Err(refused(refusal));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How a round ended.
enum Ended {
    Done(Injected),
    Refused(Refusal),
}

struct Round<'a> {
    pid: Pid,
    calls: &'a [Call],
    options: &'a Options,
    deadline: Instant,
    progress: Progress,
}

impl Round<'_> {
    /// Tries each thread once.
    fn go(&mut self) -> Result<Ended, InjectError> {
        let pid = self.pid;
        let gone = |error: ProcError| match error {
            ProcError::Gone { .. } => Ok(Ended::Refused(Refusal::Gone)),
            ProcError::Denied { .. } => Ok(Ended::Refused(refusal::not_permitted(pid, pid))),
            other => Err(other.into()),
        };
        let place = match Place::find(pid) {
            Ok(Ok(Some(place))) => place,
            Ok(Ok(None)) => return Ok(Ended::Refused(Refusal::NoPlaceForCode { why: "it has no vDSO" })),
            Ok(Err(refusal)) => return Ok(Ended::Refused(refusal)),
            Err(error) => return gone(error),
        };
        let candidates = match thread_choice::candidates(pid, self.options.tid) {
            Ok(candidates) => candidates,
            Err(error) => return gone(error),
        };
        let count = candidates.len();
        let vfork = if count == 0 { thread_choice::vfork_child(pid, self.options.tid) } else { None };
        let mut last = vfork.map_or(Refusal::WontStop { state: b'D' }, |child| Refusal::Vfork { child });
        for (index, candidate) in candidates.into_iter().enumerate() {
            // Whoever sleeps in a call that a stop breaks is not given up: it would see the EINTR, and nobody repairs it.
            let only = index + 1 == count || candidate.must_be_repaired();
            let stop_by = if only { self.deadline } else { self.deadline.min(Instant::now() + PATIENCE) };
            let attempt = Attempt {
                pid,
                candidate,
                calls: self.calls,
                options: self.options,
                place: &place,
                stop_by,
                deadline: self.deadline,
                progress: &mut self.progress,
                seen: None,
                held: None,
            };
            match in_a_thread(attempt).map_err(|source| InjectError::Setup { pid, source })? {
                Ok(()) => return Ok(Ended::Done(std::mem::take(&mut self.progress).done(candidate.tid))),
                Err(End::NotThis(refusal)) => last = refusal,
                Err(End::Ended) => {}
                // The other threads are of the old program too.
                Err(End::Moved) => break,
                Err(end) => return Err(end.error(pid, candidate.tid)),
            }
        }
        Ok(Ended::Refused(last))
    }
}

/// Tracing ends with the thread that traces, whatever state the other one is in. Ctrl-Z waits: the other one would too.
fn in_a_thread(attempt: Attempt<'_>) -> io::Result<Result<(), End>> {
    let _held = StopsHeld::begin();
    let end = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("inject".to_owned()).spawn_scoped(scope, move || attempt.run());
        thread.map(|thread| thread.join())
    })?;
    Ok(end.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}
