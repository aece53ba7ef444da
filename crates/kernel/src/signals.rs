//! Signals as something to read: blocked for the process and taken from a descriptor, with who sent them.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

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
pub struct SignalFd {
    fd: OwnedFd,
    before: libc::sigset_t,
}

impl SignalFd {
    /// Blocks the signals and opens the descriptor. To be called before there are other threads: one that has a signal
    /// open takes it the usual way. Children inherit the block: see [`SignalFd::restore_in`].
    ///
    /// # Errors
    /// What signalfd(2) says.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        let set = set_of(signals);
        let mut before = set_of(&[]);
        // SAFETY: the set is initialised, the old mask is writable, and both live until the call returns.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: the set is initialised and lives until the call returns.
        let raw = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        sys::check(raw.into())?;
        // SAFETY: the number was opened by the call above and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd, before })
    }

    /// Gives a command the signal mask that there was before the block.
    pub fn restore_in(&self, command: &mut Command) {
        let before = self.before;
        // SAFETY: the closure makes one system call, on a set of its own.
        unsafe {
            command.pre_exec(move || {
                match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) {
                    0 => Ok(()),
                    error => Err(io::Error::from_raw_os_error(error)),
                }
            })
        };
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

impl fmt::Debug for SignalFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignalFd").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits for children that ended, `keep` apart, as a child subreaper must for those that it adopted: until `keep` has
/// ended itself or nobody else has. Takes the status of every other child.
pub fn reap_others(keep: Pid) {
    loop {
        // SAFETY: the structure is plain integers, for which zeros are valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: the structure is writable and lives until the call returns.
        let result = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, options) };
        // SAFETY: waitid filled in the part of the structure that is about children, or left zeros.
        let pid = unsafe { info.si_pid() };
        if result == -1 || pid == 0 || pid == keep.0 {
            return;
        }
        // SAFETY: a null status is not written to.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
    }
}

/// Ends this process by a signal as if it had never been handled: default action, not blocked, without a core dump of
/// its own. Returns if that did not end it.
pub fn die_by(signal: Signal) {
    let number = signal.as_raw();
    let set = set_of(&[signal]);
    let no_core = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is readable; the default action calls nothing of ours; the set is initialised; the old mask
    // is not asked for.
    unsafe {
        libc::setrlimit64(libc::RLIMIT_CORE, &raw const no_core);
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
        // Its own thread: the mask dies with it. WINCH is ignored by default, should it reach another thread.
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

    #[test]
    fn a_command_has_the_mask_that_there_was_before() {
        std::thread::spawn(|| {
            let blocked = |restore: bool| {
                let signals = SignalFd::block(&[Signal::WINCH]).unwrap();
                let mut command = Command::new("grep");
                command.args(["SigBlk", "/proc/self/status"]);
                if restore {
                    signals.restore_in(&mut command);
                }
                String::from_utf8(command.output().unwrap().stdout).unwrap()
            };
            let restored = blocked(true);
            let inherited = blocked(false);
            assert!(restored.trim_end().ends_with("0000000"), "{restored}");
            assert!(inherited.trim_end().ends_with("8000000"), "{inherited}");
        })
        .join()
        .unwrap();
    }
}
