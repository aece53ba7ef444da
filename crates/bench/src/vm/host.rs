//! What guests and their merging take of the host.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use kernel::{Pid, smaps, status};
use serde::Serialize;

/// One look at the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Memory {
    /// Seconds since the guests were ready.
    pub(crate) seconds: f64,
    /// `AnonPages` and `Shmem` of the host, less what they were before the guests. Whatever else runs on the host is
    /// in it.
    pub(crate) host: i64,
    /// The same memory of the command and everything below it alone: `Pss_Anon` and `Pss_Shmem`, and what the page
    /// store holds that nobody maps.
    pub(crate) tree: u64,
    /// All that the page store holds.
    pub(crate) store: u64,
    /// Huge pages of the tree.
    pub(crate) huge: u64,
}

/// `AnonPages` and `Shmem` of the host.
pub(crate) fn host() -> Result<u64> {
    let info = status::meminfo().context("read /proc/meminfo")?;
    Ok((info.anon_pages + info.shmem).get())
}

impl Memory {
    /// Looks. `before` is the host without the guests.
    pub(crate) fn look(root: u32, before: u64, since: Duration) -> Result<Self> {
        let host = i64::try_from(host()?)?.saturating_sub_unsigned(before);
        let mut memory = Self { seconds: since.as_secs_f64(), host, ..Self::default() };
        let mut shared = 0;
        for (pid, name) in tree(root)? {
            if name == "pagefold" {
                memory.store += store(pid);
            }
            // A helper shares the memory of its program.
            if name == "pagefold-helper" {
                continue;
            }
            // It may have ended.
            if let Ok(used) = smaps::rollup(pid) {
                memory.tree += used.pss_anon.get();
                shared += used.pss_shmem.get();
                memory.huge += used.anon_huge_pages.get();
            }
        }
        memory.tree += shared.max(memory.store);
        Ok(memory)
    }
}

/// Bytes of the segments that a process holds.
pub(crate) fn store(pid: Pid) -> u64 {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return 0 };
    let mut segments = HashMap::new();
    for descriptor in descriptors.filter_map(Result::ok) {
        let target = std::fs::read_link(descriptor.path()).unwrap_or_default();
        let name = target.to_string_lossy();
        // The guardian has control areas, not segments.
        if name.starts_with("/memfd:pagefold") && !name.starts_with("/memfd:pagefold-control") {
            // By way of the link, which leads to the file itself.
            if let Ok(file) = std::fs::metadata(descriptor.path()) {
                segments.insert(file.ino(), file.blocks() * 512);
            }
        }
    }
    segments.values().sum()
}

/// A process and everything below it, with the names.
pub(crate) fn tree(root: u32) -> Result<Vec<(Pid, String)>> {
    let root = Pid(i32::try_from(root)?);
    let mut children: HashMap<i32, Vec<(Pid, String)>> = HashMap::new();
    let mut found = Vec::new();
    for pid in status::processes().context("list processes")? {
        let Ok(process) = status::read(pid) else { continue };
        let entry = (pid, process.name.to_string_lossy().into_owned());
        if pid == root {
            found.push(entry);
        } else {
            children.entry(process.ppid).or_default().push(entry);
        }
    }
    let mut next = 0;
    while let Some((pid, _)) = found.get(next) {
        found.extend(children.remove(&pid.0).unwrap_or_default());
        next += 1;
    }
    Ok(found)
}

/// The one in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn this_process_is_in_its_tree_and_takes_memory() {
        let own = std::process::id();
        assert!(tree(own).unwrap().iter().any(|(pid, _)| pid.0.unsigned_abs() == own));
        let memory = Memory::look(own, 0, Duration::from_secs(1)).unwrap();
        assert!(memory.tree > 1 << 12 && memory.host > 1 << 12, "{memory:?}");
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
