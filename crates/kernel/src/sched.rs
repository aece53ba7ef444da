//! Scheduling, limits and CPU time of other threads and processes.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::procfs::{self, ProcError};
use crate::sys;
use crate::units::{Bytes, Pid};

/// How a thread is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// SCHED_OTHER.
    Other,
    /// SCHED_FIFO with a priority from 1 to 99. Children of the thread fall back to SCHED_OTHER.
    Fifo {
        /// The priority.
        priority: u8,
    },
    /// Another one, by the kernel's number.
    Unknown(i32),
}

/// What can go wrong with scheduling and limits.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SchedError {
    /// The thread or process has ended.
    #[error("process {pid} is gone")]
    Gone {
        /// The thread or process.
        pid: Pid,
    },
    /// Needs CAP_SYS_NICE or RLIMIT_RTPRIO for scheduling, CAP_SYS_RESOURCE or the same user for limits.
    #[error("not permitted to change {what} of process {pid}")]
    Denied {
        /// What was to be changed.
        what: &'static str,
        /// The thread or process.
        pid: Pid,
    },
    /// The kernel refused for another reason.
    #[error("cannot get or set {what} of process {pid}")]
    Other {
        /// What.
        what: &'static str,
        /// The thread or process.
        pid: Pid,
        /// What the kernel said.
        source: io::Error,
    },
}

fn sort(what: &'static str, pid: Pid, source: io::Error) -> SchedError {
    match sys::errno(&source) {
        libc::ESRCH => SchedError::Gone { pid },
        libc::EPERM | libc::EACCES => SchedError::Denied { what, pid },
        _ => SchedError::Other { what, pid, source },
    }
}

/// Sets how a thread (not a whole process) is scheduled.
///
/// # Errors
/// [`SchedError`].
pub fn set_policy(tid: Pid, policy: Policy) -> Result<(), SchedError> {
    let (number, priority) = match policy {
        Policy::Other => (libc::SCHED_OTHER, 0),
        Policy::Fifo { priority } => (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, priority.into()),
        Policy::Unknown(number) => (number, 0),
    };
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: the structure lives until the call returns and is only read.
    let result = unsafe { libc::sched_setscheduler(tid.0, number, &raw const param) };
    sys::check(result.into()).map(|_| ()).map_err(|source| sort("the scheduling", tid, source))
}

/// How a thread is scheduled.
///
/// # Errors
/// [`SchedError`].
pub fn policy(tid: Pid) -> Result<Policy, SchedError> {
    let error = |source| sort("the scheduling", tid, source);
    // SAFETY: the call takes and returns integers.
    let number = sys::check(unsafe { libc::sched_getscheduler(tid.0) }.into()).map_err(error)? as i32;
    let mut param = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is writable and lives until the call returns.
    sys::check(unsafe { libc::sched_getparam(tid.0, &raw mut param) }.into()).map_err(error)?;
    Ok(match number & !libc::SCHED_RESET_ON_FORK {
        libc::SCHED_OTHER => Policy::Other,
        libc::SCHED_FIFO => Policy::Fifo { priority: u8::try_from(param.sched_priority).unwrap_or(u8::MAX) },
        other => Policy::Unknown(other),
    })
}

/// A resource with a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// CPU time that a real-time thread may use without a blocking call, in microseconds.
    RtTime,
    /// Real-time priority that a process may give itself.
    RtPriority,
    /// Open files.
    OpenFiles,
    /// Stack, in bytes.
    Stack,
    /// File size, in bytes.
    FileSize,
    /// Locked memory, in bytes.
    LockedMemory,
    /// Address space, in bytes.
    AddressSpace,
    /// Data: private memory that can be written, in bytes.
    Data,
}

/// A soft and a hard limit; `None` for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What counts.
    pub soft: Option<u64>,
    /// How far the soft limit can be raised.
    pub hard: Option<u64>,
}

fn resource_number(resource: Resource) -> (libc::__rlimit_resource_t, &'static str) {
    match resource {
        Resource::RtTime => (libc::RLIMIT_RTTIME, "RLIMIT_RTTIME"),
        Resource::RtPriority => (libc::RLIMIT_RTPRIO, "RLIMIT_RTPRIO"),
        Resource::OpenFiles => (libc::RLIMIT_NOFILE, "RLIMIT_NOFILE"),
        Resource::Stack => (libc::RLIMIT_STACK, "RLIMIT_STACK"),
        Resource::FileSize => (libc::RLIMIT_FSIZE, "RLIMIT_FSIZE"),
        Resource::LockedMemory => (libc::RLIMIT_MEMLOCK, "RLIMIT_MEMLOCK"),
        Resource::AddressSpace => (libc::RLIMIT_AS, "RLIMIT_AS"),
        Resource::Data => (libc::RLIMIT_DATA, "RLIMIT_DATA"),
    }
}

fn prlimit(pid: Pid, resource: Resource, new: Option<Limit>) -> Result<Limit, SchedError> {
    let (number, name) = resource_number(resource);
    let raw = |limit: Option<u64>| limit.unwrap_or(libc::RLIM64_INFINITY);
    let new = new.map(|limit| libc::rlimit64 { rlim_cur: raw(limit.soft), rlim_max: raw(limit.hard) });
    let new = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let mut old = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `new` is null or readable, `old` is writable, and both live until the call returns.
    let result = unsafe { libc::prlimit64(pid.0, number, new, &raw mut old) };
    sys::check(result.into()).map_err(|source| sort(name, pid, source))?;
    let limit = |value: u64| (value != libc::RLIM64_INFINITY).then_some(value);
    Ok(Limit { soft: limit(old.rlim_cur), hard: limit(old.rlim_max) })
}

/// A limit of a process.
///
/// # Errors
/// [`SchedError`].
pub fn limit(pid: Pid, resource: Resource) -> Result<Limit, SchedError> {
    prlimit(pid, resource, None)
}

/// Sets a limit of a process; returns the old one.
///
/// # Errors
/// [`SchedError`].
pub fn set_limit(pid: Pid, resource: Resource, limit: Limit) -> Result<Limit, SchedError> {
    prlimit(pid, resource, Some(limit))
}

/// Whose use [`usage`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// This process, all threads.
    Own,
    /// This thread.
    Thread,
    /// Children that were waited for, and theirs.
    Children,
}

/// What was used (getrusage).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in user mode.
    pub user: Duration,
    /// CPU time in the kernel.
    pub system: Duration,
    /// Largest memory in use.
    pub max_rss: Bytes,
    /// Page faults without I/O.
    pub minor_faults: u64,
    /// Page faults with I/O.
    pub major_faults: u64,
    /// Times that it gave up the CPU.
    pub voluntary_switches: u64,
    /// Times that the CPU was taken from it.
    pub involuntary_switches: u64,
}

impl Usage {
    /// CPU time altogether.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        self.user + self.system
    }
}

/// What this process, this thread or the children used.
#[must_use]
pub fn usage(whose: Whose) -> Usage {
    let number = match whose {
        Whose::Own => libc::RUSAGE_SELF,
        Whose::Thread => libc::RUSAGE_THREAD,
        Whose::Children => libc::RUSAGE_CHILDREN,
    };
    // SAFETY: the structure is plain integers, for which zeros are valid.
    let mut raw: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is writable and lives until the call returns.
    let result = unsafe { libc::getrusage(number, &raw mut raw) };
    debug_assert_eq!(result, 0, "getrusage fails only for bad arguments");
    let count = |value: i64| u64::try_from(value).unwrap_or(0);
    let time =
        |value: libc::timeval| Duration::from_secs(count(value.tv_sec)) + Duration::from_micros(count(value.tv_usec));
    Usage {
        user: time(raw.ru_utime),
        system: time(raw.ru_stime),
        max_rss: Bytes::from_kib(count(raw.ru_maxrss)),
        minor_faults: count(raw.ru_minflt),
        major_faults: count(raw.ru_majflt),
        voluntary_switches: count(raw.ru_nvcsw),
        involuntary_switches: count(raw.ru_nivcsw),
    }
}

/// CPU time of a whole process, exact; needs no rights on it.
///
/// # Errors
/// [`SchedError::Gone`], also for a thread that is no process.
pub fn process_cpu_time(pid: Pid) -> Result<Duration, SchedError> {
    // The clock id of a process (include/linux/posix-timers_types.h): the complement of its number above three bits
    // of kind, of which 2 is time as the scheduler counts it.
    let clock = (!pid.0) << 3 | 2;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is writable and lives until the call returns.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    match sys::check(result.into()) {
        Ok(_) => {
            let count = |value: i64| u64::try_from(value).unwrap_or(0);
            Ok(Duration::from_secs(count(time.tv_sec)) + Duration::from_nanos(count(time.tv_nsec)))
        }
        Err(error) if sys::errno(&error) == libc::EINVAL => Err(SchedError::Gone { pid }),
        Err(source) => Err(sort("the CPU time", pid, source)),
    }
}

/// CPU time and waiting time of one thread of a process (/proc/PID/task/TID/schedstat).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadTime {
    /// Time on a CPU.
    pub running: Duration,
    /// Time runnable but without one.
    pub waiting: Duration,
}

/// CPU time and waiting time of one thread.
///
/// # Errors
/// [`ProcError`].
pub fn thread_time(pid: Pid, tid: Pid) -> Result<ThreadTime, ProcError> {
    let path = format!("/proc/{pid}/task/{tid}/schedstat");
    let bytes = std::fs::read(&path).map_err(|source| ProcError::of(tid, "schedstat", source))?;
    let mut words = procfs::words(&bytes).map(procfs::decimal);
    match (words.next().flatten(), words.next().flatten()) {
        (Some(running), Some(waiting)) => {
            Ok(ThreadTime { running: Duration::from_nanos(running), waiting: Duration::from_nanos(waiting) })
        }
        _ => Err(ProcError::Parse { path, line: procfs::text(&bytes) }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::process::{Child, Command};

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            Self(Command::new("sleep").arg("60").spawn().unwrap())
        }
        fn pid(&self) -> Pid {
            Pid(self.0.id().cast_signed())
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn another_process_gets_real_time_and_gives_it_back() {
        let sleeper = Sleeper::start();
        match set_policy(sleeper.pid(), Policy::Fifo { priority: 3 }) {
            Ok(()) => {}
            Err(SchedError::Denied { .. }) => {
                println!("skipped: CAP_SYS_NICE");
                return;
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(policy(sleeper.pid()).unwrap(), Policy::Fifo { priority: 3 });
        set_policy(sleeper.pid(), Policy::Other).unwrap();
        assert_eq!(policy(sleeper.pid()).unwrap(), Policy::Other);
    }

    #[test]
    fn limits_of_another_process() {
        let sleeper = Sleeper::start();
        let old = limit(sleeper.pid(), Resource::RtTime).unwrap();
        let new = Limit { soft: Some(200_000), hard: old.hard };
        assert_eq!(set_limit(sleeper.pid(), Resource::RtTime, new).unwrap(), old);
        assert_eq!(limit(sleeper.pid(), Resource::RtTime).unwrap(), new);
        assert_ne!(limit(Pid::this(), Resource::RtTime).unwrap(), new);
    }

    #[test]
    fn cpu_time_is_counted_for_whoever_used_it() {
        let busy = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let busy = Sleeper(busy);
        let idle = Sleeper::start();
        std::thread::sleep(Duration::from_millis(300));
        let used = process_cpu_time(busy.pid()).unwrap();
        assert!(used > Duration::from_millis(20), "{used:?}");
        let running = thread_time(busy.pid(), busy.pid()).unwrap().running;
        assert!(running > Duration::from_millis(20), "{running:?}");
        assert!(process_cpu_time(idle.pid()).unwrap() < Duration::from_millis(20));
        let own = usage(Whose::Own);
        assert!(own.cpu() >= usage(Whose::Thread).cpu() && own.max_rss > Bytes(0));
    }

    #[test]
    fn who_has_ended_is_gone() {
        let sleeper = Sleeper::start();
        let pid = sleeper.pid();
        drop(sleeper);
        assert!(matches!(set_policy(pid, Policy::Other), Err(SchedError::Gone { .. })));
        assert!(matches!(limit(pid, Resource::Stack), Err(SchedError::Gone { .. })));
        assert!(matches!(process_cpu_time(pid), Err(SchedError::Gone { .. })));
        assert!(thread_time(pid, pid).unwrap_err().is_gone());
    }
}
