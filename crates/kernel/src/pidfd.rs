//! Process descriptors: a process named without the risk that its number is given to another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, Signal};
use thiserror::Error;

use crate::units::Pid;

/// What can go wrong with a process descriptor.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PidfdError {
    /// The process has ended.
    #[error("the process is gone")]
    Gone,
    /// The descriptor could not be had.
    #[error("cannot open a descriptor of process {pid}")]
    Open {
        /// The process.
        pid: Pid,
        /// What the kernel said.
        source: io::Error,
    },
    /// Waiting for its end failed.
    #[error("cannot wait for a process")]
    Wait {
        /// What the kernel said.
        source: io::Error,
    },
    /// The signal could not be sent.
    #[error("cannot send a signal to a process")]
    Signal {
        /// What the kernel said.
        source: io::Error,
    },
    /// Its descriptor could not be duplicated; that needs the right to attach to it.
    #[error("cannot duplicate descriptor {number} of a process")]
    GetFd {
        /// The number in that process.
        number: RawFd,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A descriptor of a process.
#[derive(Debug)]
pub struct Pidfd {
    fd: OwnedFd,
}

impl Pidfd {
    /// Opens a process by its number.
    ///
    /// # Errors
    /// [`PidfdError::Gone`], [`PidfdError::Open`].
    pub fn open(pid: Pid) -> Result<Self, PidfdError> {
        let raw = pid.to_rustix().ok_or(PidfdError::Gone)?;
        match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => Ok(Self { fd }),
            Err(Errno::SRCH) => Err(PidfdError::Gone),
            Err(source) => Err(PidfdError::Open { pid, source: source.into() }),
        }
    }

    /// Takes a descriptor that came from elsewhere, e.g. SO_PEERPIDFD.
    #[must_use]
    pub fn from_owned_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// True if the process has ended, whether or not its parent knows.
    ///
    /// # Errors
    /// [`PidfdError::Wait`].
    pub fn exited(&self) -> Result<bool, PidfdError> {
        self.wait_exited(Duration::ZERO)
    }

    /// Waits until the process has ended; false if it still lives after `timeout`.
    ///
    /// # Errors
    /// [`PidfdError::Wait`].
    pub fn wait_exited(&self, timeout: Duration) -> Result<bool, PidfdError> {
        poll_in(self.fd.as_fd(), Some(timeout)).map_err(|source| PidfdError::Wait { source })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`PidfdError::Gone`], [`PidfdError::Signal`].
    pub fn send_signal(&self, signal: Signal) -> Result<(), PidfdError> {
        match rustix::process::pidfd_send_signal(&self.fd, signal) {
            Ok(()) => Ok(()),
            Err(Errno::SRCH) => Err(PidfdError::Gone),
            Err(source) => Err(PidfdError::Signal { source: source.into() }),
        }
    }

    /// Duplicates a descriptor of the process into this one, closed on exec.
    ///
    /// # Errors
    /// [`PidfdError::Gone`], [`PidfdError::GetFd`]: EPERM without the right to attach, EBADF for a closed number.
    pub fn getfd(&self, number: RawFd) -> Result<OwnedFd, PidfdError> {
        match rustix::process::pidfd_getfd(&self.fd, number, PidfdGetfdFlags::empty()) {
            Ok(fd) => Ok(fd),
            Err(Errno::SRCH) => Err(PidfdError::Gone),
            Err(source) => Err(PidfdError::GetFd { number, source: source.into() }),
        }
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until `fd` can be read or has hung up; false if the time is over first. `None` waits for ever.
///
/// # Errors
/// What poll(2) says; signals do not end the wait.
pub fn poll_in(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<bool> {
    poll(fd, PollFlags::IN, timeout)
}

/// As [`poll_in`], and until whoever reads `out`, a pipe or a socket, has left.
///
/// # Errors
/// As [`poll_in`].
pub fn poll_in_or_left(fd: BorrowedFd<'_>, out: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<bool> {
    let fds = [(fd, PollFlags::IN), (out, PollFlags::empty())];
    poll_any(&mut fds.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)), timeout)
}

pub(crate) fn poll(fd: BorrowedFd<'_>, flags: PollFlags, timeout: Option<Duration>) -> io::Result<bool> {
    poll_any(&mut [PollFd::from_borrowed_fd(fd, flags)], timeout)
}

fn poll_any(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<bool> {
    let end = timeout.map(|timeout| std::time::Instant::now() + timeout);
    loop {
        let left = end.map(|end| end.saturating_duration_since(std::time::Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match rustix::event::poll(fds, left.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_is_watched_signalled_and_its_descriptors_taken() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let pid = Pid(child.id().cast_signed());
        let pidfd = Pidfd::open(pid).unwrap();
        assert!(!pidfd.exited().unwrap());
        assert!(!pidfd.wait_exited(Duration::from_millis(10)).unwrap());
        let stdin = pidfd.getfd(0).unwrap();
        assert!(rustix::fs::fstat(&stdin).is_ok());
        assert!(matches!(pidfd.getfd(500), Err(PidfdError::GetFd { number: 500, .. })));
        pidfd.send_signal(Signal::TERM).unwrap();
        assert!(pidfd.wait_exited(Duration::from_secs(5)).unwrap());
        child.wait().unwrap();
        assert!(matches!(pidfd.send_signal(Signal::TERM), Err(PidfdError::Gone)));
        assert!(matches!(pidfd.getfd(0), Err(PidfdError::Gone)));
        assert!(matches!(Pidfd::open(pid), Err(PidfdError::Gone)));
        assert!(matches!(Pidfd::open(Pid(-1)), Err(PidfdError::Gone)));
    }
}
