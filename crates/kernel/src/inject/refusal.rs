//! Why nothing was injected, found out before anything is touched where that can be.

use std::io;
use std::time::Duration;

use thiserror::Error;

use super::call::CallNumber;
use crate::procfs::ProcError;
use crate::stat::Stat;
use crate::units::Pid;
use crate::{membership, program, status};

/// What about a process or all its threads forbids to run calls in it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It has ended.
    #[error("it has ended")]
    Gone,
    /// It has ended, and its parent has not collected it.
    #[error("it is a zombie: it has ended, its parent has not collected it")]
    Zombie,
    /// It has no address space.
    #[error("it is a thread of the kernel")]
    KernelThread,
    /// It is the calling process, which needs no injection.
    #[error("it is this process itself")]
    Own,
    /// The number is that of another thread than a process's first.
    #[error("it is a thread of process {of}, which is the one to be named")]
    Thread {
        /// The process.
        of: Pid,
    },
    /// Its code is 32-bit.
    #[error("it is a 32-bit program")]
    Other32Bit,
    /// A debugger or another tracer has it.
    #[error("process {by} traces it (a debugger, strace, a sandbox)")]
    Traced {
        /// The tracer, 0 where it is in a process namespace that is not seen here.
        by: Pid,
    },
    /// A stop signal holds it.
    #[error("it is stopped (SIGSTOP or Ctrl-Z); SIGCONT lets it go on")]
    Stopped,
    /// Its cgroup is frozen.
    #[error("its cgroup is frozen")]
    Frozen,
    /// The kernel does not let this user attach to it.
    #[error("not permitted to attach to it: {reason}")]
    NotPermitted {
        /// What most likely forbids it.
        reason: String,
    },
    /// A seccomp filter would not let one of the calls through.
    #[error("seccomp filter {filter} answers call {} with {action}", call.0)]
    Seccomp {
        /// Which, counted from 0, the newest.
        filter: usize,
        /// What it would do.
        action: &'static str,
        /// The call.
        call: CallNumber,
    },
    /// Strict mode: read, write and exit only.
    #[error("it is in seccomp's strict mode")]
    SeccompStrict,
    /// It has filters, which cannot be read.
    #[error("it has seccomp filters, and reading them needs CAP_SYS_ADMIN and CONFIG_CHECKPOINT_RESTORE ({source})",
        source = io::Error::from_raw_os_error(*errno))]
    SeccompUnreadable {
        /// What the kernel said.
        errno: i32,
    },
    /// Its system calls are caught by PR_SET_SYSCALL_USER_DISPATCH (Wine).
    #[error("its system calls are caught by itself (PR_SET_SYSCALL_USER_DISPATCH)")]
    SyscallUserDispatch,
    /// It steps through its own code, so every instruction raises a signal.
    #[error("it runs with the trap flag set")]
    TrapFlag,
    /// It runs its own code, and a call would clear registers of which the kernel keeps a part only (SVE, on aarch64).
    #[error("it runs its own code, and a call would clear its SVE registers")]
    WideRegisters,
    /// It was stopped inside a call of the 32-bit interface.
    #[error("it is inside a call of another system-call interface")]
    OtherInterface,
    /// No thread stopped in time.
    #[error("none of its threads stopped in time; the last was in state {}", char::from(*state))]
    WontStop {
        /// State letter of /proc/PID/stat.
        state: u8,
    },
    /// All of its threads wait for a child that runs in its memory, until that executes a program or ends. Nothing else
    /// stops such a wait.
    #[error("it waits for process {child}, which it has started by vfork, to execute a program")]
    Vfork {
        /// The child.
        child: Pid,
    },
    /// Neither the vDSO nor anything else has room for the code.
    #[error("no place for the code: {why}")]
    NoPlaceForCode {
        /// What was missing.
        why: &'static str,
    },
    /// Another injector is at work on it.
    #[error("another injector is at work on it")]
    Busy,
}

impl Refusal {
    /// One word, for documents.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Zombie => "zombie",
            Self::KernelThread => "kernel_thread",
            Self::Own => "own",
            Self::Thread { .. } => "thread",
            Self::Other32Bit => "other_32_bit",
            Self::Traced { .. } => "traced",
            Self::Stopped => "stopped",
            Self::Frozen => "frozen",
            Self::NotPermitted { .. } => "not_permitted",
            Self::Seccomp { .. } => "seccomp",
            Self::SeccompStrict => "seccomp_strict",
            Self::SeccompUnreadable { .. } => "seccomp_unreadable",
            Self::SyscallUserDispatch => "syscall_user_dispatch",
            Self::TrapFlag => "trap_flag",
            Self::WideRegisters => "wide_registers",
            Self::OtherInterface => "other_interface",
            Self::WontStop { .. } => "wont_stop",
            Self::Vfork { .. } => "vfork",
            Self::NoPlaceForCode { .. } => "no_place_for_code",
            Self::Busy => "busy",
        }
    }
}

/// What can go wrong with an injection.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InjectError {
    /// Nothing was done, for a reason that lies in the process.
    #[error("process {pid} is left alone: {refusal}")]
    Refused {
        /// The process.
        pid: Pid,
        /// Why.
        refusal: Refusal,
    },
    /// A call did not return in time. The thread finishes it and goes on by itself.
    #[error("a call in thread {tid} of process {pid} did not return within {} s; the thread finishes it by itself", after.as_secs_f64())]
    Unfinished {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Pid,
        /// How long it was waited for.
        after: Duration,
    },
    /// A file under /proc could not be read or understood.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// The kernel refused a step that should work; the thread goes on as it was.
    #[error("cannot {what} thread {tid} of process {pid}")]
    Ptrace {
        /// The step.
        what: &'static str,
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Pid,
        /// What the kernel said.
        source: io::Error,
    },
    /// No thread could be started here, or no descriptor opened.
    #[error("cannot set up the injection into process {pid}")]
    Setup {
        /// The process.
        pid: Pid,
        /// What the kernel said.
        source: io::Error,
    },
}

impl InjectError {
    /// The reason that lies in the process, if there is one.
    #[must_use]
    pub const fn refusal(&self) -> Option<&Refusal> {
        if let Self::Refused { refusal, .. } = self { Some(refusal) } else { None }
    }
}

/// Looks for what forbids injection, without touching the process.
pub(super) fn look(pid: Pid) -> Result<Option<Refusal>, ProcError> {
    Ok(match examine(pid) {
        Err(error) if error.is_gone() => Some(Refusal::Gone),
        other => other?,
    })
}

fn examine(pid: Pid) -> Result<Option<Refusal>, ProcError> {
    let status = status::read(pid)?;
    if status.tgid != status.pid {
        return Ok(Some(Refusal::Thread { of: Pid(status.tgid) }));
    }
    if Stat::read(pid)?.is_kernel_thread() {
        return Ok(Some(Refusal::KernelThread));
    }
    if matches!(status.state, b'X' | b'x') {
        return Ok(Some(Refusal::Gone));
    }
    if status.tracer_pid != 0 || status.state == b't' {
        return Ok(Some(traced_by(Pid(status.tracer_pid))));
    }
    match status.state {
        // The first thread of a process may have ended before the others.
        b'Z' if !any_alive(pid)? => return Ok(Some(Refusal::Zombie)),
        b'T' => return Ok(Some(Refusal::Stopped)),
        _ => {}
    }
    if membership::is_frozen(pid)? {
        return Ok(Some(Refusal::Frozen));
    }
    match program::program(pid) {
        Ok(found) if found.is_64_bit == Some(false) => Ok(Some(Refusal::Other32Bit)),
        // Whoever may not look at the program may not attach either: that says why.
        Ok(_) | Err(ProcError::Denied { .. }) => Ok(None),
        // The link of a process whose first thread has ended cannot be read.
        Err(error) if error.is_gone() && status.state == b'Z' => Ok(None),
        Err(error) => Err(error),
    }
}

/// The kernel names the thread that traces.
fn traced_by(tracer: Pid) -> Refusal {
    Refusal::Traced { by: status::read(tracer).map_or(tracer, |status| Pid(status.tgid)) }
}

fn any_alive(pid: Pid) -> Result<bool, ProcError> {
    let threads = status::threads(pid)?;
    Ok(threads.into_iter().any(|tid| !Stat::has_ended(tid)))
}

/// Why an attachment was refused with EPERM.
pub(super) fn not_permitted(pid: Pid, tid: Pid) -> Refusal {
    let tracer = status::read(tid).map_or(0, |status| status.tracer_pid);
    if tracer != 0 {
        return traced_by(Pid(tracer));
    }
    let reason = match (status::read(pid), std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope")) {
        (Err(error), _) if error.is_gone() => return Refusal::Gone,
        (_, Ok(scope)) if scope.trim() == "3" => "kernel.yama.ptrace_scope is 3".to_owned(),
        (Ok(status), _) if status.uid.real != rustix::process::geteuid().as_raw() => {
            format!("it belongs to user {}, this needs CAP_SYS_PTRACE", status.uid.real)
        }
        (Ok(status), _) if status.uid.real != status.uid.effective => {
            format!("it runs with the rights of user {} (setuid), this needs CAP_SYS_PTRACE", status.uid.effective)
        }
        (_, Ok(scope)) if scope.trim() != "0" => {
            format!("kernel.yama.ptrace_scope is {}, this needs CAP_SYS_PTRACE", scope.trim())
        }
        _ => "it is protected (setuid, file capabilities, PR_SET_DUMPABLE or a security module), this needs CAP_SYS_PTRACE"
            .to_owned(),
    };
    Refusal::NotPermitted { reason }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn what_is_seen_beforehand() {
        assert_eq!(look(Pid(i32::MAX)).unwrap(), Some(Refusal::Gone));
        assert!(!Stat::read(Pid::this()).unwrap().is_kernel_thread());
        if rustix::process::geteuid().is_root() {
            assert_eq!(look(Pid(2)).unwrap(), Some(Refusal::KernelThread));
        }
    }
}
