//! When everything that a process starts is as the process is.

use std::time::{Duration, Instant};

use kernel::inject::{Call, Options, inject};
use kernel::stat::Stat;
use kernel::{CurrentCall, Pid, current_call, status, task};

/// Looks at a running thread before it is stopped to be sure.
const PATIENCE: u32 = 20;
const PAUSE: Duration = Duration::from_millis(1);
/// With less time left a thread is not stopped: it would hardly come to its call.
const LEAST: Duration = Duration::from_millis(50);

/// Waits until no fork and no exec is under way in a process that began before this call; false if that took too long, or is to stop.
///
/// A fork takes over the state of the parent early, and the child can be seen late: a child of a thread that was in the
/// middle of it when the process was enabled is not enabled, and may not be in the next list of processes yet. An exec
/// likewise. So every thread has to be seen once outside of these calls: what it began before can be seen by then, and what
/// it begins later inherits. Most threads sleep in some other call, and /proc tells. One that runs is asked to do a
/// harmless call, which it can only do outside of any other.
pub(crate) fn settle(pid: Pid, deadline: Instant, stop: &dyn Fn() -> bool) -> bool {
    let Ok(mut open) = status::threads(pid) else { return true };
    for look in 0.. {
        let mut ended = false;
        open.retain(|tid| match current_call(*tid) {
            Ok(CurrentCall::Running) => !is_worker(*tid),
            Ok(call) => call.forks_or_executes(),
            Err(error) if error.is_gone() => {
                ended = true;
                false
            }
            Err(_) => true,
        });
        // A thread that executes a program ends all others and takes the number of the first, before the program is
        // exchanged: the end of a thread may be that, and the first one is to be looked at again.
        if ended && !open.contains(&pid) && status::threads(pid).is_ok() {
            open.push(pid);
        }
        if open.is_empty() || wait_for_their_vforks(pid, &open) {
            return true;
        }
        if Instant::now() >= deadline || stop() {
            return false;
        }
        if look >= PATIENCE {
            open.retain(|tid| !does_a_call(pid, *tid, deadline));
        }
        std::thread::sleep(PAUSE);
    }
    unreachable!("the loop has no end of its own")
}

/// Threads that the kernel runs in a process start nothing.
fn is_worker(tid: Pid) -> bool {
    Stat::read(tid).is_ok_and(|stat| stat.is_worker())
}

/// Has a thread that runs do a call that changes nothing. False if it did not come to it.
fn does_a_call(pid: Pid, tid: Pid, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    if left < LEAST || !current_call(tid).is_ok_and(|call| call == CurrentCall::Running) {
        return false;
    }
    let timeout = left.min(Duration::from_secs(1));
    inject(pid, &[Call::getpid()], &Options { timeout, tid: Some(tid), ..Options::default() }).is_ok()
}

/// True if each of these threads waits for the child of a vfork(2): the child can be seen, and has the parent's memory, the
/// marks too, until it executes something, which takes them over.
fn wait_for_their_vforks(pid: Pid, threads: &[Pid]) -> bool {
    if !threads.iter().all(|tid| current_call(*tid).is_ok_and(CurrentCall::forks_or_executes)) {
        return false;
    }
    let is_borrower = |child: &Pid| {
        Stat::read(*child).is_ok_and(|stat| stat.parent == pid)
            && task::kcmp_vm(pid, *child).is_ok_and(|order| order.is_eq())
    };
    let borrowers = status::processes().unwrap_or_default().iter().filter(|child| is_borrower(child)).count();
    borrowers >= threads.len()
}
