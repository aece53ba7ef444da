//! Who a process is, beyond doubt.
use kernel::Pid;
use kernel::stat::Stat;
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
        let stat = Stat::read(Pid(pid)).ok()?;
        stat.is_alive().then_some(Self { pid, start_time: stat.start_time })
    }

    /// The calling process.
    ///
    /// # Errors
    /// [`KsmError::NoProc`].
    pub fn current() -> Result<Self, KsmError> {
        // In another PID namespace's /proc the same number is some other process.
        let own = kernel::procfs::shows_this_process().unwrap_or(false);
        own.then(|| Self::of(Pid::this().get())).flatten().ok_or(KsmError::NoProc)
    }

    /// Whether exactly this process still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

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
