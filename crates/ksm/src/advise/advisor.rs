//! Looking and acting.
use std::time::{Duration, Instant};

use kernel::ksm_sysfs::KsmSysfs;
use kernel::status;

use super::census::Census;
use super::goals::{Goals, Look};
use super::law::{Decision, Law, Pace};
use super::summary::Summary;
use crate::error::KsmError;
use crate::knob::Knob;
use crate::ksmd::{Ksmd, cow_ksm};
use crate::lease::Lease;
use crate::pace::Phase;
use crate::repaired::{Foreign, Repaired};
use crate::state::StatePath;
use crate::sysfs;
use crate::wanted::{Rate, Wanted};

/// Something worth a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// The pace changed by much, or what settles it.
    Decided {
        /// Since the start.
        at: Duration,
        /// What.
        decision: Decision,
    },
    /// One or more passes ended.
    Passed(super::Pass),
    /// A setting that somebody else wrote meanwhile; it stays his.
    Taken(Foreign),
}

/// An advisor at work. Call [`Advisor::tick`] when it asks to be called; it has no thread of its own. Between two calls
/// ksmd runs on at the rate that was asked last, which is below the ceiling: an advisor that is stopped or late makes no
/// harm.
#[derive(Debug)]
pub struct Advisor {
    lease: Lease,
    law: Law,
    ksmd: Option<Ksmd>,
    census: Census,
    begun: Instant,
    asked: Wanted,
    told: Option<Told>,
    summary: Summary,
}

/// What was said last.
#[derive(Clone, Copy, Debug)]
struct Told {
    phase: Phase,
    pace: std::mem::Discriminant<Pace>,
    pass_pages: f64,
}

/// A pass that has grown or shrunk by this factor is worth a line.
const MUCH: f64 = 1.5;

impl Advisor {
    /// Takes the lease, at a state file, and says what was put right on the way. Nothing is asked of ksmd yet.
    ///
    /// # Errors
    /// As [`Lease::acquire_at`].
    pub fn start_at(path: &StatePath, sysfs: &KsmSysfs, goals: Goals) -> Result<(Self, Repaired), KsmError> {
        let ksmd = Ksmd::find();
        let mut census = Census::default();
        census.look();
        let (lease, repaired) = Lease::acquire_at(path, sysfs, Wanted::default())?;
        let begun = Instant::now();
        let first = look(sysfs, ksmd, &census, begun)?;
        let advisor = Self {
            law: Law::new(goals, first),
            summary: Summary::begin(&goals, &first),
            lease,
            ksmd,
            census,
            begun,
            asked: Wanted::default(),
            told: None,
        };
        Ok((advisor, repaired))
    }

    /// Looks, decides, acts. Returns what is worth a line, and for how long the caller may sleep.
    ///
    /// # Errors
    /// Those of reading KSM's files and of the lease's state.
    pub fn tick(&mut self) -> Result<(Vec<Event>, Duration), KsmError> {
        self.census.look();
        let now = look(self.lease.sysfs(), self.ksmd, &self.census, self.begun)?;
        let decision = self.law.look(now);
        let mut events: Vec<Event> = decision.pass.map(Event::Passed).into_iter().collect();
        let wanted = self.wanted(&decision);
        if wanted != self.asked {
            let done = self.lease.update(wanted)?;
            self.asked = wanted;
            events.extend(done.foreign.iter().copied().map(Event::Taken));
        }
        let told = Told {
            phase: decision.phase,
            pace: std::mem::discriminant(&decision.pace),
            pass_pages: decision.pass_pages,
        };
        if decision.turn.is_some() || self.told.is_none_or(|before| before.differs_from(told)) {
            self.told = Some(told);
            events.push(Event::Decided { at: now.at, decision });
        }
        self.summary.add(&now, &decision, self.law.merges());
        Ok((events, decision.next))
    }

    fn wanted(&self, decision: &Decision) -> Wanted {
        match decision.rate {
            None => Wanted::default(),
            rate => Wanted {
                run: Some(true),
                rate,
                governs: true,
                smart_scan: (!self.law.goals().keep_smart_scan).then_some(false),
                ..Wanted::default()
            },
        }
    }

    /// What came of it so far.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let mut summary = self.summary.clone();
        summary.processes = self.census.processes();
        summary
    }

    /// Gives the settings back. Merged pages stay merged.
    ///
    /// # Errors
    /// As [`Lease::release`].
    pub fn stop(self) -> Result<Repaired, KsmError> {
        self.lease.release()
    }
}

impl Told {
    fn differs_from(self, now: Self) -> bool {
        let ratio = now.pass_pages / self.pass_pages;
        self.phase != now.phase || self.pace != now.pace || !(1.0 / MUCH..=MUCH).contains(&ratio)
    }
}

/// Everything that is seen at one time.
fn look(sysfs: &KsmSysfs, ksmd: Option<Ksmd>, census: &Census, begun: Instant) -> Result<Look, KsmError> {
    let found = sysfs.counters()?;
    let count = |value: Option<u64>| value.unwrap_or(0);
    let (shared, sharing) = (count(found.pages_shared), count(found.pages_sharing));
    // Pressure is a goal of the second rank: a kernel that does not tell it has none.
    let pressure = |of| status::pressure(of).ok().flatten().map(|pressure| pressure.some_avg10);
    Ok(Look {
        at: begun.elapsed(),
        full_scans: count(found.full_scans),
        pages_scanned: found.pages_scanned,
        pages_skipped: count(found.pages_skipped),
        rmap_items: shared + sharing + count(found.pages_unshared) + count(found.pages_volatile),
        merged: shared + sharing + count(found.ksm_zero_pages),
        saved: sharing + count(found.ksm_zero_pages),
        cow: cow_ksm(),
        // With a counter in it that has drifted it is nothing to judge by.
        general_profit: found.general_profit.filter(|_| found.ksm_zero_pages_drift.is_none()),
        ksmd_cpu: ksmd.and_then(|ksmd| ksmd.cpu_time()),
        in_force: in_force(sysfs)?,
        mergeable_pages: census.mergeable_pages(),
        appeared_pages: census.appeared_pages(),
        memory_pressure: pressure("memory"),
        cpu_pressure: pressure("cpu"),
    })
}

fn in_force(sysfs: &KsmSysfs) -> Result<Option<Rate>, KsmError> {
    let value =
        |knob| Ok::<_, KsmError>(sysfs::get(sysfs, knob)?.map(|value| u32::try_from(value).unwrap_or(u32::MAX)));
    if value(Knob::Run)? != Some(1) {
        return Ok(None);
    }
    let rate = (value(Knob::PagesToScan)?, value(Knob::SleepMillisecs)?);
    Ok(rate.0.zip(rate.1).map(|(pages_to_scan, sleep_millisecs)| Rate { pages_to_scan, sleep_millisecs }))
}
