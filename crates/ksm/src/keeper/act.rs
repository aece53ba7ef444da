//! One process is enabled or disabled.

use std::collections::HashSet;
use std::time::Duration;

use kernel::ksm_sysfs::ksm_stat;
use kernel::{Pid, maps, task};
use rules::{Decision, Users};

use super::plan::{Planned, is_merged};
use crate::enable::{self, Goal, Outcome};
use crate::proc_stat::ProcessId;

/// The first process of each address space: what is done to one of those that share one is done to all.
pub(super) fn one_of_each_space(planned: &[&Planned]) -> HashSet<ProcessId> {
    let pids: Vec<Pid> = planned.iter().map(|planned| Pid(planned.process.pid)).collect();
    let first: HashSet<Pid> = task::by_address_space(&pids).iter().filter_map(|same| same.first().copied()).collect();
    planned.iter().map(|planned| planned.process).filter(|process| first.contains(&Pid(process.pid))).collect()
}

/// Makes a process mergeable, as a rule says.
pub(super) fn enable(process: ProcessId, decision: &Decision, users: &Users, timeout: Duration) -> Outcome {
    if is_member(Pid(process.pid)) {
        return Outcome::Refused {
            reason: "store_member",
            detail: "it is a member of a partition of the page store, which merges it".to_owned(),
        };
    }
    let goal = Goal { only: decision.vma.clone(), exclude: decision.exclude.clone(), ..Goal::enable() };
    // It may have become another program since it was decided about.
    let never = |pid: Pid| {
        let reason = rules::facts(pid, users).as_ref().and_then(rules::never_merge)?;
        (!decision.overrides_never_merge).then(|| format!("{}: {}", reason.name, reason.reason))
    };
    let how = enable::Rules { goal: &goal, force: false, timeout, stop: &|| false, never: &never };
    enable::apply(process, &how).outcome
}

/// Ends the merging of a process.
pub(super) fn disable(process: ProcessId, timeout: Duration) -> Outcome {
    let how = enable::Rules { goal: &Goal::disable(), force: false, timeout, stop: &|| false, never: &|_| None };
    enable::apply(process, &how).outcome
}

/// Whether some memory of a process is mergeable; `None` if that cannot be seen.
pub(super) fn is_marked(process: ProcessId) -> Option<bool> {
    let pid = Pid(process.pid);
    let marked = is_merged(pid, ksm_stat(pid).ok());
    // The number may be somebody else's by now.
    if process.is_alive() { marked } else { Some(false) }
}

/// It maps segments of a page store.
fn is_member(pid: Pid) -> bool {
    maps::read(pid).is_ok_and(|vmas| vmas.iter().any(store::mappings::is_segment))
}
