//! One injector at a time in an address space.
//!
//! Two of them in two threads would write into the same slot. What they can lock without a place of its own is
//! `/proc/PID/mem`: only those can open it who may attach, so nobody else keeps them from it. The process
//! itself can, for as long as it likes, so it is waited for only as long as some injections at once take. It is another file
//! in each mount of proc, as containers and services have. So the inode behind the descriptor of a process is locked too:
//! one for each process since Linux 6.9, before that one for all. Everybody can hold that one, so it is not waited for as
//! long, and then done without.
//!
//! A process may run in the memory of its parent (between vfork and exec, and where clone was told so): then the parent
//! is locked too. The locks go with their holder.
//!
//! Not seen are two children in the memory of a parent that has ended.

use std::cmp::Ordering;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat};
use rustix::io::Errno;

use super::refusal::{InjectError, Refusal};
use crate::pidfd::Pidfd;
use crate::stat::Stat;
use crate::task;
use crate::units::Pid;

/// How long the lock is waited for that those can hold who may attach: many of them at once wait for one another.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long a lock is waited for that everybody can hold: many times an injection.
const MOMENT: Duration = Duration::from_millis(50);

/// The locks, held until it is dropped.
#[derive(Debug)]
pub(super) struct Lock {
    _held: Vec<(Option<OwnedFd>, Pidfd)>,
}

impl Lock {
    /// Takes the lock of a process, which is busy if somebody else has it up to the deadline, or for long. The child's comes
    /// before the parent's, so nobody waits in a circle.
    pub(super) fn take(pid: Pid, process: Pidfd, deadline: Instant) -> Result<Self, InjectError> {
        match Self::wait_for_all(pid, process, deadline) {
            Ok(Some(lock)) => Ok(lock),
            Ok(None) => Err(InjectError::Refused { pid, refusal: Refusal::Busy }),
            Err(source) => Err(InjectError::Setup { pid, source }),
        }
    }

    fn wait_for_all(pid: Pid, process: Pidfd, deadline: Instant) -> io::Result<Option<Self>> {
        let inode = fstat(&process)?.st_ino;
        let Some(first) = wait_for(pid, process, deadline)? else { return Ok(None) };
        let (mut held, mut child) = (vec![first], pid);
        while let Ok(Stat { parent, .. }) = Stat::read(child)
            && parent.0 > 0
            && task::kcmp_vm(child, parent).is_ok_and(Ordering::is_eq)
            && let Ok(process) = Pidfd::open(parent)
            && fstat(&process)?.st_ino != inode
        {
            let Some(next) = wait_for(parent, process, deadline)? else { return Ok(None) };
            held.push(next);
            child = parent;
        }
        Ok(Some(Self { _held: held }))
    }
}

/// Both locks of one process. `None` if it is busy.
fn wait_for(pid: Pid, process: Pidfd, deadline: Instant) -> io::Result<Option<(Option<OwnedFd>, Pidfd)>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let memory = match rustix::fs::open(format!("/proc/{pid}/mem"), flags, Mode::empty()) {
        Ok(memory) => Some(memory),
        Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => return Err(error.into()),
        // It has none, or not for us: what comes next says so.
        Err(_) => None,
    };
    if let Some(memory) = &memory
        && !is_locked(memory, deadline.min(Instant::now() + PATIENCE))?
    {
        return Ok(None);
    }
    is_locked(&process, deadline.min(Instant::now() + MOMENT))?;
    Ok(Some((memory, process)))
}

/// Locks a file, or does not by the deadline.
fn is_locked(file: impl AsFd, deadline: Instant) -> io::Result<bool> {
    loop {
        match flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() >= deadline => return Ok(false),
            // An injection takes less than a millisecond.
            Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_micros(200)),
            Err(error) => return Err(error.into()),
        }
    }
}
