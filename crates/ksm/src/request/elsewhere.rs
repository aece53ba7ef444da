//! What KSM shares already in processes that are not part of a request: whoever equals it joins it.
use std::collections::HashSet;

use kernel::ksm_sysfs::ksm_stat;
use kernel::{FrameFlagsFile, status};
use page::Secret;

use super::look::{self, Seen};
use super::walk::{Target, Walk};
use crate::proc_stat::ProcessId;

/// Pages that KSM shares elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere {
    pub(crate) hashes: HashSet<u64>,
    pub(crate) frames: HashSet<u64>,
    pub(crate) pages: u64,
}

/// Reads one mapping of each KSM page outside of `processes`. Processes that cannot be read, or end, are left out.
/// `None` if `tell` ends it.
pub(crate) fn look(
    processes: &[ProcessId],
    secret: &Secret,
    flags: &mut FrameFlagsFile,
    tell: &mut dyn FnMut() -> bool,
) -> Option<Elsewhere> {
    let (mut targets, mut walk) = (Vec::new(), Walk::default());
    for pid in status::processes().unwrap_or_default() {
        if !tell() {
            return None;
        }
        let merging = ksm_stat(pid).is_ok_and(|stat| stat.ksm_merging_pages.unwrap_or(0) > 0);
        let Some(process) = ProcessId::of(pid.get()).filter(|process| merging && !processes.contains(process)) else {
            continue;
        };
        let place = u32::try_from(targets.len()).expect("pids are fewer");
        if let Ok(target) = Target::open(process)
            && walk.add_merged(&target, place, flags).is_ok()
        {
            targets.push(target);
        }
    }
    let all = [(0, walk.pages)];
    let seen = look::read(&walk, &targets.iter().collect::<Vec<_>>(), &all, secret, |_| tell())?;
    Some(Elsewhere {
        pages: seen.len() as u64,
        hashes: seen.into_iter().map(|Seen { hash, .. }| hash).collect(),
        frames: walk.merged_frames,
    })
}
