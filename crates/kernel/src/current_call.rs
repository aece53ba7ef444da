//! Which system call a thread is in (/proc/PID/task/TID/syscall).

use crate::procfs::{self, ProcError};
use crate::units::Pid;

/// What a thread did at a moment during the look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CurrentCall {
    /// It ran or was ready to: in which mode cannot be told.
    Running,
    /// It slept outside of any system call: in a page fault, stopped, or in a new thread's first steps.
    Outside,
    /// It slept in the system call with this number.
    Sleeping(i64),
}

impl CurrentCall {
    /// True in a call that makes a process or a thread, or executes a program. One that waits for the child of its vfork(2)
    /// is still in it.
    #[must_use]
    pub fn forks_or_executes(self) -> bool {
        let Self::Sleeping(number) = self else { return false };
        #[cfg(target_arch = "x86_64")]
        let of_this_machine = [libc::SYS_fork, libc::SYS_vfork];
        #[cfg(not(target_arch = "x86_64"))]
        let of_this_machine: [libc::c_long; 0] = [];
        [libc::SYS_clone, libc::SYS_clone3, libc::SYS_execve, libc::SYS_execveat].contains(&number)
            || of_this_machine.contains(&number)
    }
}

/// Looks at a thread.
///
/// # Errors
/// [`ProcError::Gone`], [`ProcError::Denied`] without the right to attach to it.
pub fn current_call(tid: Pid) -> Result<CurrentCall, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(tid, "syscall", &mut buffer)?;
    parse(&buffer).ok_or_else(|| ProcError::Parse { path: format!("/proc/{tid}/syscall"), line: procfs::text(&buffer) })
}

pub(crate) fn parse(text: &[u8]) -> Option<CurrentCall> {
    match procfs::words(text).next()? {
        b"running" => Some(CurrentCall::Running),
        b"-1" => Some(CurrentCall::Outside),
        number => procfs::decimal(number)?.try_into().ok().map(CurrentCall::Sleeping),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::process::Command;
    use std::time::Duration;

    fn becomes(tid: Pid, wanted: impl Fn(CurrentCall) -> bool) -> bool {
        (0..400).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            current_call(tid).is_ok_and(&wanted)
        })
    }

    #[test]
    fn a_sleeper_and_a_runner() {
        let mut sleeper = Command::new("sleep").arg("60").spawn().unwrap();
        let slept = becomes(Pid(sleeper.id().cast_signed()), |call| {
            call == CurrentCall::Sleeping(libc::SYS_clock_nanosleep) && !call.forks_or_executes()
        });
        let mut runner = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let ran = becomes(Pid(runner.id().cast_signed()), |call| call == CurrentCall::Running);
        for child in [&mut sleeper, &mut runner] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(slept && ran);
        assert!(current_call(Pid(i32::MAX)).unwrap_err().is_gone());
    }

    #[test]
    fn what_the_file_says() {
        assert_eq!(parse(b"running\n"), Some(CurrentCall::Running));
        assert_eq!(parse(b"-1 0x7ffc 0x7f00\n"), Some(CurrentCall::Outside));
        assert_eq!(parse(b"232 0x4 0x7ffe 0x1 0x0\n"), Some(CurrentCall::Sleeping(232)));
        assert!(CurrentCall::Sleeping(libc::SYS_clone3).forks_or_executes());
        assert!(CurrentCall::Sleeping(libc::SYS_execve).forks_or_executes());
        assert!(
            !CurrentCall::Sleeping(libc::SYS_read).forks_or_executes() && !CurrentCall::Running.forks_or_executes()
        );
        assert_eq!(parse(b"\n"), None);
    }
}
