//! What is to be done with each process.

use std::collections::HashMap;

use kernel::ksm_sysfs::ksm_stat;
use kernel::procfs::ProcError;
use kernel::{KsmStat, Pid, smaps, status};
use rules::{Action, Backend, Decision, Facts, Rules, Users};
use serde::Serialize;

use super::record::{Record, now};
use super::standing::Standing;
use crate::proc_stat::ProcessId;

/// A process, what the rules say of it, and what follows.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Which.
    pub process: ProcessId,
    /// What is known about it.
    pub facts: Facts,
    /// What the rules say.
    pub decision: Decision,
    /// What KSM does for it; only where that matters.
    pub stat: Option<KsmStat>,
    /// Some of its memory is mergeable; `None` where that does not matter, or cannot be seen.
    pub merged: Option<bool>,
    /// It was enabled by the keeper, or by inheritance from a process that was.
    pub is_ours: bool,
    /// What is to be done.
    pub step: Step,
}

impl Planned {
    /// The switch of the process is on.
    fn is_whole(&self) -> bool {
        self.stat.is_some_and(|stat| stat.ksm_merge_any == Some(true))
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// It is enabled.
    Enable,
    /// It is disabled.
    Disable,
    /// It is enabled already.
    Keep,
    /// Nothing.
    Nothing,
    /// It should be enabled, or disabled, and is not.
    Leave(Left),
}

/// Why a process is not brought to where the rules want it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Left {
    /// It, or the one that started it, was disabled by somebody after it was enabled here.
    Released,
    /// Merging it did not pay; it is tried again after so many seconds.
    Dropped {
        /// Seconds from now.
        retry_seconds: u64,
    },
    /// It was refused a short time ago.
    Paused,
    /// The page store takes a program in when it is started, not later.
    Store,
    /// Whether it is mergeable cannot be seen.
    Unreadable,
}

/// Looks at all processes.
pub(super) fn plan(rules: &Rules, users: &Users, record: &Record) -> Result<Vec<Planned>, ProcError> {
    let mut found: Vec<(ProcessId, Facts)> = Vec::new();
    for pid in status::processes()? {
        // First who it is: facts about the number's next owner are then never taken for this one's.
        let known = ProcessId::of(pid.get()).and_then(|process| Some((process, rules::facts(pid, users)?)));
        found.extend(known);
    }
    let family =
        Family { by_pid: found.iter().map(|(process, facts)| (process.pid, (*process, facts))).collect(), record };
    let planned = found.iter().map(|(process, facts)| {
        let decision = rules.decide(facts);
        let is_ours = family.is_ours(*process);
        let matters = decision.action != Action::Ignore || is_ours;
        let stat = matters.then(|| ksm_stat(Pid(process.pid)).ok()).flatten();
        let merged = matters.then(|| is_merged(Pid(process.pid), stat)).flatten();
        let facts = facts.clone();
        let planned = Planned { process: *process, facts, decision, stat, merged, is_ours, step: Step::Nothing };
        Planned { step: family.step(&planned), ..planned }
    });
    Ok(planned.collect())
}

/// Whether any memory of a process is mergeable. Before Linux 6.16 only its mappings tell, which takes longer.
pub(super) fn is_merged(pid: Pid, stat: Option<KsmStat>) -> Option<bool> {
    match stat.and_then(|stat| stat.ksm_merge_any.zip(stat.ksm_mergeable)) {
        Some((any, some)) => Some(any || some),
        None => smaps::read(pid).ok().map(|vmas| vmas.iter().any(|vma| vma.flags.mergeable())),
    }
}

/// All processes, and who has started whom.
struct Family<'a> {
    by_pid: HashMap<i32, (ProcessId, &'a Facts)>,
    record: &'a Record,
}

impl<'a> Family<'a> {
    /// Its parent, if that is there. A number that was given out again belongs to somebody younger.
    fn parent(&self, process: ProcessId) -> Option<(ProcessId, &'a Facts)> {
        let (_, facts) = self.by_pid.get(&process.pid)?;
        let parent = self.by_pid.get(&facts.parent)?;
        (parent.0.start_time <= process.start_time && parent.0 != process).then_some(*parent)
    }

    /// It is on record as ours, or has inherited from one that is: the nearest one above it that is on record was enabled
    /// before it started what led here. Whoever was left by its parent is not found so: it stays as it is, as what others
    /// have enabled.
    fn is_ours(&self, process: ProcessId) -> bool {
        let mut at = process;
        let mut child: Option<ProcessId> = None;
        // /proc changes while it is read: there could be a ring.
        for _ in 0..1000 {
            if let Some(entry) = self.record.entry(at) {
                return entry.standing.is_ours() && child.is_none_or(|child| child.start_time >= entry.since);
            }
            child = Some(at);
            match self.parent(at) {
                Some((parent, _)) => at = parent,
                None => return false,
            }
        }
        false
    }

    fn step(&self, planned: &Planned) -> Step {
        let Planned { process, facts, decision, merged, .. } = planned;
        let process = *process;
        let step = match (decision.action, *merged) {
            (Action::Ignore, _) | (Action::Disable, Some(false)) => return Step::Nothing,
            (Action::Enable, _) if decision.backend == Backend::Store => return Step::Leave(Left::Store),
            (_, None) => return Step::Leave(Left::Unreadable),
            // By its switch, which what it inherited from has, where only parts are wanted.
            (Action::Enable, Some(true)) if planned.is_ours && planned.is_whole() && decision.is_partial() => {
                Step::Enable
            }
            // It was refused halfway, or this process was killed: perhaps not all of it is done.
            (Action::Enable, Some(true)) if self.is_begun(process) => Step::Enable,
            (Action::Enable, Some(true)) => return Step::Keep,
            (Action::Enable, Some(false)) => self.enable(process, facts),
            (Action::Disable, Some(true)) => Step::Disable,
        };
        let acts = matches!(step, Step::Enable | Step::Disable);
        if acts && self.record.is_paused(process) { Step::Leave(Left::Paused) } else { step }
    }

    fn is_begun(&self, process: ProcessId) -> bool {
        matches!(self.record.standing(process), Some(Standing::Asked { .. } | Standing::Part { .. }))
    }

    /// For a process that is not mergeable and should be.
    fn enable(&self, process: ProcessId, facts: &Facts) -> Step {
        let released = Step::Leave(Left::Released);
        match self.record.entry(process).map(|entry| (entry.standing, entry.exe == facts.exe)) {
            Some((Standing::Released, _)) => released,
            // On kernels where merging ends with an exec.
            Some((Standing::Part { .. } | Standing::Enabled { .. }, false)) => Step::Enable,
            Some((Standing::Part { .. } | Standing::Enabled { .. }, true)) => released,
            Some((Standing::Dropped { until, .. }, _)) => match until.saturating_sub(now()) {
                0 => Step::Enable,
                retry_seconds => Step::Leave(Left::Dropped { retry_seconds }),
            },
            Some((Standing::Asked { .. }, _)) => Step::Enable,
            // What a released process starts of its own kind, as a server its workers.
            None => match self.parent(process) {
                Some((parent, its)) if its.exe == facts.exe => match self.record.standing(parent) {
                    Some(Standing::Released) => released,
                    _ => Step::Enable,
                },
                _ => Step::Enable,
            },
        }
    }
}
