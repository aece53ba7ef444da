//! What can go wrong in this crate.
use std::io;
use std::path::PathBuf;

/// An error of the lease, the drive or the layout.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KsmError {
    /// The kernel was built without `CONFIG_KSM`, or sysfs is not mounted.
    #[error("no KSM in this kernel: {} is missing", path.display())]
    Missing {
        /// The directory that was looked for.
        path: PathBuf,
    },
    /// The settings can be read but not written: not root, or a read-only sysfs as in most containers.
    #[error("KSM's settings cannot be written: {}", path.display())]
    ReadOnly {
        /// The file that was tried.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A file of KSM's directory could not be read, or its content was not understood.
    #[error(transparent)]
    Sysfs(#[from] kernel::ksm_sysfs::KsmError),
    /// The lease's state file or its directory could not be used.
    #[error("cannot use the lease's state {}", path.display())]
    State {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The state file holds something else than a lease's state; the administrator's values are not known then.
    #[error("the lease's state {} is damaged: check KSM's settings, then remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser found.
        source: serde_json::Error,
    },
    /// The directory of the state file may be written by others, who could dictate KSM's settings.
    #[error("{} belongs to somebody else or is open to others", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
    },
    /// No `/proc`, or one of another process namespace: a lease's holder could not be told from others.
    #[error(
        "/proc is not mounted, or belongs to another PID namespace: mount -t proc proc /proc (unshare --mount-proc)"
    )]
    NoProc,
    /// Somebody else keeps rules on this host.
    #[error(
        "another pagefold ksm rules is at work{}: end it first, or send it SIGHUP to have it read its file again",
        pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
    )]
    Busy {
        /// Which process, if it has said so.
        pid: Option<i32>,
    },
    /// The record of what rules have done could not be used.
    #[error("cannot use the record of rules {}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The record holds something else.
    #[error(
        "the record of rules {} is damaged: remove it; what was enabled, and disabled by hand since, is not known then",
        path.display()
    )]
    DamagedRecord {
        /// The file.
        path: PathBuf,
        /// What the parser found.
        source: serde_json::Error,
    },
    /// Something under /proc could not be read.
    #[error(transparent)]
    Proc(#[from] kernel::ProcError),
    /// A process could not be watched.
    #[error("cannot watch process {pid}")]
    Watch {
        /// The process.
        pid: i32,
        /// What the kernel answered.
        source: io::Error,
    },
    /// There is no such cgroup.
    #[error("no cgroup {}: give its directory, or its path below /sys/fs/cgroup", path.display())]
    NoSuchCgroup {
        /// As it was given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}
