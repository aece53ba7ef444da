//! The lease on KSM's settings.
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use kernel::ksm_sysfs::KsmSysfs;

use crate::error::KsmError;
use crate::knob::{AdvisorMode, Knob, Values, write_order};
use crate::proc_stat::ProcessId;
use crate::state::{Holder, Life, Locked, State, StatePath};
use crate::sysfs;
use crate::wanted::{Wanted, combine};

/// A right to have KSM's settings changed. Dropping it gives it back, and with the last one the administrator's values.
#[derive(Debug)]
pub struct Lease {
    sysfs: KsmSysfs,
    path: StatePath,
    process: ProcessId,
    serial: u64,
    life: Life,
    released: bool,
}

/// One setting that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which.
    pub knob: Knob,
    /// What was found.
    pub from: u64,
    /// What was written.
    pub to: u64,
}

/// One setting that somebody else wrote while it was leased. It is his from then on: nothing here overwrites it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// Which.
    pub knob: Knob,
    /// What had been written under the lease.
    pub ours: u64,
    /// What was found instead, and left.
    pub found: u64,
}

/// One setting that the kernel did not take, as `max_page_sharing` while pages are merged. It is tried again at each
/// change and, as a debt, by the next use if the lease is over.
#[derive(Debug)]
pub struct Refused {
    /// Which.
    pub knob: Knob,
    /// What was to be written.
    pub wanted: u64,
    /// What the kernel answered.
    pub error: kernel::ksm_sysfs::KsmError,
}

/// What a look at the lease put right.
#[derive(Debug, Default)]
pub struct Repaired {
    /// Holders that had died without giving back.
    pub dead: Vec<Holder>,
    /// Settings that were written.
    pub changed: Vec<Change>,
    /// Settings that somebody else had written.
    pub foreign: Vec<Foreign>,
    /// Settings that the kernel refused.
    pub refused: Vec<Refused>,
}

impl Refused {
    fn cause(&self) -> String {
        std::error::Error::source(&self.error).map_or_else(|| self.error.to_string(), ToString::to_string)
    }
}

impl Repaired {
    /// Nothing was wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.dead.is_empty() && self.changed.is_empty() && self.foreign.is_empty() && self.refused.is_empty()
    }
}

impl fmt::Display for Repaired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_clean() {
            return f.write_str("KSM's settings are as they should be");
        }
        let mut parts = Vec::new();
        for holder in &self.dead {
            parts.push(format!("{} (pid {}) had died holding KSM's settings", holder.command, holder.process.pid));
        }
        for change in &self.changed {
            parts.push(format!("{} {} -> {}", change.knob, change.from, change.to));
        }
        for foreign in &self.foreign {
            parts.push(format!("{} left at {}: written by somebody else", foreign.knob, foreign.found));
        }
        for refused in &self.refused {
            parts.push(format!("{} cannot be {} now: {}", refused.knob, refused.wanted, refused.cause()));
        }
        f.write_str(&parts.join("; "))
    }
}

/// Leases of one process are told apart by this.
static NEXT_SERIAL: AtomicU64 = AtomicU64::new(0);

impl Lease {
    /// Becomes a holder who asks for `wanted`, at the usual state file of this user.
    ///
    /// # Errors
    /// [`KsmError::ReadOnly`] if KSM's files cannot be written, and errors of the state file.
    pub fn acquire(sysfs: &KsmSysfs, wanted: Wanted) -> Result<Self, KsmError> {
        Self::acquire_at(&StatePath::for_this_user(), sysfs, wanted).map(|(lease, _)| lease)
    }

    /// As [`Lease::acquire`] with a state file of one's own, and with what was put right on the way.
    ///
    /// # Errors
    /// As [`Lease::acquire`].
    pub fn acquire_at(path: &StatePath, sysfs: &KsmSysfs, wanted: Wanted) -> Result<(Self, Repaired), KsmError> {
        sysfs::check_writable(sysfs)?;
        let serial = NEXT_SERIAL.fetch_add(1, Ordering::Relaxed);
        let mut holder = Holder::current(serial, wanted)?;
        let process = holder.process;
        let life = holder.begin_life(path, &Locked::new(path)?)?;
        match change(path, sysfs, |state| state.holders.push(holder)) {
            Ok(repaired) => {
                let (sysfs, path) = (sysfs.clone(), path.clone());
                Ok((Self { sysfs, path, process, serial, life, released: false }, repaired))
            }
            Err(error) => {
                path.forget_life(&life.name);
                Err(error)
            }
        }
    }

    /// Asks for something else.
    ///
    /// # Errors
    /// Those of the state file and of reading KSM's files. What the kernel refused is in the answer.
    pub fn update(&self, wanted: Wanted) -> Result<Repaired, KsmError> {
        let anew = Holder { life: self.life.name.clone(), ..Holder::current(self.serial, wanted)? };
        change(&self.path, &self.sysfs, |state| {
            match state.holders.iter_mut().find(|holder| holder.is(self.process, self.serial)) {
                Some(holder) => holder.wanted = wanted,
                // Somebody removed the state file: a lease that is still held goes on.
                None => state.holders.push(anew),
            }
        })
    }

    /// Gives back, and says what was restored.
    ///
    /// # Errors
    /// Those of the state file and of reading KSM's files; the lease is then left to its guardian or the next use.
    pub fn release(mut self) -> Result<Repaired, KsmError> {
        self.end()
    }

    fn end(&mut self) -> Result<Repaired, KsmError> {
        self.released = true;
        let gone = |state: &mut State| state.holders.retain(|holder| !holder.is(self.process, self.serial));
        let repaired = change(&self.path, &self.sysfs, gone)?;
        self.path.forget_life(&self.life.name);
        Ok(repaired)
    }

    /// The settings this lease is about.
    #[must_use]
    pub fn sysfs(&self) -> &KsmSysfs {
        &self.sysfs
    }

    /// Removes holders that died and restores what they left, at the usual state file of this user.
    ///
    /// # Errors
    /// As [`Lease::acquire`].
    pub fn repair(sysfs: &KsmSysfs) -> Result<Repaired, KsmError> {
        Self::repair_at(&StatePath::for_this_user(), sysfs)
    }

    /// As [`Lease::repair`] with a state file of one's own.
    ///
    /// # Errors
    /// As [`Lease::acquire`].
    pub fn repair_at(path: &StatePath, sysfs: &KsmSysfs) -> Result<Repaired, KsmError> {
        // Without a state file nothing was ever leased: nothing is created for a mere look.
        if !path.as_path().exists() {
            return Ok(Repaired::default());
        }
        change(path, sysfs, |_| ())
    }

    /// Who holds the settings now, the dead apart.
    ///
    /// # Errors
    /// Those of the state file.
    pub fn holders_at(path: &StatePath) -> Result<Vec<Holder>, KsmError> {
        if !path.as_path().exists() {
            return Ok(Vec::new());
        }
        let mut holders = Locked::new(path)?.load()?.holders;
        holders.retain(|holder| !holder.is_dead(path));
        Ok(holders)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // In a child made by fork this is a copy of its parent's lease, which goes on.
        if !self.released && self.process.pid == i32::try_from(std::process::id()).unwrap_or_default() {
            // Drop has nobody to tell; the guardian and the next use look again.
            let _ = self.end();
        }
    }
}

/// Does one change of the holders under the lock and brings the kernel's settings in line.
fn change(path: &StatePath, sysfs: &KsmSysfs, edit: impl FnOnce(&mut State)) -> Result<Repaired, KsmError> {
    let locked = Locked::new(path)?;
    let mut state = locked.load()?;
    let mut repaired = Repaired::default();
    state.holders.retain(|holder| {
        let dead = holder.is_dead(path);
        if dead {
            repaired.dead.push(holder.clone());
        }
        !dead
    });
    let current = sysfs::values(sysfs)?;
    judge(&mut state, &current, &mut repaired);
    edit(&mut state);
    bring_in_line(&locked, &mut state, sysfs, &mut repaired)?;
    locked.forget_the_dead(&state);
    Ok(repaired)
}

/// Compares what is found with what was written under the lease.
fn judge(state: &mut State, current: &Values, repaired: &mut Repaired) {
    if state.is_over() {
        state.administrator = current.clone();
        state.given_up.clear();
        return;
    }
    for (knob, found) in current.iter() {
        let was_written = state.written.get(knob);
        let was_pending = state.pending.get(knob);
        if knob == Knob::PagesToScan && advisor_touches_pages(state, current) {
            // The kernel writes this one too, at each change of the advisor's mode and after each pass under it.
            if let Some(ours) = was_written.or(was_pending) {
                state.written.set(knob, ours);
            }
            continue;
        }
        let administrator = state.administrator.get(knob);
        if was_pending == Some(found) {
            // The write took place before its writer was killed.
            state.written.set(knob, found);
        } else if was_written == Some(found) || (was_written.is_none() && administrator == Some(found)) {
            // As expected.
        } else {
            if let Some(ours) = was_written.or(was_pending) {
                repaired.foreign.push(Foreign { knob, ours, found });
                state.given_up.push(knob);
                state.written.remove(knob);
            }
            state.administrator.set(knob, found);
        }
        if state.written.get(knob) == state.administrator.get(knob) {
            state.written.remove(knob);
        }
    }
    state.pending = Values::default();
}

fn advisor_touches_pages(state: &State, current: &Values) -> bool {
    current.get(Knob::AdvisorMode) == Some(AdvisorMode::ScanTime.into()) || state.pending.contains(Knob::AdvisorMode)
}

/// Writes what the holders' wishes make different from what the kernel has.
fn bring_in_line(
    locked: &Locked,
    state: &mut State,
    sysfs: &KsmSysfs,
    repaired: &mut Repaired,
) -> Result<(), KsmError> {
    let mut target = combine(&state.administrator, state.holders.iter().map(|holder| &holder.wanted));
    if target.get(Knob::Run).is_some_and(|run| run > 1) {
        // The administrator had unmerged the host with 2. What that left is a stopped ksmd; unmerging again, of what
        // others merged since, is for him to ask.
        target.set(Knob::Run, 0);
    }
    for &knob in &state.given_up {
        target.remove(knob);
    }
    let current = sysfs::values(sysfs)?;
    let mode = target.get(Knob::AdvisorMode).or(current.get(Knob::AdvisorMode));
    let under_advisor = mode == Some(AdvisorMode::ScanTime.into());
    if under_advisor {
        // The kernel's to set, and refused from anybody else.
        target.remove(Knob::PagesToScan);
    }
    let advisor_leaves =
        target.get(Knob::AdvisorMode).is_some_and(|mode| mode == 0 && current.get(Knob::AdvisorMode) != Some(mode));
    let due: Vec<(Knob, u64)> = write_order(&target)
        .into_iter()
        .filter_map(|knob| {
            let value = target.get(knob)?;
            // Leaving the advisor resets pages_to_scan, so it is written even where it seems right already.
            let due = current.get(knob) != Some(value) || (knob == Knob::PagesToScan && advisor_leaves);
            due.then_some((knob, value))
        })
        .collect();
    for &(knob, value) in &due {
        state.pending.set(knob, value);
    }
    // Said before it is done, and said again after.
    locked.store(state)?;
    for (knob, value) in due {
        match sysfs::set(sysfs, knob, value) {
            Ok(()) => {
                let from = current.get(knob).unwrap_or_default();
                repaired.changed.push(Change { knob, from, to: value });
                state.written.set(knob, value);
                if state.administrator.get(knob) == Some(value) {
                    state.written.remove(knob);
                }
            }
            Err(error) => repaired.refused.push(Refused { knob, wanted: value, error }),
        }
    }
    if under_advisor {
        state.written.remove(Knob::PagesToScan);
    }
    state.pending = Values::default();
    if state.holders.is_empty() && repaired.refused.is_empty() {
        state.written = Values::default();
    }
    locked.store(state)
}
