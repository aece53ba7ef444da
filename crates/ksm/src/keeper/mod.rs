//! Keeping a file of rules: who is to be merged is, who is not to be is not, for as long as somebody looks.
//!
//! [`Keeper::plan`] looks at all processes and says what is to be done, and [`Keeper::look`] does it. What it has done is
//! on [record](Record), so that the next call, or the one after this process was killed, knows it:
//!
//! * What was enabled here and is not mergeable any more was disabled by somebody: the administrator, or the program
//!   itself. It is left so for as long as it lives, and what it starts from the same file too.
//! * What merging does not pay for is let go, and tried again later, after twice the time each time.
//! * What is enabled and was not enabled here (a service with MemoryKSM=, a program that asks for it itself) is left as it
//!   is, and never let go. What a process starts that was enabled here is counted as enabled here.
//! * What was refused halfway is tried again until it is done, and taken back with the rest.
//!
//! A process may execute another program between two steps. So the decision is made again right before each step, and by
//! the next look after it: one that was enabled as a shell and has become an agent of keys is disabled then.

mod act;
mod event;
mod plan;
mod record;
mod standing;

pub use event::{Event, What};
pub use plan::{Left, Planned, Step};
pub use record::{Record, Recorded};
pub use standing::Standing;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use kernel::procfs::ProcError;
use kernel::{KsmSysfs, Pid};
use rules::{Action, Decision, Facts, Meter, Rules, Users, Verdict, Why};

use crate::enable::Outcome;
use crate::error::KsmError;
use crate::proc_stat::ProcessId;

/// Keeps the rules of a file.
pub struct Keeper {
    rules: Rules,
    users: Users,
    record: Record,
    meters: HashMap<ProcessId, Meter>,
    timeout: Duration,
}

impl Keeper {
    /// With the record of earlier calls. `timeout`: how long a process may take to stop, and a call in it to return.
    #[must_use]
    pub fn new(rules: Rules, record: Record, timeout: Duration) -> Self {
        Self { rules, users: Users::host(), record, meters: HashMap::new(), timeout }
    }

    /// Other rules from now on. What was done stays done, unless the new ones say otherwise.
    pub fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
        // New names may have come with them.
        self.users = Users::host();
    }

    /// What is on record.
    #[must_use]
    pub const fn record(&self) -> &Record {
        &self.record
    }

    /// What is to be done with each process of the host now. Changes nothing.
    ///
    /// # Errors
    /// [`ProcError`] if /proc cannot be read; that a process is gone is none.
    pub fn plan(&self) -> Result<Vec<Planned>, ProcError> {
        plan::plan(&self.rules, &self.users, &self.record)
    }

    /// Looks at all processes and does what is to be done. `go_on` is asked before each process.
    ///
    /// # Errors
    /// [`KsmError::Proc`] if /proc cannot be read, [`KsmError::Record`] if the record cannot be written: then nothing is
    /// enabled, since nobody would remember it.
    pub fn look(&mut self, go_on: &dyn Fn() -> bool) -> Result<Vec<Event>, KsmError> {
        let planned = self.plan()?;
        let there: HashSet<ProcessId> = planned.iter().map(|planned| planned.process).collect();
        self.record.forget_all_but(&there);
        self.meters.retain(|process, _| there.contains(process));
        let mut events = Vec::new();
        self.note_what_others_did(&planned, &mut events);
        // Secrets first. What is disabled needs no word in advance: if it is not done, the next look finds it again.
        for planned in planned.iter().filter(|planned| planned.step == Step::Disable).take_while(|_| go_on()) {
            events.extend(self.disable(planned, What::Disabled));
        }
        let wanted: Vec<&Planned> = planned.iter().filter(|planned| planned.step == Step::Enable).collect();
        // On record before it is done: whoever is killed in between leaves nothing that nobody knows of.
        let before: Vec<Option<Recorded>> =
            wanted.iter().map(|planned| self.record.entry(planned.process).cloned()).collect();
        for planned in &wanted {
            let drops = self.record.standing(planned.process).map_or(0, Standing::drops);
            self.record.enter(planned.process, &planned.facts, Standing::Asked { drops });
        }
        self.record.store()?;
        let first = act::one_of_each_space(&wanted);
        for (planned, before) in wanted.iter().zip(before) {
            if first.contains(&planned.process) && go_on() {
                events.extend(self.enable(planned, before));
            } else {
                // It shares its memory with one that is dealt with here, and the next look finds it enabled.
                self.record.put_back(planned.process, before);
            }
        }
        self.measure(&planned, &mut events);
        self.record.store()?;
        Ok(events)
    }

    /// Disables everything that was enabled here, with what that has started, and forgets it.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn undo(&mut self) -> Result<Vec<Event>, KsmError> {
        let planned = self.plan()?;
        let ours = planned.iter().filter(|planned| planned.is_ours && planned.merged != Some(false));
        let mut events = Vec::new();
        for planned in ours {
            // What was refused before for the same reason is told all the same: who is told of stays on record.
            self.record.resume(planned.process);
            let event = self.disable(planned, What::Disabled);
            events.extend(event.map(|event| Event { action: Action::Disable, why: Why::Undone, ..event }));
        }
        // What could not be disabled stays on record, for the next try.
        self.record.forget_if(|process| !events.iter().any(|event| event.process == process && event.is_refusal()));
        self.record.store()?;
        Ok(events)
    }

    /// Enters what was enabled by inheritance from a process of ours, and what was disabled by somebody else.
    fn note_what_others_did(&mut self, planned: &[Planned], events: &mut Vec<Event>) {
        for planned in planned {
            let standing = self.record.standing(planned.process);
            match (planned.step, standing) {
                (Step::Keep | Step::Enable, None) if planned.is_ours && planned.merged == Some(true) => {
                    self.record.enter_heir(planned.process, &planned.facts);
                }
                // Somebody has enabled it again.
                (Step::Keep, Some(Standing::Released | Standing::Dropped { .. })) => {
                    self.record.forget(planned.process);
                }
                (Step::Leave(Left::Released), standing) if standing != Some(Standing::Released) => {
                    self.record.enter(planned.process, &planned.facts, Standing::Released);
                    // Of those that it starts later there is nothing to say.
                    if standing.is_some() {
                        events.push(Event::new(planned, What::Released));
                    }
                }
                _ => {}
            }
        }
    }

    /// `before`: how it stood on record before it was asked for.
    fn enable(&mut self, planned: &Planned, before: Option<Recorded>) -> Option<Event> {
        let process = planned.process;
        let Some((facts, decision)) = self.still(planned) else {
            self.record.put_back(process, before);
            return None;
        };
        let drops = self.record.standing(process).map_or(0, Standing::drops);
        match act::enable(process, &decision, &self.users, self.timeout) {
            Outcome::Done => {
                self.record.enter(process, &facts, Standing::Enabled { drops });
                return Some(Event::new(planned, What::Enabled));
            }
            // By whoever was killed after it had enabled it, or what it shares its memory with.
            Outcome::Already if planned.is_ours => self.record.enter(process, &facts, Standing::Enabled { drops }),
            // By whom is not known: not by us, then. Or it has ended.
            Outcome::Already | Outcome::Ended => self.record.forget(process),
            Outcome::Nothing => {
                self.record.put_back(process, before);
                return self.refused(planned, "nothing", "it has none of the mappings that the rule names");
            }
            Outcome::Refused { reason, detail } => {
                match act::is_marked(process) {
                    // It is brought to its end later, and `undo` knows of it.
                    Some(true) => self.record.enter(process, &facts, Standing::Part { drops }),
                    Some(false) if reason != "unfinished" => self.record.put_back(process, before),
                    // A call that was left to it goes on by itself, or there is no telling. It stays asked for.
                    _ => {}
                }
                return self.refused(planned, reason, &detail);
            }
        }
        None
    }

    fn disable(&mut self, planned: &Planned, what: What) -> Option<Event> {
        match act::disable(planned.process, self.timeout) {
            Outcome::Done => {
                self.record.forget(planned.process);
                // A program that marks itself again and again is not stopped at every look.
                self.record.pause(planned.process, "disabled");
                Some(Event::new(planned, what))
            }
            Outcome::Already | Outcome::Nothing | Outcome::Ended => {
                self.record.forget(planned.process);
                None
            }
            Outcome::Refused { reason, detail } => self.refused(planned, reason, &detail),
        }
    }

    /// Tries again later, after twice the time each time, and says so once for each reason.
    fn refused(&mut self, planned: &Planned, reason: &str, detail: &str) -> Option<Event> {
        let is_new = self.record.pause(planned.process, reason);
        is_new.then(|| Event::new(planned, What::Refused { reason: reason.to_owned(), detail: detail.to_owned() }))
    }

    /// The facts and the decision, if it is what was planned.
    fn still(&self, planned: &Planned) -> Option<(Facts, Decision)> {
        let facts = rules::facts(Pid(planned.process.pid), &self.users)?;
        let decision = self.rules.decide(&facts);
        (decision.action == planned.decision.action).then_some((facts, decision))
    }

    /// Looks at the profit of what was enabled here, and lets go what costs more than it saves.
    fn measure(&mut self, planned: &[Planned], events: &mut Vec<Event>) {
        let counters = KsmSysfs::host().counters();
        let Some(full_scans) = counters.ok().and_then(|counters| counters.full_scans) else { return };
        for planned in planned {
            let Some(Standing::Enabled { drops }) = self.record.standing(planned.process) else { continue };
            let Some(profit) = planned.stat.and_then(|stat| stat.ksm_process_profit) else { continue };
            let meter = self.meters.entry(planned.process).or_default();
            let Verdict::Drop { passes } = meter.look(profit, full_scans, &self.rules.profit) else { continue };
            if self.record.is_paused(planned.process) {
                continue;
            }
            let rules = &self.rules.profit;
            let retry_seconds = record::doubled(rules.retry.as_secs(), drops).min(rules.retry_most.as_secs());
            let dropped = What::Dropped { ksm_process_profit: profit, passes, retry_seconds };
            let event = self.disable(planned, dropped);
            if event.as_ref().is_some_and(|event| !event.is_refusal()) {
                self.meters.remove(&planned.process);
                // The rules say when.
                self.record.resume(planned.process);
                let standing =
                    Standing::Dropped { until: record::now() + retry_seconds, drops: drops.saturating_add(1) };
                self.record.enter(planned.process, &planned.facts, standing);
            }
            events.extend(event);
        }
    }
}
