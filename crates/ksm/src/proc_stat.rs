//! `/proc/PID/stat`: who a process is, and whose child.
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::KsmError;

/// One process beyond doubt: a pid alone may be given to another process once the first is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The number.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has this pid now; `None` if there is none or it is a zombie.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = Stat::read(pid)?;
        stat.alive.then_some(Self { pid, start_time: stat.start_time })
    }

    /// The calling process.
    ///
    /// # Errors
    /// [`KsmError::NoProc`].
    pub fn current() -> Result<Self, KsmError> {
        // In another PID namespace's /proc the same number is some other process.
        let own = kernel::procfs::shows_this_process().unwrap_or(false);
        own.then(|| Self::of(kernel::Pid::this().get())).flatten().ok_or(KsmError::NoProc)
    }

    /// Whether exactly this process still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// The fields that are needed here.
pub(crate) struct Stat {
    pub(crate) comm: String,
    pub(crate) parent: i32,
    pub(crate) start_time: u64,
    /// Not a zombie. A dead thread-group leader whose threads go on counts as alive.
    pub(crate) alive: bool,
}

impl Stat {
    pub(crate) fn read(pid: i32) -> Option<Self> {
        // A name may be any bytes, or a letter of several cut in the middle.
        let bytes = fs::read(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    fn parse(text: &str) -> Option<Self> {
        // The name stands in parentheses and may itself hold spaces and parentheses: the last one closes it.
        let open = text.find('(')?;
        let close = text.rfind(')')?;
        let comm = text.get(open + 1..close)?.to_owned();
        let fields: Vec<&str> = text.get(close + 1..)?.split_ascii_whitespace().collect();
        // proc_pid_stat(5) counts from 1 and this list begins with field 3.
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let state = *fields.first()?;
        Some(Self {
            comm,
            parent: fields.get(1)?.parse().ok()?,
            start_time: number(22)?,
            alive: !matches!(state, "Z" | "X") || number(20)? > 1,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = "42 (a) b (c) S 7 42 42 0 -1 4194304 100 0 0 0 11 22 0 0 20 0 3 0 98765 1 2 3";
        let stat = Stat::parse(text).unwrap();
        assert_eq!(stat.comm, "a) b (c");
        assert_eq!((stat.parent, stat.start_time, stat.alive), (7, 98765, true));
    }

    #[test]
    fn a_name_that_is_no_text_is_a_name() {
        let mut child = std::process::Command::new("python3")
            .args([
                "-c",
                "import ctypes, sys\nctypes.CDLL(None).prctl(15, b'caf\\xc3')\nprint(flush=True)\nsys.stdin.read()",
            ])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn();
        let Ok(child) = &mut child else {
            println!("skipped: python3");
            return;
        };
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let found = ProcessId::of(i32::try_from(child.id()).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.is_some());
    }

    #[test]
    fn a_zombie_is_dead_and_a_reused_pid_is_another_process() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while ProcessId::of(pid).is_some() {
            assert!(std::time::Instant::now() < deadline, "the zombie still counts as alive");
            std::thread::yield_now();
        }
        child.wait().unwrap();
        let me = ProcessId::current().unwrap();
        assert!(me.is_alive());
        assert!(!ProcessId { start_time: me.start_time + 1, ..me }.is_alive());
    }
}
