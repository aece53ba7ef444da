//! Which processes KSM may merge, and how much they have.
use std::collections::HashMap;
use std::time::{Duration, Instant};

use kernel::ksm_sysfs::ksm_stat;
use kernel::sched::{Whose, usage};
use kernel::{Pid, status};

use crate::proc_stat::ProcessId;
use crate::tree::member;

/// Between two looks, at least; and looking may take one part in this many of a processor.
const INTERVAL: Duration = Duration::from_secs(1);
const SHARE: u32 = 200;

/// All processes that KSM may merge, looked at now and then.
///
/// Reading `ksm_stat` takes a process's mapping lock for reading: one that holds it for writing for long makes a look
/// late, and ksmd goes on at the rate that it has.
#[derive(Debug, Default)]
pub(super) struct Census {
    pages: HashMap<ProcessId, u64>,
    appeared: u64,
    next: Option<Instant>,
}

impl Census {
    /// Looks again if that is due.
    pub(super) fn look(&mut self) {
        let begun = Instant::now();
        if self.next.is_some_and(|next| begun < next) {
            return;
        }
        let before = usage(Whose::Thread).cpu();
        let pages: HashMap<ProcessId, u64> =
            status::processes().unwrap_or_default().into_iter().filter_map(mergeable).collect();
        for (process, now) in &pages {
            self.appeared += now.saturating_sub(self.pages.get(process).copied().unwrap_or(0));
        }
        self.pages = pages;
        // Not the time that it took: on a busy machine most of it is waiting.
        let cost = usage(Whose::Thread).cpu().saturating_sub(before);
        self.next = Some(Instant::now() + INTERVAL.max(cost * SHARE));
    }

    /// Anonymous pages of them all.
    pub(super) fn mergeable_pages(&self) -> u64 {
        self.pages.values().sum()
    }

    /// Pages by which any of them has grown since the first look, newcomers wholly.
    pub(super) fn appeared_pages(&self) -> u64 {
        self.appeared
    }

    /// How many there are.
    pub(super) fn processes(&self) -> usize {
        self.pages.len()
    }
}

/// A process that KSM may merge, with its anonymous pages. One that is gone, or not ours to read, is none.
fn mergeable(pid: Pid) -> Option<(ProcessId, u64)> {
    let stat = ksm_stat(pid).ok()?;
    let marked = match (stat.ksm_merge_any, stat.ksm_mergeable) {
        // Before 6.16 a process says nothing until ksmd has been there.
        (None, None) => stat.ksm_rmap_items.is_some_and(|items| items > 0),
        (any, some) => any == Some(true) || some == Some(true),
    };
    let member = marked.then(|| member(pid.get())).flatten()?;
    Some((member.process, member.anonymous_pages))
}
