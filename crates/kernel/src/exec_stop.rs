//! Stopping a started command between its exec and its first instruction.
//!
//! The kernel lays out an address space with the limits that hold at exec. Who wants the command itself to find other
//! limits has to set them after that and before the program, the loader included, can look: in the exec stop of
//! ptrace(2). The command is seized for that moment only, by a thread of the launcher, and goes on untraced.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;

use crate::launch::{Launch, LaunchError, Launched};
use crate::ptrace::{request, wait_id};
use crate::units::Pid;

/// What became of the stop.
#[derive(Debug)]
pub enum ExecStop {
    /// The command was stopped, and the work was done.
    Done,
    /// It ended, or was taken over, before its exec was through.
    Ended,
    /// It could not be traced (seccomp, Yama, a launcher that is traced as a whole): it runs, the work was not done.
    NotTraced(io::Error),
}

/// Starts a command and does `work` when it has executed its program and before that runs.
///
/// A program with setuid or setgid bits or file capabilities gets no privileges while it is traced by a launcher
/// without CAP_SYS_PTRACE: those are to be started without this.
///
/// # Errors
/// [`LaunchError`].
pub fn spawn_with(mut launch: Launch, work: impl FnOnce(Pid) + Send) -> Result<(Launched, ExecStop), LaunchError> {
    let pipe_error = |source| LaunchError::Setup { what: "a pipe", source };
    let (told_child, tell_child) = io::pipe().map_err(pipe_error)?;
    let (told_thread, tell_thread) = io::pipe().map_err(pipe_error)?;
    let (say, hear) = (tell_thread.as_raw_fd(), told_child.as_raw_fd());
    let deaf = tell_child.as_raw_fd();
    // SAFETY: the closure makes system calls only, on descriptors that are open until this function returns.
    unsafe {
        launch.command().pre_exec(move || {
            // The child's copy of the other end must not keep its own read from ending if the launcher dies.
            libc::close(deaf);
            let pid = libc::getpid();
            libc::write(say, (&raw const pid).cast(), size_of_val(&pid));
            let mut answer = 0_u8;
            // Whatever comes back, a byte or the end, the command is started.
            while libc::read(hear, (&raw mut answer).cast(), 1) == -1 && *libc::__errno_location() == libc::EINTR {}
            Ok(())
        })
    };
    std::thread::scope(|scope| {
        // Tracing belongs to a thread, and this one waits inside spawn() until the exec is through.
        let tracer = std::thread::Builder::new()
            .spawn_scoped(scope, move || trace(told_thread, tell_child, work))
            .map_err(|source| LaunchError::Setup { what: "a thread", source })?;
        let spawned = launch.spawn();
        // Where no child was made, the thread still waits for one to speak.
        drop(tell_thread);
        let stop = tracer.join().unwrap_or_else(|_| ExecStop::NotTraced(io::ErrorKind::Other.into()));
        drop(told_child);
        spawned.map(|launched| (launched, stop))
    })
}

fn trace(mut told: PipeReader, mut tell: PipeWriter, work: impl FnOnce(Pid)) -> ExecStop {
    let mut word = [0; size_of::<i32>()];
    if told.read_exact(&mut word).is_err() {
        return ExecStop::Ended;
    }
    let pid = Pid(i32::from_ne_bytes(word));
    let seized = request(libc::PTRACE_SEIZE, pid, 0, libc::PTRACE_O_TRACEEXEC as usize);
    let _ = tell.write_all(&[1]);
    drop(tell);
    if let Err(error) = seized {
        return ExecStop::NotTraced(error);
    }
    let mut work = Some(work);
    loop {
        let Some(status) = peek(pid) else { return ExecStop::Ended };
        let (signal, event) = (status & 0xff, status >> 8);
        if event == libc::PTRACE_EVENT_EXEC {
            if let Some(work) = work.take() {
                work(pid);
            }
            // Fails only if it was killed meanwhile.
            return if request(libc::PTRACE_DETACH, pid, 0, 0).is_ok() { ExecStop::Done } else { ExecStop::Ended };
        }
        let going_on = match event {
            // Stopped as a group: it stays so until it is continued, as without a tracer.
            libc::PTRACE_EVENT_STOP
                if matches!(signal, libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU) =>
            {
                request(libc::PTRACE_LISTEN, pid, 0, 0)
            }
            libc::PTRACE_EVENT_STOP => request(libc::PTRACE_CONT, pid, 0, 0),
            // A signal of its own: delivered.
            _ => request(libc::PTRACE_CONT, pid, 0, signal as usize),
        };
        if going_on.is_err() {
            return ExecStop::Ended;
        }
    }
}

/// Waits for the next stop without taking the status away: an end is for whoever started the command. The signal in
/// the low byte, the event above it; `None` at the end.
fn peek(pid: Pid) -> Option<i32> {
    loop {
        match wait_id(pid, libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT | libc::__WALL) {
            Ok((libc::CLD_TRAPPED | libc::CLD_STOPPED, status)) => return Some(status),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::sched::{Limit, Resource, limit, set_limit};
    use crate::units::Bytes;
    use std::process::{Command, Stdio};

    fn shell(script: &str) -> Launch {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::piped());
        Launch::new(command)
    }

    #[test]
    fn the_program_sees_what_was_set_in_its_stop_and_runs_untraced() {
        let own = limit(Pid::this(), Resource::Stack).unwrap();
        let mut launch = shell("ulimit -s; grep TracerPid /proc/$$/status; exec true");
        launch.soft_stack_limit(Bytes::from_mib(321));
        let mut seen = None;
        let (launched, stop) = spawn_with(launch, |pid| {
            seen = Some(set_limit(pid, Resource::Stack, Limit { soft: Some(7 << 20), hard: own.hard }).unwrap());
        })
        .unwrap();
        if let ExecStop::NotTraced(error) = stop {
            println!("skipped: ptrace ({error})");
            return;
        }
        assert!(matches!(stop, ExecStop::Done), "{stop:?}");
        assert_eq!(seen.unwrap().soft, Some(321 << 20), "the exec itself had the other limit");
        let output = launched.child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "7168\nTracerPid:\t0\n");
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_as_ever() {
        let launch = Launch::new(Command::new("/nonexistent/program"));
        let error = spawn_with(launch, |_| panic!("nothing was executed")).unwrap_err();
        assert!(matches!(error, LaunchError::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound));
    }

    #[test]
    fn many_at_once_each_get_their_own() {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        let (launched, stop) = spawn_with(shell("echo x"), |_| ()).unwrap();
                        assert!(!matches!(stop, ExecStop::Ended));
                        assert_eq!(launched.child.wait_with_output().unwrap().stdout, b"x\n");
                    }
                });
            }
        });
    }
}
