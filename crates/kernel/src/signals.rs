//! Signals as something to read: blocked for the process and taken from a descriptor, with who sent them.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::Signal;

use crate::pidfd::Pidfd;
use crate::sys;
use crate::units::Pid;

mod start;
mod stops;

pub use stops::StopsHeld;

/// What comes to a process that stands for another one and can be passed on. Not among them: what nobody can take (KILL,
/// STOP), what the kernel sends for a mistake of this process's own (SEGV and its like), and job control (TSTP, TTIN,
/// TTOU), which stops both of them as it should.
const FORWARDABLE: [Signal; 20] = [
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::ABORT,
    Signal::USR1,
    Signal::USR2,
    Signal::PIPE,
    Signal::ALARM,
    Signal::TERM,
    Signal::STKFLT,
    Signal::CHILD,
    Signal::CONT,
    Signal::URG,
    Signal::XCPU,
    Signal::XFSZ,
    Signal::VTALARM,
    Signal::PROF,
    Signal::WINCH,
    Signal::IO,
    Signal::POWER,
];

/// One signal that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// Which. Real-time signals have no name.
    pub number: i32,
    /// The process that sent it; `None` for the kernel, as for the keys of a terminal, which sends to the whole
    /// foreground group.
    pub sender: Option<Pid>,
}

impl Arrived {
    /// Which, if it has a name.
    #[must_use]
    pub fn signal(&self) -> Option<Signal> {
        Signal::from_named_raw(self.number)
    }

    /// Sends the same signal to a process.
    ///
    /// # Errors
    /// What pidfd_send_signal(2) says.
    pub fn pass_on(&self, to: &Pidfd) -> io::Result<()> {
        let (fd, no_info) = (to.as_fd().as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: the call takes integers, and a null pointer that it does not follow.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, self.number, no_info, 0) };
        sys::check(result).map(|_| ())
    }

    /// Who sent it; `None` if the kernel did, as for a key of the terminal. 0 is a process outside of this PID namespace.
    #[must_use]
    pub fn sender(&self) -> Option<Pid> {
        self.sender
    }

    /// True if a process that this one stands for should be sent the signal, since it has not got it by itself.
    ///
    /// What the kernel sends comes from the terminal and goes to a whole process group, so a process of the same group
    /// has it already. The exception is a terminal that hangs up: it tells the session's leader alone. Timers that were
    /// set before this program was executed are meant for whatever it stands for; limits (XCPU, XFSZ) are its own.
    ///
    /// A process that signals the one that stands for it would otherwise hit itself: sudo(8) has the same exception. And
    /// what this process has from itself is what the kernel sends for a pipe without a reader or a file that is too
    /// large.
    #[must_use]
    pub fn is_for(&self, process: Pid) -> bool {
        if let Some(sender) = self.sender {
            return sender != process && sender != Pid::this();
        }
        match self.signal() {
            Some(Signal::HUP | Signal::CONT) if leads_session() => true,
            Some(Signal::HUP | Signal::INT | Signal::QUIT | Signal::WINCH | Signal::CONT) => {
                group_of(process) != group_of(Pid::this())
            }
            Some(Signal::ALARM | Signal::VTALARM | Signal::PROF) => true,
            _ => false,
        }
    }
}

/// Signals that this thread, and threads that it starts from now on, take from a descriptor.
pub struct SignalFd {
    fd: OwnedFd,
    before: libc::sigset_t,
}

impl SignalFd {
    /// [`SignalFd::block`] for all that can be passed on to a process that this one stands for, real-time signals
    /// included. Writing beyond RLIMIT_FSIZE is an error from then on and does not end the process.
    ///
    /// # Errors
    /// What signalfd(2) says.
    pub fn block_forwardable() -> io::Result<Self> {
        let real_time = libc::SIGRTMIN()..=libc::SIGRTMAX();
        Self::block_numbers(FORWARDABLE.iter().map(|signal| signal.as_raw()).chain(real_time))
    }

    /// Blocks the signals and opens the descriptor. To be called before there are other threads: one that has a signal
    /// open takes it the usual way. Children inherit the block: see [`SignalFd::restore_in`].
    ///
    /// # Errors
    /// What signalfd(2) says.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        Self::block_numbers(signals.iter().map(|signal| signal.as_raw()))
    }

    fn block_numbers(numbers: impl Iterator<Item = i32>) -> io::Result<Self> {
        let set = set_of(numbers);
        let mut before = set_of(std::iter::empty());
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

    /// Gives a command the signal mask that there was before the block, and SIGPIPE and SIGCHLD as this process was
    /// started with: Rust's run-time ignores the one here and resets it in children, whatever the caller had wanted for
    /// them, and the other is reset by [`keep_ended_children`].
    pub fn restore_in(&self, command: &mut Command) {
        let before = self.before;
        let ignored = [(libc::SIGPIPE, start::ignored_pipe()), (libc::SIGCHLD, start::ignored_child())];
        // SAFETY: the closure makes system calls only, on a set of its own; SIG_IGN is no code of ours.
        unsafe {
            command.pre_exec(move || {
                for (signal, ignore) in ignored {
                    if ignore && libc::signal(signal, libc::SIG_IGN) == libc::SIG_ERR {
                        return Err(io::Error::last_os_error());
                    }
                }
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
        // Zero and below are the codes of processes (kill, sigqueue, tgkill); the kernel's are above.
        let sender = (info.ssi_code <= 0).then_some(Pid(info.ssi_pid.cast_signed()));
        Ok(Some(Arrived { number: info.ssi_signo.cast_signed(), sender }))
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

/// Has ended children keep their status until they are waited for. Whoever executed this program may have had it ignore
/// SIGCHLD, and then the kernel throws the status away and tells nobody of the end. To be called before there are
/// children; [`SignalFd::restore_in`] gives it back to a command.
pub fn keep_ended_children() {
    if start::ignored_child() {
        // SAFETY: the default action calls nothing of ours. It fails for no valid signal.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
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
pub fn die_by(number: i32) {
    let set = set_of(std::iter::once(number));
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

/// A process's group. Zero stands for a group that has no number in this PID namespace, as in a container whose first
/// process was given no session of its own: rustix takes that for impossible.
fn group_of(process: Pid) -> i32 {
    // SAFETY: the call takes an integer.
    unsafe { libc::getpgid(process.0) }
}

/// True if a terminal that hangs up tells this process alone.
fn leads_session() -> bool {
    // SAFETY: the call takes an integer.
    unsafe { libc::getsid(0) == libc::getpid() }
}

fn set_of(numbers: impl Iterator<Item = i32>) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for number in numbers {
        // SAFETY: the set is initialised.
        unsafe { libc::sigaddset(&raw mut set, number) };
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
            assert_eq!(arrived, Arrived { number: libc::SIGWINCH, sender: Some(Pid::this()) });
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_process_gets_what_it_has_not_got_by_itself() {
        use std::os::unix::process::CommandExt;
        let sleeper = |own_group: bool| {
            let mut command = Command::new("sleep");
            command.arg("60");
            if own_group {
                command.process_group(0);
            }
            command.spawn().unwrap()
        };
        let (mut with_us, mut apart) = (sleeper(false), sleeper(true));
        let pid = |child: &std::process::Child| Pid(child.id().cast_signed());
        let from = |signal: Signal, sender: Option<Pid>| Arrived { number: signal.as_raw(), sender };
        assert_eq!(from(Signal::HUP, None).is_for(pid(&with_us)), leads_session());
        assert!(!from(Signal::INT, None).is_for(pid(&with_us)), "a key reaches the whole group");
        for signal in [Signal::HUP, Signal::INT, Signal::WINCH] {
            assert!(from(signal, None).is_for(pid(&apart)), "{signal:?} reaches one group only");
        }
        assert!(from(Signal::ALARM, None).is_for(pid(&with_us)), "a timer that was set before");
        assert!(!from(Signal::XFSZ, None).is_for(pid(&apart)), "a limit of this process's own");
        assert!(from(Signal::USR2, Some(Pid(0))).is_for(pid(&with_us)), "somebody outside of this PID namespace");
        assert!(!from(Signal::PIPE, Some(Pid::this())).is_for(pid(&with_us)), "a pipe that this process wrote to");
        assert!(!from(Signal::TERM, Some(pid(&with_us))).is_for(pid(&with_us)), "it would hit itself");
        for child in [&mut with_us, &mut apart] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Groups and sessions from outside a PID namespace have the number 0 in it.
    #[test]
    fn groups_of_another_namespace_are_groups() {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--pid", "--fork", "--mount-proc"]).arg(std::env::current_exe().unwrap());
        let name = "signals::tests::a_process_gets_what_it_has_not_got_by_itself";
        let output = command.args(["--exact", name]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
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
