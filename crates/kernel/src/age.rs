//! How long a process has been there.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::procfs::ProcError;
use crate::stat::Stat;
use crate::units::Pid;

/// Time since a process was started (field 22 of /proc/PID/stat), suspends of the machine included; exact to 1/100 s.
///
/// # Errors
/// [`ProcError`].
pub fn age(pid: Pid) -> Result<Duration, ProcError> {
    let started = Stat::read(pid)?.start_time;
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    let now = clock_gettime(ClockId::Boottime);
    let now = Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0));
    // u64::MAX ticks are more milliseconds than fit: no machine is up for so long.
    Ok(now.saturating_sub(Duration::from_millis(started.saturating_mul(1000) / ticks)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_child_is_younger_than_its_parent() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid(child.id().cast_signed());
        std::thread::sleep(Duration::from_millis(300));
        let other = age(pid).unwrap();
        let own = age(Pid::this()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(other >= Duration::from_millis(250) && other < Duration::from_secs(30), "{other:?}");
        assert!(own + Duration::from_millis(10) >= other, "{own:?} {other:?}, to a tick");
        assert!(age(pid).unwrap_err().is_gone());
    }
}
