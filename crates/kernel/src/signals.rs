//! Signals as something to read: blocked for the process and taken from a descriptor, with who sent them.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Signal;

use crate::sys;
use crate::units::Pid;

/// One signal that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// Which.
    pub signal: Signal,
    /// The process that sent it; `None` for the kernel, as for the keys of a terminal, which sends to the whole
    /// foreground group.
    pub sender: Option<Pid>,
}

/// Signals that this thread, and threads that it starts from now on, take from a descriptor.
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
}

impl SignalFd {
    /// Blocks the signals and opens the descriptor. To be called before there are other threads: one that has a signal
    /// open takes it the usual way. A child is started with what std gives it, an empty mask.
    ///
    /// # Errors
    /// What signalfd(2) says.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        let set = set_of(signals);
        // SAFETY: the set is initialised; the old mask is not asked for.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: the set is initialised and lives until the call returns.
        let raw = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        sys::check(raw.into())?;
        // SAFETY: the number was opened by the call above and belongs to nobody else.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(raw) } })
    }

    /// The next signal that has arrived, `None` if none is waiting.
    ///
    /// # Errors
    /// What read(2) says.
    pub fn take(&self) -> io::Result<Option<Arrived>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is writable for `size` bytes and lives until the call returns.
        let result = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        match sys::check(result as i64) {
            Ok(length) if length as usize == size => {}
            Ok(_) => return Ok(None),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        // SAFETY: the kernel filled in the whole structure.
        let info = unsafe { info.assume_init() };
        let Some(signal) = Signal::from_named_raw(info.ssi_signo.cast_signed()) else { return Ok(None) };
        // Zero and below are the codes of processes (kill, sigqueue, tgkill); the kernel's are above.
        let sender = (info.ssi_code <= 0).then_some(Pid(info.ssi_pid.cast_signed()));
        Ok(Some(Arrived { signal, sender }))
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Ends this process by a signal as if it had never been handled: default action, not blocked. Returns if that did not
/// end it.
pub fn die_by(signal: Signal) {
    let number = signal.as_raw();
    let set = set_of(&[signal]);
    // SAFETY: the default action calls nothing of ours; the set is initialised; the old mask is not asked for.
    unsafe {
        libc::signal(number, libc::SIG_DFL);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        libc::raise(number);
    }
}

fn set_of(signals: &[Signal]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for signal in signals {
        // SAFETY: the set is initialised.
        unsafe { libc::sigaddset(&raw mut set, signal.as_raw()) };
    }
    set
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_signal_is_read_with_its_sender() {
        // A thread of its own: the mask dies with it. WINCH is ignored by default, should it reach another thread.
        std::thread::spawn(|| {
            let signals = SignalFd::block(&[Signal::WINCH]).unwrap();
            assert_eq!(signals.take().unwrap(), None);
            // SAFETY: a signal that this thread blocks, to this thread.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGWINCH) };
            let arrived = signals.take().unwrap().unwrap();
            assert_eq!(arrived, Arrived { signal: Signal::WINCH, sender: Some(Pid::this()) });
        })
        .join()
        .unwrap();
    }
}
