//! What workers and their merging take, in memory and in CPU time.

use std::time::Duration;

use anyhow::Result;
use kernel::{Pid, ksm_sysfs, sched, smaps};
use serde::Serialize;

use crate::vm::host;

/// What ksmd keeps for each page that it looks at (`struct ksm_rmap_item`), in bytes.
const RMAP_ITEM: u64 = 64;
/// As the kernel cuts the name.
const HELPER: &str = "pagefold-helper";

/// One look. Sizes in bytes, times in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Look {
    /// Since the workers were ready.
    pub(super) seconds: f64,
    /// Anonymous memory of the workers by proportional shares, which has ksmd's pages in it, and `store`.
    pub(super) private: u64,
    /// What the page store holds, mapped or not.
    pub(super) store: u64,
    /// Beside that: broker and guardian, or what ksmd keeps about pages. What a helper has lies in its worker's memory.
    pub(super) managers: u64,
    /// CPU time of the broker, its guardian and the helpers from their start; nothing without pagefold.
    pub(super) managers_cpu: f64,
    /// CPU time of the workers from their start.
    pub(super) workers_cpu: f64,
    /// Processes that were looked at as workers, the shell that started them among them.
    pub(super) processes: usize,
    /// Helpers that live.
    pub(super) helpers: usize,
}

impl Look {
    /// Looks at a command and everything below it.
    ///
    /// # Errors
    /// When processes cannot be listed.
    pub(super) fn take(root: u32, since: Duration) -> Result<Self> {
        let mut look = Self { seconds: since.as_secs_f64(), ..Self::default() };
        for (pid, name) in host::tree(root)? {
            // Whoever has ended meanwhile counts no more.
            let cpu = sched::process_cpu_time(pid).unwrap_or_default().as_secs_f64();
            match name.as_str() {
                name if name == "pagefold" || broker::guardian::NAME.to_str() == Ok(name) => {
                    look.store += host::store(pid);
                    look.managers += anonymous(pid);
                    look.managers_cpu += cpu;
                }
                HELPER => {
                    look.managers_cpu += cpu;
                    look.helpers += 1;
                }
                _ => {
                    look.private += anonymous(pid);
                    look.managers +=
                        ksm_sysfs::ksm_stat(pid).ok().and_then(|stat| stat.ksm_rmap_items).unwrap_or(0) * RMAP_ITEM;
                    look.workers_cpu += cpu;
                    look.processes += 1;
                }
            }
        }
        look.private += look.store;
        Ok(look)
    }
}

fn anonymous(pid: Pid) -> u64 {
    smaps::rollup(pid).map_or(0, |used| used.pss_anon.get())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn this_process_has_memory_and_has_worked() {
        let look = Look::take(std::process::id(), Duration::from_secs(1)).unwrap();
        assert!(look.private > 1 << 12 && look.workers_cpu > 0.0 && look.processes > 0, "{look:?}");
        assert_eq!((look.store, look.managers_cpu), (0, 0.0));
    }
}
