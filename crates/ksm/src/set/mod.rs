//! The administrator's own changes of KSM's settings, with a way back.
//!
//! A change is his wish, not a holder's: while a run holds the settings it becomes the value that they return to, and is
//! in force at once only where no holder asks for something else. What was there before the first change of this boot is
//! kept in a file beside the lease's state until [`restore_at`].

mod parse;
mod record;
mod refusal;
mod unmerge;

use kernel::ksm_sysfs::KsmSysfs;
use serde::Serialize;

use crate::error::KsmError;
use crate::knob::{AdvisorMode, Knob, Values};
use crate::lease::Session;
use crate::repaired::{Change, Foreign, Refused};
use crate::state::{Holder, StatePath};
use crate::sysfs;

pub use parse::{BadSetting, parse, word};
pub use record::before_at;
pub use refusal::SetError;
pub(crate) use refusal::{by, users};
pub use unmerge::{Unmerged, unmerge_host_at};

use record::Record;

/// What a change came to.
#[derive(Debug, Default)]
pub struct Set {
    /// Written now.
    pub changed: Vec<Change>,
    /// Taken over by nobody yet: a holder asks for something else, and the wish comes with the end of the last one.
    pub waiting: Vec<Waiting>,
    /// Who holds the settings meanwhile.
    pub holders: Vec<Holder>,
    /// Left as somebody else wrote them ([`restore_at`] only).
    pub foreign: Vec<Foreign>,
    /// Not taken by the kernel.
    pub refused: Vec<Refused>,
    /// Holders that were found dead; what they left was put right.
    pub dead: Vec<Holder>,
}

/// A wish that is not in force yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Waiting {
    /// Which.
    pub knob: Knob,
    /// The administrator's.
    pub wanted: u64,
    /// The holders'.
    pub in_force: u64,
}

/// Makes these the administrator's values.
///
/// # Errors
/// [`SetError`]: nothing was changed. What the kernel refused in spite of all checks is in the answer.
pub fn set_at(path: &StatePath, sysfs: &KsmSysfs, wish: &Values) -> Result<Set, SetError> {
    sysfs::check_writable(sysfs)?;
    debug_assert!(wish.get(Knob::Run) != Some(2), "unmerging the host has a function of its own");
    let mut session = Session::open(path, sysfs)?;
    refusal::foresee(sysfs, &session, wish)?;
    let mut record = Record::load(&session.locked)?;
    let old = record.clone();
    record.note(&session.state.administrator, wish);
    // Before anything is written: a kill in between leaves the way back.
    record.store(&session.locked)?;
    session.apply(wish)?;
    for refused in session.repaired.refused.iter().filter(|refused| wish.contains(refused.knob)) {
        record.take_back(&old, refused.knob);
    }
    record.is_done();
    record.store(&session.locked)?;
    Ok(outcome(session, wish, sysfs)?)
}

/// Puts back what was there before the first [`set_at`] of this boot. A setting that somebody else wrote since is left,
/// unless `force`.
///
/// # Errors
/// Those of the state files and of KSM's files.
pub fn restore_at(path: &StatePath, sysfs: &KsmSysfs, force: bool) -> Result<Set, KsmError> {
    sysfs::check_writable(sysfs)?;
    let mut session = Session::open(path, sysfs)?;
    let mut record = Record::load(&session.locked)?;
    let found = session.state.administrator.clone();
    let (mut wish, mut foreign) = (Values::default(), Vec::new());
    for (knob, before) in record.before.iter() {
        let Some(now) = found.get(knob) else { continue };
        match (record.is_own(knob, now), record.set.get(knob)) {
            (Some(false), Some(ours)) if now != before && !force => foreign.push(Foreign { knob, ours, found: now }),
            // 2 has done its work, and what it left is a ksmd that stands still.
            _ if knob == Knob::Run => wish.set(knob, u64::from(before == 1)),
            _ => wish.set(knob, before),
        }
    }
    let mode = wish.get(Knob::AdvisorMode).or(found.get(Knob::AdvisorMode));
    if mode == Some(AdvisorMode::ScanTime.into()) {
        // The kernel's to set.
        wish.remove(Knob::PagesToScan);
    }
    session.apply(&wish)?;
    let refused: Vec<Knob> = session.repaired.refused.iter().map(|refused| refused.knob).collect();
    let left = |knob: &Knob| foreign.iter().any(|foreign| foreign.knob == *knob) || refused.contains(knob);
    record.keep(left);
    record.store(&session.locked)?;
    Ok(Set { foreign, ..outcome(session, &wish, sysfs)? })
}

fn outcome(session: Session<'_>, wish: &Values, sysfs: &KsmSysfs) -> Result<Set, KsmError> {
    let in_force = sysfs::values(sysfs)?;
    let Session { state, repaired, .. } = session;
    let refused = |knob: Knob| repaired.refused.iter().any(|refused| refused.knob == knob);
    let waiting = wish.iter().filter_map(|(knob, wanted)| {
        let in_force = in_force.get(knob)?;
        (in_force != wanted && !refused(knob)).then_some(Waiting { knob, wanted, in_force })
    });
    Ok(Set {
        waiting: waiting.collect(),
        holders: state.holders,
        changed: repaired.changed,
        foreign: Vec::new(),
        refused: repaired.refused,
        dead: repaired.dead,
    })
}
