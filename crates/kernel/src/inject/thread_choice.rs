//! Which thread is to make the calls: the one that notices least.
//!
//! A thread that sleeps in a call which the kernel restarts by itself loses nothing but the time for which it is
//! stopped, in which it would have slept. One that runs loses that time. One in a call that a stop breaks needs repair
//! (see `restart`), and if the injector dies between the stop and the repair its program sees an EINTR. One in the middle
//! of a transfer returns before it has moved all (see `transfer`), so any other comes before it. One that cannot be stopped
//! is not tried.

use std::cmp::Ordering;

use crate::current_call::{CurrentCall, current_call};
use crate::procfs::{self, ProcError};
use crate::stat::Stat;
use crate::status;
use crate::task;
use crate::units::Pid;

use super::asleep::Asleep;
use super::call::Call;
use super::restart::{self, TimeOut};
use super::transfer;

/// How well a thread is suited, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fitness {
    /// In a call that is restarted by itself.
    Restarts,
    /// Running, in its own code or in the kernel.
    Runs,
    /// In another call without a time-out that is known here.
    Waits,
    /// In a call with a time-out that a stop breaks.
    Limited,
    /// Maybe in the middle of a transfer, which a stop ends for good.
    Transfers,
}

/// A thread that can be tried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) tid: Pid,
    pub(super) state: u8,
    pub(super) start_time: u64,
    pub(super) fitness: Fitness,
    /// It is the first thread, or has children: signals are for it that nobody else should notice. One that the process
    /// ignores is not ignored while the thread that it is sent to is traced: it is given to some other thread then, and
    /// a call there that a stop breaks returns EINTR for it.
    parent: bool,
    first: bool,
}

impl Candidate {
    /// True if it was in a call that a stop may break.
    pub(super) fn must_be_repaired(&self) -> bool {
        matches!(self.fitness, Fitness::Waits | Fitness::Limited)
    }

    /// The less the better. What a parent may miss is rare, what a transfer loses is certain.
    fn rank(&self) -> impl Ord + use<> {
        (self.fitness == Fitness::Transfers, self.parent, self.fitness, self.first)
    }

    /// The first thread of a process, which is held already: no other is asked for.
    pub(super) fn held(tid: Pid, stat: &Stat) -> Self {
        let (state, start_time) = (stat.state, stat.start_time);
        Self { tid, state, start_time, fitness: Fitness::Runs, parent: false, first: true }
    }
}

/// The threads that can be tried, best first.
pub(super) fn candidates(pid: Pid, only: Option<Pid>) -> Result<Vec<Candidate>, ProcError> {
    let mut found = Vec::new();
    for tid in status::threads(pid)? {
        if only.is_some_and(|only| only != tid) {
            continue;
        }
        let stat = match Stat::read(tid) {
            Err(error) if error.is_gone() => continue,
            other => other?,
        };
        let fitness = match stat.state {
            b'R' => Fitness::Runs,
            b'S' | b'I' => fitness(tid),
            // D: sleeps without listening, waiting for a disk or for a vfork child. T, t, Z, X: cannot.
            _ => continue,
        };
        let (parent, first) = (has_children(pid, tid), tid == pid);
        found.push(Candidate { tid, state: stat.state, start_time: stat.start_time, fitness, parent, first });
    }
    found.sort_by_key(Candidate::rank);
    Ok(found)
}

/// The child that a thread waits for which has started it by vfork, if it is not to be stopped for that reason.
pub(super) fn vfork_child(pid: Pid, only: Option<Pid>) -> Option<Pid> {
    let threads = status::threads(pid).ok()?;
    let waits = |tid: &Pid| {
        only.is_none_or(|only| only == *tid)
            && Stat::read(*tid).is_ok_and(|stat| stat.state == b'D')
            && current_call(*tid).is_ok_and(CurrentCall::forks_or_executes)
    };
    let runs_in_its_memory = |child: &Pid| task::kcmp_vm(pid, *child).is_ok_and(Ordering::is_eq);
    threads.into_iter().filter(waits).flat_map(|tid| children(pid, tid)).find(runs_in_its_memory)
}

/// True if a thread has started a process that it, or another of its process, has not collected yet. Where the kernel
/// does not tell (CONFIG_PROC_CHILDREN), no.
fn has_children(pid: Pid, tid: Pid) -> bool {
    !children(pid, tid).is_empty()
}

fn children(pid: Pid, tid: Pid) -> Vec<Pid> {
    let listed = std::fs::read(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
    procfs::words(&listed).filter_map(procfs::decimal).filter_map(|child| i32::try_from(child).ok().map(Pid)).collect()
}

fn fitness(tid: Pid) -> Fitness {
    // In no call: it runs, or waits for a page.
    Asleep::call(tid).map_or(Fitness::Runs, |call| sort(&call))
}

fn sort(call: &Call) -> Fitness {
    if restarts(call.number.0) {
        return Fitness::Restarts;
    }
    if transfer::transfers(call) {
        return Fitness::Transfers;
    }
    let is_limited = match restart::time_out(call.number.0) {
        Some(TimeOut::Milliseconds(argument)) => (call.arguments[argument] as u32).cast_signed() >= 0,
        Some(TimeOut::Timespec(argument)) => call.arguments[argument] != 0,
        None => false,
    };
    if is_limited { Fitness::Limited } else { Fitness::Waits }
}

/// Calls that the kernel makes again by itself, with the rest of their time.
fn restarts(number: i64) -> bool {
    #[cfg(target_arch = "x86_64")]
    if matches!(number, libc::SYS_poll | libc::SYS_select | libc::SYS_pause) {
        return true;
    }
    matches!(
        number,
        libc::SYS_futex
            | libc::SYS_futex_waitv
            | libc::SYS_nanosleep
            | libc::SYS_clock_nanosleep
            | libc::SYS_ppoll
            | libc::SYS_pselect6
            | libc::SYS_wait4
            | libc::SYS_waitid
            | libc::SYS_rt_sigsuspend
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::inject::call::CallNumber;

    fn sort(number: i64, arguments: &[u64; 6]) -> Fitness {
        super::sort(&Call { number: CallNumber(number), arguments: *arguments })
    }

    #[test]
    fn threads_are_ranked_by_the_call_they_are_in() {
        assert_eq!(sort(libc::SYS_futex, &[0; 6]), Fitness::Restarts);
        assert_eq!(sort(libc::SYS_read, &[0; 6]), Fitness::Waits);
        assert_eq!(sort(libc::SYS_epoll_pwait, &[0, 0, 0, 100, 0, 0]), Fitness::Limited);
        assert_eq!(sort(libc::SYS_epoll_pwait, &[0, 0, 0, 0xffff_ffff, 0, 0]), Fitness::Waits);
        assert_eq!(sort(libc::SYS_rt_sigtimedwait, &[0, 0, 4096, 0, 0, 0]), Fitness::Limited);
        assert_eq!(sort(libc::SYS_rt_sigtimedwait, &[0; 6]), Fitness::Waits);
        assert_eq!(sort(libc::SYS_write, &[0; 6]), Fitness::Transfers);
        assert!(Fitness::Restarts < Fitness::Runs && Fitness::Waits < Fitness::Limited);
    }
}
