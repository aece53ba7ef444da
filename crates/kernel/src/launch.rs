//! Starting a command with what must be set between fork and exec: layout of its address space, limits, merging.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use thiserror::Error;

use crate::pidfd::{Pidfd, PidfdError};
use crate::units::{Bytes, Pid};

/// What can go wrong when a command is started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The program could not be executed: [`io::ErrorKind::NotFound`], [`io::ErrorKind::PermissionDenied`], ...
    #[error("cannot execute {program:?}")]
    Exec {
        /// The program.
        program: std::ffi::OsString,
        /// What the kernel said.
        source: io::Error,
    },
    /// A property of the new process could not be set.
    #[error("cannot set {what} of a new process")]
    Setup {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process was started, but there is no descriptor for it; it was killed.
    #[error("cannot get a descriptor of a new process")]
    Pidfd(#[from] PidfdError),
}

impl LaunchError {
    /// True if there were too few descriptors, processes or pages: with fewer of them in use the same command may start.
    #[must_use]
    pub fn is_scarcity(&self) -> bool {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = next {
            let number = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
            if number.is_some_and(|errno| matches!(errno, libc::EMFILE | libc::ENFILE | libc::EAGAIN | libc::ENOMEM)) {
                return true;
            }
            next = error.source();
        }
        false
    }
}

/// The steps between fork and exec, as the child reports which failed.
const STEPS: [&str; 6] = [
    "inherited descriptors",
    "the personality",
    "the stack limit",
    "samepage merging",
    "the limit of open files",
    "the limit of address space",
];

/// A started command.
#[derive(Debug)]
pub struct Launched {
    /// For waiting and its pipes.
    pub child: Child,
    /// A descriptor of the process.
    pub pidfd: Pidfd,
}

impl Launched {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid(self.child.id().cast_signed())
    }
}

/// A command to be started.
#[derive(Debug)]
pub struct Launch {
    command: Command,
    no_randomization: bool,
    soft_stack_limit: Option<Bytes>,
    memory_merge: Option<bool>,
    soft_open_files: Option<u64>,
    soft_address_space: Option<u64>,
    inherited: Vec<OwnedFd>,
}

impl Launch {
    /// Starts from a command with its arguments, environment, directory and streams.
    #[must_use]
    pub fn new(command: Command) -> Self {
        Self {
            command,
            no_randomization: false,
            soft_stack_limit: None,
            memory_merge: None,
            soft_open_files: None,
            soft_address_space: None,
            inherited: Vec::new(),
        }
    }

    /// The command, to change it.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Switches address-space randomisation off (personality ADDR_NO_RANDOMIZE); children inherit it.
    pub fn no_randomization(&mut self, off: bool) -> &mut Self {
        self.no_randomization = off;
        self
    }

    /// Sets the soft stack limit, which also is the gap that the kernel keeps between the stack and the mappings.
    pub fn soft_stack_limit(&mut self, limit: Bytes) -> &mut Self {
        self.soft_stack_limit = Some(limit);
        self
    }

    /// Makes all of its memory mergeable by ksmd, or not; children inherit it.
    pub fn memory_merge(&mut self, on: bool) -> &mut Self {
        self.memory_merge = Some(on);
        self
    }

    /// Sets the soft limit of open files, for a launcher that has raised its own.
    pub fn soft_open_files(&mut self, limit: u64) -> &mut Self {
        self.soft_open_files = Some(limit);
        self
    }

    /// The same of address space, in bytes.
    pub fn soft_address_space(&mut self, limit: u64) -> &mut Self {
        self.soft_address_space = Some(limit);
        self
    }

    /// Lets the command inherit a descriptor under the number that it has here, which is returned.
    pub fn inherit(&mut self, fd: OwnedFd) -> RawFd {
        let number = fd.as_raw_fd();
        self.inherited.push(fd);
        number
    }

    /// Starts the command. Inherited descriptors are closed on this side.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn spawn(mut self) -> Result<Launched, LaunchError> {
        let setup = |source: io::Error| LaunchError::Setup { what: "a pipe", source };
        let (reader, writer) = io::pipe().map_err(setup)?;
        let report = writer.as_raw_fd();
        let plan = Plan {
            inherited: self.inherited.iter().map(AsRawFd::as_raw_fd).collect(),
            no_randomization: self.no_randomization,
            soft_stack_limit: self.soft_stack_limit,
            memory_merge: self.memory_merge,
            soft_open_files: self.soft_open_files,
            soft_address_space: self.soft_address_space,
        };
        // SAFETY: the closure makes system calls only; what it uses was allocated before the fork.
        unsafe {
            self.command.pre_exec(move || {
                plan.apply().map_err(|(step, error)| {
                    let step = [step];
                    // SAFETY: the buffer is one byte that lives until the call returns.
                    let _ = libc::write(report, step.as_ptr().cast(), 1);
                    error
                })
            })
        };
        let spawned = self.command.spawn();
        drop(writer);
        let mut child = match spawned {
            Ok(child) => child,
            Err(source) => {
                let mut step = [0_u8];
                return Err(match (&reader).read(&mut step) {
                    Ok(1) => {
                        let what = STEPS.get(usize::from(step[0])).copied().unwrap_or("a property");
                        LaunchError::Setup { what, source }
                    }
                    _ => LaunchError::Exec { program: self.command.get_program().to_owned(), source },
                });
            }
        };
        // The child is not waited for yet, so its number is still its own.
        match Pidfd::open(Pid(child.id().cast_signed())) {
            Ok(pidfd) => Ok(Launched { child, pidfd }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.into())
            }
        }
    }
}

/// What the child does before it executes the program.
struct Plan {
    inherited: Vec<RawFd>,
    no_randomization: bool,
    soft_stack_limit: Option<Bytes>,
    memory_merge: Option<bool>,
    soft_open_files: Option<u64>,
    soft_address_space: Option<u64>,
}

impl Plan {
    /// The failed step, an index into [`STEPS`], and its error. Makes system calls only.
    fn apply(&self) -> Result<(), (u8, io::Error)> {
        let failed = |step: u8| (step, io::Error::last_os_error());
        for fd in &self.inherited {
            // SAFETY: the call takes integers only.
            if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } == -1 {
                return Err(failed(0));
            }
        }
        if self.no_randomization {
            // SAFETY: the call takes an integer; this number only asks.
            let old = unsafe { libc::personality(0xffff_ffff) };
            let new = old.cast_unsigned() | libc::ADDR_NO_RANDOMIZE.cast_unsigned();
            // SAFETY: the call takes an integer.
            if old == -1 || unsafe { libc::personality(new.into()) } == -1 {
                return Err(failed(1));
            }
        }
        if let Some(soft) = self.soft_stack_limit {
            set_soft(libc::RLIMIT_STACK, soft.0).map_err(|error| (2, error))?;
        }
        if let Some(on) = self.memory_merge {
            crate::ksm_sysfs::prctl_memory_merge(on).map_err(|error| (3, error))?;
        }
        if let Some(soft) = self.soft_open_files {
            set_soft(libc::RLIMIT_NOFILE, soft).map_err(|error| (4, error))?;
        }
        if let Some(soft) = self.soft_address_space {
            set_soft(libc::RLIMIT_AS, soft).map_err(|error| (5, error))?;
        }
        Ok(())
    }
}

/// Sets a soft limit of this process. Makes system calls only.
fn set_soft(resource: libc::__rlimit_resource_t, soft: u64) -> io::Result<()> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is writable and lives until the call returns.
    if unsafe { libc::getrlimit64(resource, &raw mut limit) } == -1 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = soft;
    // SAFETY: the structure is readable and lives until the call returns.
    match unsafe { libc::setrlimit64(resource, &raw const limit) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Takes a descriptor that this process inherited under a known number, and has it closed on exec.
///
/// # Errors
/// EBADF if there is none; [`io::ErrorKind::InvalidInput`] for one of the standard streams.
///
/// # Safety
/// Nothing else in this process owns that number, now or later.
pub unsafe fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the call takes integers only.
    crate::sys::check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) }.into())?;
    // SAFETY: the number is open, and the caller vouches that nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::process::Stdio;
    use std::time::Duration;

    fn output(mut launch: Launch) -> String {
        launch.command().stdout(Stdio::piped());
        let launched = launch.spawn().unwrap();
        let pidfd = launched.pidfd;
        let output = launched.child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert!(pidfd.wait_exited(Duration::ZERO).unwrap());
        String::from_utf8(output.stdout).unwrap()
    }

    fn shell(script: &str) -> Launch {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Launch::new(command)
    }

    #[test]
    fn the_layout_is_fixed_and_moves_with_the_stack_limit() {
        let libc_at = |limit: Option<Bytes>, fixed: bool| {
            let mut command = Command::new("cat");
            command.arg("/proc/self/maps");
            let mut launch = Launch::new(command);
            launch.no_randomization(fixed);
            if let Some(limit) = limit {
                launch.soft_stack_limit(limit);
            }
            let maps = output(launch);
            let line = maps.lines().find(|line| line.contains("libc")).unwrap().to_owned();
            crate::maps::parse_line(line.as_bytes()).unwrap().range.start().0
        };
        assert_ne!(libc_at(None, false), libc_at(None, false), "randomised without the switch");
        let first = libc_at(Some(Bytes::from_mib(1024)), true);
        assert_eq!(first, libc_at(Some(Bytes::from_mib(1024)), true));
        assert_eq!(first - libc_at(Some(Bytes::from_mib(2048)), true), 1 << 30);
    }

    #[test]
    fn descriptors_are_inherited_under_their_number() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut launch = shell("echo here > /dev/fd/$NUMBER");
        let number = launch.inherit(writer.into());
        launch.command().env("NUMBER", number.to_string());
        output(launch);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "here\n", "and this side's end is closed");
    }

    #[test]
    fn merging_is_inherited_over_exec() {
        if crate::ksm_sysfs::memory_merge().is_err() {
            println!("skipped: PR_SET_MEMORY_MERGE (Linux 6.4)");
            return;
        }
        let mut launch = shell("cat /proc/self/ksm_stat");
        launch.memory_merge(true);
        assert!(output(launch).contains("ksm_merge_any: yes"));
        assert!(output(shell("cat /proc/self/ksm_stat")).contains("ksm_merge_any: no"));
    }

    #[test]
    fn failures_say_what_failed() {
        let error = Launch::new(Command::new("/nonexistent/program")).spawn().unwrap_err();
        assert!(matches!(error, LaunchError::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound));
        // Without a hard limit every soft one can be had.
        let Some(hard) = crate::sched::limit(Pid::this(), crate::sched::Resource::Stack).unwrap().hard else { return };
        let mut launch = shell("true");
        launch.soft_stack_limit(Bytes(hard + 1));
        let error = launch.spawn().unwrap_err();
        assert!(matches!(error, LaunchError::Setup { what: "the stack limit", .. }), "{error:?}");
        assert!(!error.is_scarcity());
    }

    #[test]
    fn scarcity_is_seen_below_whatever_wraps_it() {
        let scarce = || io::Error::from_raw_os_error(libc::EMFILE);
        assert!(LaunchError::Exec { program: "x".into(), source: scarce() }.is_scarcity());
        assert!(LaunchError::Pidfd(PidfdError::Open { pid: Pid(1), source: scarce() }).is_scarcity());
        assert!(!LaunchError::Exec { program: "x".into(), source: io::ErrorKind::NotFound.into() }.is_scarcity());
    }

    #[test]
    fn a_command_has_the_limit_of_open_files_that_was_asked_for() {
        let mut launch = shell("ulimit -Sn");
        launch.soft_open_files(77);
        assert_eq!(output(launch), "77\n");
    }
}
