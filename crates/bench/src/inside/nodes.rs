//! KSM on several memory nodes: the cases of the kernel's ksm_tests (`-N`) and of LTP's ksm06 that need them.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kernel::{OwnedMemory, PageCount, mempolicy};
use ksm::set::unmerge_host_at;
use ksm::{Counters, KsmSysfs, Lease, Rate, StatePath, Wanted};
use serde::Serialize;

/// What was seen.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Memory nodes.
    pub nodes: u64,
    /// One for each case.
    pub cases: Vec<Case>,
}

/// Equal pages on every node, merged.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// Its name where it comes from.
    pub name: &'static str,
    /// `merge_across_nodes`.
    pub merge_across_nodes: bool,
    /// Pages on each node.
    pub pages: u64,
    /// The kernel's counter when ksmd stands still again.
    pub pages_shared: u64,
    /// The same.
    pub pages_sharing: u64,
}

/// Emulation is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tries each case.
///
/// # Errors
/// When it cannot be tried here.
pub fn run() -> Result<Report> {
    let online = std::fs::read_to_string("/sys/devices/system/node/online").context("find the memory nodes")?;
    let last: u64 = online.trim().rsplit(['-', ',']).next().unwrap_or("0").parse().context("count the memory nodes")?;
    let nodes = last + 1;
    let mut cases = Vec::new();
    for (name, pages) in [("ksm_tests -N", 1), ("ksm06 -n 10", 10), ("ksm06 -n 8000", 8000)] {
        for merge_across_nodes in [true, false] {
            cases.push(case(name, nodes, pages, merge_across_nodes)?);
        }
    }
    Ok(Report { nodes, cases })
}

fn case(name: &'static str, nodes: u64, pages: u64, merge_across_nodes: bool) -> Result<Case> {
    let (sysfs, path) = (KsmSysfs::host(), StatePath::for_this_user());
    unmerge_host_at(&path, &sysfs, false)?;
    let mut memories = Vec::new();
    for node in 0..nodes {
        mempolicy::bind(u32::try_from(node)?).context("bind to a node")?;
        let memory = OwnedMemory::anonymous(PageCount(pages))?;
        memory.small_pages()?;
        memory.words().iter().for_each(|word| word.store(0x6b73_6d30_3600_0001, Relaxed));
        mempolicy::unbind()?;
        // Locked memory is merged as any other.
        memory.lock()?;
        ensure!(lies_on(&memory, node)?, "the pages are not on node {node}");
        memory.hand_over()?;
        memories.push(memory);
    }
    let wanted = Wanted {
        run: Some(true),
        rate: Some(Rate::FLAT_OUT),
        smart_scan: Some(false),
        use_zero_pages: Some(false),
        max_page_sharing: Some(u32::try_from((pages * nodes).max(2))?),
        merge_across_nodes: Some(merge_across_nodes),
        ..Wanted::default()
    };
    let (lease, repaired) = Lease::acquire_at(&path, &sysfs, wanted)?;
    ensure!(repaired.refused.is_empty(), "{repaired}");
    let (first, deadline) = (Counters::read(&sysfs)?.full_scans, Instant::now() + PATIENCE);
    while Counters::read(&sysfs)?.full_scans < first + 4 {
        ensure!(
            Instant::now() < deadline,
            "{name}, merge_across_nodes {merge_across_nodes}: too few passes since {first}; run {:?}, {:?}",
            sysfs.knob("run")?,
            sysfs.counters()?
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    lease.release()?;
    let counters = Counters::read(&sysfs)?;
    let (pages_shared, pages_sharing) = (counters.pages_shared, counters.pages_sharing);
    Ok(Case { name, merge_across_nodes, pages, pages_shared, pages_sharing })
}

/// True if all its pages are on that node.
fn lies_on(memory: &OwnedMemory, node: u64) -> Result<bool> {
    let text = std::fs::read_to_string("/proc/self/numa_maps").context("see where pages lie")?;
    let start = format!("{:x} ", memory.range().start().0);
    let line =
        text.lines().find(|line| line.trim_start_matches('0').starts_with(&start)).context("the memory is there")?;
    let all = format!("N{node}={}", memory.range().pages());
    Ok(line.split(' ').any(|word| word == all))
}
