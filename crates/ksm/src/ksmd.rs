//! What the kernel's scanner has done so far.
use std::fs;
use std::time::Duration;

use kernel::Pid;
use kernel::ksm_sysfs::KsmSysfs;
use kernel::stat::Stat;

use crate::error::KsmError;

/// The counters in `/sys/kernel/mm/ksm`, for the whole host, in KSM's own words. Pages unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Pages that stand for several.
    pub pages_shared: u64,
    /// Mappings of these beyond the first of each.
    pub pages_sharing: u64,
    /// Pages that had no equal in this pass.
    pub pages_unshared: u64,
    /// Pages that changed, were skipped or were seen for the first time.
    pub pages_volatile: u64,
    /// Mappings of the zero page that KSM placed; 0 where the kernel does not count them (before 6.6).
    pub ksm_zero_pages: u64,
    /// Pages compared since boot; 0 where the kernel does not count them.
    pub pages_scanned: u64,
    /// Passes completed; begins again at 0 when somebody unmerges the host.
    pub full_scans: u64,
    /// Bytes saved less the kernel's own records of pages.
    pub general_profit: i64,
}

impl Counters {
    /// Reads them all. Not one instant: ksmd goes on meanwhile.
    ///
    /// # Errors
    /// [`KsmError::Sysfs`].
    pub fn read(sysfs: &KsmSysfs) -> Result<Self, KsmError> {
        let found = sysfs.counters()?;
        Ok(Self {
            pages_shared: found.pages_shared.unwrap_or(0),
            pages_sharing: found.pages_sharing.unwrap_or(0),
            pages_unshared: found.pages_unshared.unwrap_or(0),
            pages_volatile: found.pages_volatile.unwrap_or(0),
            ksm_zero_pages: found.ksm_zero_pages.unwrap_or(0),
            pages_scanned: found.pages_scanned.unwrap_or(0),
            full_scans: found.full_scans.unwrap_or(0),
            general_profit: found.general_profit.unwrap_or(0),
        })
    }

    /// Pages that merging keeps from being there.
    #[must_use]
    pub fn pages_saved(&self) -> u64 {
        self.pages_sharing + self.ksm_zero_pages
    }
}

/// Writes to merged pages since boot, each of which made a copy: `cow_ksm` of `/proc/vmstat`. Unmerging counts too.
#[must_use]
pub(crate) fn cow_ksm() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("cow_ksm ")?.trim().parse().ok()).unwrap_or(0)
}

/// The kernel thread that scans.
#[derive(Clone, Copy, Debug)]
pub struct Ksmd {
    pid: i32,
}

/// kthreadd, the parent of every kernel thread.
const KTHREADD: Pid = Pid(2);

impl Ksmd {
    /// Looks for it; `None` in a pid namespace that does not show kernel threads.
    #[must_use]
    pub fn find() -> Option<Self> {
        fs::read_dir("/proc").ok()?.find_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = Stat::read(Pid(pid)).ok()?;
            (stat.comm == "ksmd" && stat.parent == KTHREADD).then_some(Self { pid })
        })
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Processor time it has used since boot.
    #[must_use]
    pub fn cpu_time(&self) -> Option<Duration> {
        kernel::sched::process_cpu_time(Pid(self.pid)).ok()
    }
}
