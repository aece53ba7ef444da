//! The guardian's work on the lease.
use std::os::fd::OwnedFd;

use kernel::ksm_sysfs::KsmSysfs;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::KsmError;
use crate::lease::Lease;
use crate::proc_stat::ProcessId;
use crate::repaired::Repaired;
use crate::state::StatePath;

/// One holder that ended, with what its lease needed.
#[derive(Debug)]
pub struct Ended {
    /// Who.
    pub process: ProcessId,
    /// What was put right; clean if it had given back by itself.
    pub repaired: Repaired,
}

/// Waits until each of `holders` has ended, by whatever death, and ends its lease. To be run in a small process of its
/// own beside the holder, in another session, so that it outlives the holder's kill -9.
///
/// `ended` is called after each. Returns when none is left to wait for.
///
/// # Errors
/// [`KsmError::Watch`] if a holder cannot be watched, before any waiting; errors of [`Lease::repair_at`].
pub fn guard(
    path: &StatePath,
    sysfs: &KsmSysfs,
    holders: &[ProcessId],
    mut ended: impl FnMut(Ended),
) -> Result<(), KsmError> {
    let mut watched = Vec::new();
    let mut gone = Vec::new();
    for &holder in holders {
        match watch(holder)? {
            Some(pidfd) => watched.push((holder, pidfd)),
            None => gone.push(holder),
        }
    }
    loop {
        for process in gone.drain(..) {
            ended(Ended { process, repaired: Lease::repair_at(path, sysfs)? });
        }
        if watched.is_empty() {
            return Ok(());
        }
        let mut fds: Vec<PollFd<'_>> = watched.iter().map(|(_, pidfd)| PollFd::new(pidfd, PollFlags::IN)).collect();
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(KsmError::Watch { pid: watched[0].0.pid, source: error.into() }),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        watched.retain(|&(process, _)| {
            let over = ready.next() == Some(true);
            if over {
                gone.push(process);
            }
            !over
        });
    }
}

/// A descriptor that becomes readable when the process has ended; `None` if it has ended already.
fn watch(holder: ProcessId) -> Result<Option<OwnedFd>, KsmError> {
    let Some(pid) = Pid::from_raw(holder.pid) else { return Ok(None) };
    match pidfd_open(pid, PidfdFlags::empty()) {
        // The pid may have been given away before the descriptor held it: the start time tells.
        Ok(pidfd) => Ok(holder.is_alive().then_some(pidfd)),
        Err(Errno::SRCH) => Ok(None),
        Err(error) => Err(KsmError::Watch { pid: holder.pid, source: error.into() }),
    }
}
