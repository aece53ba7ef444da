//! What can go wrong with an evaluation as a whole. What happens to single processes is in [`Skipped`](crate::Skipped).

use std::io;
use std::path::PathBuf;

use kernel::Pid;
use kernel::procfs::ProcError;
use thiserror::Error;

/// What can go wrong.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EvalError {
    /// Nothing was asked for.
    #[error("no process is named; name some by pid, cgroup or command, or ask for all")]
    NothingNamed,
    /// There is no such process.
    #[error("there is no process {pid}")]
    NoSuchProcess {
        /// The number.
        pid: Pid,
    },
    /// A thread of the kernel has no memory of its own.
    #[error("process {pid} ({comm}) is a thread of the kernel: it has no memory of its own")]
    KernelThread {
        /// Its number.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// A process that has ended and waits for its parent.
    #[error("process {pid} ({comm}) has ended: it waits for its parent and has no memory any more")]
    Zombie {
        /// Its number.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// Reading the memory of another user's process, or of one that is not dumpable, takes a capability.
    #[error("not permitted to read process {pid} ({comm}): run as its user, or with CAP_SYS_PTRACE (as root)")]
    NotPermitted {
        /// Its number.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// Not a cgroup.
    #[error("{path} is not a cgroup: give its path below /sys/fs/cgroup, as /proc/PID/cgroup shows it")]
    NoSuchCgroup {
        /// As it was given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A cgroup without processes.
    #[error("no process is in cgroup {path}")]
    EmptyCgroup {
        /// As it was given.
        path: PathBuf,
    },
    /// Nobody is called that.
    #[error("no process is called {comm:?} (the name that /proc/PID/comm shows, at most 15 bytes)")]
    NoSuchCommand {
        /// As it was given.
        comm: String,
    },
    /// The first thread has ended, others go on: the memory is there, but not under this number.
    #[error(
        "the first thread of process {pid} ({comm}) has ended while others go on: its memory cannot be read by its number"
    )]
    LeaderEnded {
        /// Its number.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// /proc shows the processes of another PID namespace, or nothing is mounted there.
    #[error(
        "/proc is not that of this PID namespace: run in the namespace whose processes are meant, or mount its own (unshare --mount-proc, nsenter -p -m)"
    )]
    ForeignProc,
    /// /proc cannot be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// There is no source of random numbers for the snapshot's secret.
    #[error("no random numbers")]
    Random(#[source] io::Error),
    /// More pages than can be numbered.
    #[error("{pages} pages are more than one snapshot can hold (2^32); name fewer processes")]
    TooMany {
        /// How many.
        pages: u64,
    },
    /// A share that is none.
    #[error("{given} is not a share: more than 0, at most 1")]
    BadFraction {
        /// As it was given.
        given: f64,
    },
}

impl EvalError {
    /// True if a capability would do.
    #[must_use]
    pub const fn is_permission(&self) -> bool {
        matches!(self, Self::NotPermitted { .. } | Self::ForeignProc | Self::Proc(ProcError::Denied { .. }))
    }
}
